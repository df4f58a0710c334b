"""ProcessBench's metric of a PRM: `python -m stepkto_fast.eval_prm --prm DIR --data FILE_OR_NAME ...`.

Rows are ProcessBench's own, or stepwise rows whose labels say where the first error is. Definitions: docs/prm.md.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from .atomic import replacing
from .command import open_device, progress_bar, run_command, say_complaints
from .errors import RunError
from .labelled import labelled_rollouts, read_labelled
from .prm import PRM
from .prm_files import load_prm_and_tokenizer
from .prm_metrics import auroc, first_error, known_first_error, mean_over, process_bench
from .rollout import UNLABELLED, Rollout
from .settings import parse_settings, setting
from .task import asked_rows
from .train_prm import shown

GROUP = 64  # completions between two signs of progress
FIGURES = ("error_accuracy", "correct_accuracy", "f1", "step_auroc")


@dataclass
class PRMEvaluation:
    """Settings of eval_prm."""

    prm: str = setting("", "directory that train_prm or a run wrote a PRM into")
    data: str = setting("", "completions with a known first error: a file, a folder or a hub name")
    data_format: Literal["auto", "stepwise", "prm800k", "math_shepherd", "processbench"] = setting(
        "auto", "format of data (docs/data.md)"
    )
    splits: str = setting("", "splits of data, comma-separated, each a subset: gsm8k,math,olympiadbench,omnimath")
    data_neutral: Literal["correct", "incorrect", "unlabelled"] = setting("correct", "what PRM800K's rating 0 means")
    separator: str = setting("\n", "text between two steps of a row, as in training")
    task: Literal["arithmetic", "math"] = setting(
        "arithmetic", "arithmetic: prompts stay as they are; math: bare questions are asked as the math task asks them"
    )
    system_prompt: str | None = setting(None, "system message of those questions, as in training (task math)")
    instruction: str | None = setting(
        None, "text behind each of those questions, as in training (task math); none: asks for numbered steps"
    )
    threshold: float | None = setting(None, "probability from which a step is right; none: the calibrated one")
    output_file: str | None = setting(None, "JSON file of the figures; none: prm_evaluation.json beside the PRM")
    max_length: int | None = setting(None, "longest prompt and completion; none: the model's context length")
    max_tokens_per_micro_batch: int = setting(8192, "tokens of a packed batch")
    bf16: bool = setting(False, "run the trunk in bf16")
    device: str | None = setting(None, "cpu or cuda; none: cuda where there is one")

    def __post_init__(self) -> None:
        for key in ("prm", "data"):
            if not getattr(self, key):
                raise RunError(f"{key} is missing: give --{key}")
        for key in ("system_prompt", "instruction"):
            if getattr(self, key) is not None and self.task != "math":
                raise RunError(f"{key} is set, but task is {self.task}: it is of use with --task math only")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise RunError(f"threshold is {self.threshold}: give a probability from 0 to 1")


def eval_prm(settings: PRMEvaluation) -> dict:
    """The figures of each subset and their averages, also written as JSON."""
    console = Console(highlight=False)
    prm, tokenizer = load_prm_and_tokenizer(settings.prm, open_device(settings.device))
    if settings.threshold is None and not prm.calibrated:
        console.print("warning: this head could not be calibrated (docs/prm.md); the threshold is 0.5")
    threshold = float(prm.head.threshold) if settings.threshold is None else settings.threshold
    subsets, counts = _read(settings, prm, tokenizer, console)
    figures = {name: _evaluate(prm, rollouts, threshold, settings, console, name) for name, rollouts in subsets.items()}
    counts["first_error_unknown"] = sum(f["first_error_unknown"] for f in figures.values())
    result = {
        "prm": settings.prm, "data": settings.data, "threshold": threshold, "counts": counts, "subsets": figures,
        "average": {key: mean_over([f[key] for f in figures.values()]) for key in FIGURES},
    }  # fmt: skip
    path = Path(settings.output_file or Path(settings.prm) / "prm_evaluation.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    _show(result, console)
    console.print(f"figures  {path}", markup=False, soft_wrap=True)
    return result


def _read(
    settings: PRMEvaluation, prm: PRM, tokenizer: PreTrainedTokenizerBase, console: Console
) -> tuple[dict[str, list[Rollout]], dict[str, int]]:
    """Rollouts of each subset: a row's own `subset`, else its split, else "all"."""
    rows = defaultdict(list)
    complaints: list[str] = []
    notes: list[str] = []
    read = skipped = 0
    splits: list[str | None] = [s.strip() for s in settings.splits.split(",") if s.strip()]
    for split in splits or [None]:
        found = read_labelled(settings.data, format=settings.data_format, split=split, neutral=settings.data_neutral)
        complaints += found.complaints
        read += found.read
        skipped += found.skipped
        for row in found.rows:
            rows[row.get("subset") or split or "all"].append(row)
    longest = settings.max_length or prm.trunk.config.get_text_config().max_position_embeddings
    subsets = {}
    unusable: list[str] = []
    for name, group in rows.items():
        subsets[name], more = labelled_rollouts(
            asked_rows(group, settings, tokenizer), tokenizer, separator=settings.separator, max_length=longest,
            on_note=notes.append,
        )  # fmt: skip
        unusable += more
    say_complaints(console, complaints, "rows")
    say_complaints(console, unusable, "completions")
    for note in notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    every = [r for rollouts in subsets.values() for r in rollouts]
    return subsets, {
        "rows": read,
        "skipped_rows": skipped,
        "completions": len(every),
        "skipped_completions": sum(map(len, rows.values())) - len(every),
        "completions_cut": sum(not r.finished for r in every),
    }


def _evaluate(
    prm: PRM, rollouts: Sequence[Rollout], threshold: float, settings: PRMEvaluation, console: Console, name: str
) -> dict:
    scores: list[list[float]] = []
    with progress_bar(console, f"scoring {name}") as advance:
        for start in range(0, len(rollouts), GROUP):
            scores += prm.score(rollouts[start : start + GROUP], settings)
            advance(len(scores), len(rollouts))
    predicted = [first_error([int(p >= threshold) for p in row]) for row in scores]
    pairs = [(p, x) for row, r in zip(scores, rollouts, strict=True) for p, x in zip(row, r.step_labels, strict=True)]
    labelled = [(p, x == 1) for p, x in pairs if x != UNLABELLED]
    p_S, right_S = np.array([p for p, _ in labelled]), np.array([x for _, x in labelled], dtype=bool)
    return {
        **process_bench(predicted, [known_first_error(r) for r in rollouts]),
        "step_auroc": auroc(p_S, right_S), "right_steps": int(right_S.sum()), "wrong_steps": int((~right_S).sum()),
    }  # fmt: skip


def _show(result: dict, console: Console) -> None:
    counts = result["counts"]
    console.print(
        f"{counts['rows']} rows, {counts['skipped_rows']} skipped; {counts['completions']} completions, "
        f"{counts['skipped_completions']} skipped, {counts['completions_cut']} cut at max_length, "
        f"{counts['first_error_unknown']} whose labels do not tell the first error",
        markup=False,
        soft_wrap=True,
    )
    table = Table(title=f"first errors at threshold {result['threshold']:.3f}")
    for name in ("subset", "erroneous", "correct", "error acc.", "correct acc.", "F1", "step AUROC"):
        table.add_column(name, justify="left" if name == "subset" else "right")
    for name, f in result["subsets"].items():
        table.add_row(name, str(f["erroneous"]), str(f["correct"]), *(shown(f[key]) for key in FIGURES))
    table.add_row("average", "", "", *(shown(result["average"][key]) for key in FIGURES))
    console.print(table)


def main(argv: list[str]) -> int:
    """The command line."""
    return run_command(lambda: eval_prm(parse_settings(PRMEvaluation, argv, "stepkto_fast.eval_prm")))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
