"""How well step probabilities agree with labels: figures that a predictor of the majority class cannot fake, and
ProcessBench's metric.

"Wrong" is the class to find throughout; label 1 is right, 0 wrong, -1 unlabelled and left out. A figure that is not
defined (0/0) is None.
"""

import math
from collections.abc import Sequence

import numpy as np

from .rollout import UNLABELLED, Rollout


def audit(probabilities: Sequence[float], labels: Sequence[int], threshold: float) -> dict:
    """F1, precision and recall at `threshold`, AUROC, expected calibration error over ten equal bins, and the bins."""
    p, right = _labelled(probabilities, labels)
    found, wrong = p < threshold, ~right
    hits = int((found & wrong).sum())
    place = np.clip((p * 10).astype(int), 0, 9)
    bins = [
        {
            "probability": float(p[place == k].mean()),
            "correct": float(right[place == k].mean()),
            "count": int((place == k).sum()),
        }
        for k in range(10)
        if (place == k).any()
    ]
    return {
        "f1": f1(found, wrong) if wrong.any() else None,
        "precision": hits / int(found.sum()) if found.any() else None,
        "recall": hits / int(wrong.sum()) if wrong.any() else None,
        "auroc": auroc(p, right),
        "ece": sum(b["count"] * abs(b["probability"] - b["correct"]) for b in bins) / len(p) if len(p) else None,
        "threshold": threshold,
        "bins": bins,
    }


def agreement(probabilities: Sequence[float], labels: Sequence[int], threshold: float) -> dict:
    """`audit`, with balanced accuracy, Matthews' correlation and accuracy, and under "majority" what a constant
    prediction of the more frequent class gets of each."""
    p, right = _labelled(probabilities, labels)
    majority = np.full(len(p), bool(right.sum() * 2 >= len(p)))
    return {
        **audit(probabilities, labels, threshold),
        **_of_classes(p >= threshold, right),
        "right_steps": int(right.sum()),
        "wrong_steps": int((~right).sum()),
        "majority": {
            "f1": f1(~majority, ~right) if (~right).any() else None,
            "auroc": auroc(majority.astype(float), right),
            **_of_classes(majority, right),
        },
    }


def _labelled(probabilities: Sequence[float], labels: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of the labelled steps, and whether each is right."""
    p, labels_S = np.asarray(probabilities, dtype=np.float64), np.asarray(labels, dtype=int)
    return p[labels_S != UNLABELLED], labels_S[labels_S != UNLABELLED] == 1


def f1(found: np.ndarray, wanted: np.ndarray) -> float:
    """2 hits / (found + wanted); 0 where both are empty."""
    hits = float((found & wanted).sum())
    return 2 * hits / max(float(found.sum() + wanted.sum()), 1.0)


def auroc(p: np.ndarray, right: np.ndarray) -> float | None:
    """The chance that a right step scores above a wrong one, ties counting half (Mann-Whitney)."""
    n_right, n_wrong = int(right.sum()), int((~right).sum())
    if not n_right or not n_wrong:
        return None
    _, inverse, counts = np.unique(p, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[right].sum() - n_right * (n_right + 1) / 2) / (n_right * n_wrong))


def _of_classes(said_right: np.ndarray, right: np.ndarray) -> dict:
    """Accuracy, balanced accuracy (the mean of both classes' recalls) and Matthews' correlation coefficient."""
    tp, tn = int((said_right & right).sum()), int((~said_right & ~right).sum())
    fp, fn = int((said_right & ~right).sum()), int((~said_right & right).sum())
    both = tp + fn > 0 and tn + fp > 0
    # A constant prediction correlates with nothing: the limit of Matthews' 0/0 there is 0.
    under = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) or 1.0
    return {
        "accuracy": (tp + tn) / len(right) if len(right) else None,
        "balanced_accuracy": (tp / (tp + fn) + tn / (tn + fp)) / 2 if both else None,
        "mcc": (tp * tn - fp * fn) / under if both else None,
    }


def first_error(labels: Sequence[int]) -> int | None:
    """Index of the first wrong step, -1 where every step is right; None where a step left unlabelled hides it.

    What stands behind the first wrong step does not matter.
    """
    first = next((n for n, x in enumerate(labels) if x != 1), None)
    if first is None:
        return -1
    return first if labels[first] == 0 else None


def known_first_error(r: Rollout) -> int | None:
    """`first_error` of a labelled completion; None as well where it was cut off before any error."""
    found = first_error(r.step_labels)
    return None if found == -1 and not r.finished else found


def process_bench(predicted: Sequence[int | None], truth: Sequence[int | None]) -> dict:
    """ProcessBench's metric (arXiv:2412.06559) over first-error indices, -1 meaning no error.

    error_accuracy: of samples with an error, the share whose index is predicted exactly; correct_accuracy: of samples
    without one, the share predicted -1; f1: their harmonic mean, 0 where both are 0. Counts: erroneous, correct, and
    first_error_unknown, the samples left out because their truth is None.
    """
    hits_error = [p == t for p, t in zip(predicted, truth, strict=True) if t is not None and t != -1]
    hits_correct = [p == t for p, t in zip(predicted, truth, strict=True) if t == -1]
    error = sum(hits_error) / len(hits_error) if hits_error else None
    correct = sum(hits_correct) / len(hits_correct) if hits_correct else None
    mean = None
    if error is not None and correct is not None:
        mean = 2 * error * correct / (error + correct) if error + correct else 0.0
    return {
        "error_accuracy": error, "correct_accuracy": correct, "f1": mean, "erroneous": len(hits_error),
        "correct": len(hits_correct), "first_error_unknown": len(truth) - len(hits_error) - len(hits_correct),
    }  # fmt: skip


def mean_over(values: Sequence[float | None]) -> float | None:
    """The mean of the figures that are defined; None where none is."""
    defined = [v for v in values if v is not None]
    return sum(defined) / len(defined) if defined else None
