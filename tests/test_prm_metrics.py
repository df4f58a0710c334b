"""Figures of a PRM: by hand, and against brute force."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepkto_fast.prm_metrics import agreement, audit, first_error, known_first_error, mean_over, process_bench

# Few distinct probabilities, so that ties happen.
STEPS = st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0]), st.sampled_from([1, 0, -1])))
ERRORS = st.lists(st.tuples(st.integers(-1, 3), st.one_of(st.none(), st.integers(-1, 3))))


def test_audit_by_hand():
    view = audit([0.9, 0.8, 0.4, 0.3, 0.85], [1, 1, 1, 0, 0], threshold=0.5)
    assert view["precision"] == 0.5  # 0.4 and 0.3 are called wrong, 0.3 is
    assert view["recall"] == 0.5  # of 0.3 and 0.85
    assert view["f1"] == 0.5
    assert view["auroc"] == pytest.approx((2 + 1 + 1) / 6)  # right 0.9, 0.8, 0.4 against wrong 0.3, 0.85
    assert sum(b["count"] for b in view["bins"]) == 5
    ece = (1 * abs(0.9 - 1) + 2 * abs(0.825 - 0.5) + 1 * abs(0.4 - 1) + 1 * abs(0.3 - 0)) / 5
    assert view["ece"] == pytest.approx(ece)


def test_audit_counts_ties_half_and_leaves_undefined_figures_out():
    assert audit([0.5, 0.5], [1, 0], 0.1)["auroc"] == 0.5
    only_right = audit([0.9, 0.1], [1, 1], 0.5)
    assert (only_right["f1"], only_right["recall"], only_right["auroc"]) == (None, None, None)
    assert audit([0.9], [0], 0.5)["precision"] is None
    nothing = audit([], [], 0.5)
    assert (nothing["ece"], nothing["bins"]) == (None, [])


def test_agreement_by_hand():
    # said:     right right wrong wrong right right
    # labelled: right wrong wrong right right (not)
    view = agreement([0.9, 0.8, 0.1, 0.2, 0.7, 0.6], [1, 0, 0, 1, 1, -1], threshold=0.5)
    assert (view["right_steps"], view["wrong_steps"]) == (3, 2)
    assert view["accuracy"] == pytest.approx(3 / 5)
    assert view["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert view["mcc"] == pytest.approx((2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2))
    assert view["majority"] == {"f1": 0.0, "auroc": 0.5, "accuracy": 3 / 5, "balanced_accuracy": 0.5, "mcc": 0.0}


def test_the_majority_class_gains_nothing():
    """Whoever calls every step right is accurate on right steps, and gets nothing for it elsewhere."""
    view = agreement([0.9] * 100, [1] * 95 + [0] * 5, threshold=0.5)
    assert view["accuracy"] == 0.95
    assert (view["f1"], view["auroc"], view["balanced_accuracy"], view["mcc"]) == (0.0, 0.5, 0.5, 0.0)
    assert {k: view[k] for k in view["majority"]} == view["majority"]


@given(STEPS, st.sampled_from([0.0, 0.3, 0.6]))
def test_agreement_is_what_counting_says(steps, threshold):
    view = agreement([p for p, _ in steps], [x for _, x in steps], threshold)
    seen = [(p, x) for p, x in steps if x != -1]
    right, wrong = [p for p, x in seen if x == 1], [p for p, x in seen if x == 0]
    assert (view["right_steps"], view["wrong_steps"]) == (len(right), len(wrong))
    if not right or not wrong:
        assert view["auroc"] is view["balanced_accuracy"] is view["mcc"] is None
        return
    wins = sum((r > w) + 0.5 * (r == w) for r in right for w in wrong)
    assert view["auroc"] == pytest.approx(wins / (len(right) * len(wrong)))
    said, truth = np.array([p >= threshold for p, _ in seen], float), np.array([x for _, x in seen], float)
    assert view["accuracy"] == pytest.approx((said == truth).mean())
    recalls = [(said[truth == k] == k).mean() for k in (0, 1)]
    assert view["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    assert view["recall"] == pytest.approx(recalls[0])
    expected = np.corrcoef(said, truth)[0, 1] if len(set(said)) == 2 else 0.0
    assert view["mcc"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([1, 1, 1], -1), ([0, 1, 1], 0), ([1, 1, 0], 2), ([1, 0, -1, 0], 1), ([1, -1, 0], None), ([1, 1, -1], None),
        ([-1], None),
    ],
)  # fmt: skip
def test_first_error(labels, expected):
    assert first_error(labels) == expected


def test_a_completion_cut_before_any_error_tells_nothing(rollouts):
    r = replace(rollouts[0], step_labels=[1, 1])
    assert known_first_error(r) == -1
    assert known_first_error(replace(r, finished=False)) is None
    assert known_first_error(replace(r, finished=False, step_labels=[1, 0])) == 1


def test_process_bench_by_hand():
    view = process_bench([0, 2, -1, -1, 1, 0, 0], [0, 1, 2, -1, -1, -1, None])
    assert view["error_accuracy"] == pytest.approx(1 / 3)
    assert view["correct_accuracy"] == pytest.approx(1 / 3)
    assert view["f1"] == pytest.approx(1 / 3)
    assert (view["erroneous"], view["correct"], view["first_error_unknown"]) == (3, 3, 1)
    assert process_bench([0, -1, -1], [0, -1, 1])["f1"] == pytest.approx(2 * 0.5 * 1 / 1.5)


@given(ERRORS)
def test_process_bench_is_what_counting_says(pairs):
    view = process_bench([p for p, _ in pairs], [t for _, t in pairs])
    kinds = {"error_accuracy": [], "correct_accuracy": []}
    for p, t in pairs:
        if t is not None:
            kinds["correct_accuracy" if t == -1 else "error_accuracy"].append(float(p == t))
    for name, hits in kinds.items():
        assert view[name] == (pytest.approx(np.mean(hits)) if hits else None)
    if not all(kinds.values()):
        assert view["f1"] is None
    else:
        a, b = (np.mean(hits) for hits in kinds.values())
        assert view["f1"] == pytest.approx(0 if a == b == 0 else 2 / (1 / a + 1 / b) if a and b else 0)
    assert view["erroneous"] + view["correct"] + view["first_error_unknown"] == len(pairs)


def test_a_mean_over_what_is_defined():
    assert mean_over([0.5, None, 1.0]) == 0.75
    assert mean_over([None]) is None
