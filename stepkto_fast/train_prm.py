"""A PRM head from labelled steps: `python -m stepkto_fast.train_prm [file.yaml] --model DIR --data FILE_OR_NAME ...`.

Problems are split into three parts: one to fit the head on, one to calibrate it, one to measure it. Files, formats and
figures: docs/prm.md.
"""

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .atomic import replacing
from .command import open_device, progress_bar, run_command, say_complaints
from .errors import RunError
from .labelled import labelled_rollouts, read_labelled
from .policy import load_policy
from .prm import PRM, fit_prm
from .prm_export import export_token_classifier, require_exportable
from .prm_files import CONFIG, save_prm
from .prm_metrics import agreement, first_error, known_first_error, process_bench
from .rollout import UNLABELLED, Rollout
from .settings import parse_settings, setting
from .task import asked_rows


@dataclass
class PRMTraining:
    """Settings of train_prm. Shares are fractions of 1, lengths in tokens."""

    model: str = setting("", "model whose hidden states the head reads: a directory or a hub name")
    data: str = setting("", "completions with labelled steps: a file, a folder or a hub name")
    data_format: Literal["auto", "stepwise", "unpaired", "prm800k", "math_shepherd", "processbench"] = setting(
        "auto", "format of data (docs/data.md)"
    )
    data_split: str | None = setting(None, "split of data")
    data_neutral: Literal["correct", "incorrect", "unlabelled"] = setting("correct", "what PRM800K's rating 0 means")
    separator: str = setting("\n", "text between two steps of a row")
    task: Literal["arithmetic", "math"] = setting(
        "arithmetic", "arithmetic: prompts stay as they are; math: bare questions are asked as the math task asks them"
    )
    system_prompt: str | None = setting(None, "system message of those questions, as in the run (task math)")
    instruction: str | None = setting(
        None, "text behind each of those questions, as in the run (task math); none: asks for numbered steps"
    )
    output_dir: str = setting("runs/prm", "where head, settings and metrics go; the model's directory is a good place")
    overwrite: bool = setting(False, "replace a PRM that is already in output_dir")
    export: str | None = setting(None, "directory for a token-classification model too (prm_pooling: last)")
    seed: int = setting(0, "seed of the split, the head's first weights and the order")
    calibration_share: float = setting(0.1, "share of the problems that the head is calibrated on")
    test_share: float = setting(0.1, "share of the problems that it is measured on")
    max_length: int | None = setting(None, "longest prompt and completion; none: the model's context length")
    prm_pooling: Literal["attention", "last"] = setting(
        "attention", "attention: over the step's tokens; last: a linear layer on its last token's hidden state"
    )
    prm_trunk: Literal["policy", "trained"] = setting(
        "policy", "policy: the model stays as it is; trained: the head's gradient trains a copy of it"
    )
    prm_class_weights: Literal["balanced", "none"] = setting(
        "balanced", "balanced: right and wrong steps weigh the same in the head's loss"
    )
    prm_epochs: int = setting(4, "passes over the part that the head is fitted on")
    prm_learning_rate: float = setting(2e-3, "peak learning rate of the head")
    prm_trunk_learning_rate: float = setting(1e-5, "peak learning rate of the trunk (prm_trunk: trained)")
    temperature: float = setting(1.0, "of the log-probs that the head reads (prm_pooling: attention)")
    max_tokens_per_micro_batch: int = setting(8192, "tokens of a packed batch when steps are scored")
    bf16: bool = setting(False, "run the trunk in bf16 (weights and optimizer stay fp32)")
    device: str | None = setting(None, "cpu or cuda; none: cuda where there is one")

    def __post_init__(self) -> None:
        for key in ("model", "data"):
            if not getattr(self, key):
                raise RunError(f"{key} is missing: give --{key}")
        for key in ("system_prompt", "instruction"):
            if getattr(self, key) is not None and self.task != "math":
                raise RunError(f"{key} is set, but task is {self.task}: it is of use with --task math only")
        for key in ("prm_epochs", "max_tokens_per_micro_batch"):
            if getattr(self, key) < 1:
                raise RunError(f"{key} is {getattr(self, key)}: give at least 1")
        for key in ("prm_learning_rate", "prm_trunk_learning_rate", "temperature"):
            if not getattr(self, key) > 0:
                raise RunError(f"{key} is {getattr(self, key)}: give a positive one")
        for key in ("calibration_share", "test_share"):
            if not 0 < getattr(self, key) <= 0.4:
                raise RunError(f"{key} is {getattr(self, key)}: give a share above 0, at most 0.4")
        if self.export is not None:
            require_exportable(self.prm_pooling)
        if (Path(self.output_dir) / CONFIG).exists() and not self.overwrite:
            raise RunError(
                f"output_dir {self.output_dir!r} already holds a PRM: replace it with --overwrite true, or choose "
                "another directory"
            )


def train_prm(settings: PRMTraining) -> dict:
    """Fits, measures and saves a PRM; returns what metrics.json holds."""
    console = Console(highlight=False)
    device = open_device(settings.device)
    policy, tokenizer = load_policy(settings.model)
    policy.to(device).eval()
    rollouts, counts = _read(settings, policy, tokenizer, console)
    parts = split_problems(rollouts, settings)
    fitting, calibrating, held_out = parts
    _require_both_classes(parts)
    with progress_bar(console, "fitting the PRM head") as advance:
        prm = fit_prm(
            policy, fitting, calibrating, settings, settings.seed, copy_trunk=False,
            on_step=lambda step, total, loss: advance(step, total, f"loss {loss:.3f}"),
        )  # fmt: skip
    metrics = {"counts": counts, **_measure(prm, held_out, settings), "settings": asdict(settings)}
    folder = Path(settings.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    same_place = Path(settings.model).resolve() == folder.resolve()
    save_prm(prm, folder, tokenizer, beside=policy if same_place and settings.prm_trunk == "policy" else None)
    with replacing(folder / "metrics.json") as unfinished:
        unfinished.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    _show(metrics, console)
    console.print(f"PRM      {folder / CONFIG}\nmetrics  {folder / 'metrics.json'}", markup=False, soft_wrap=True)
    if settings.export is not None:
        export_token_classifier(prm, tokenizer, Path(settings.export))
        console.print(f"export   {settings.export}", markup=False, soft_wrap=True)
    return metrics


def _read(
    settings: PRMTraining, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, console: Console
) -> tuple[list[Rollout], dict[str, int]]:
    found = read_labelled(
        settings.data, format=settings.data_format, split=settings.data_split, neutral=settings.data_neutral
    )
    notes: list[str] = []
    with progress_bar(console, "tokenising") as advance:
        rollouts, complaints = labelled_rollouts(
            asked_rows(found.rows, settings, tokenizer), tokenizer, separator=settings.separator,
            max_length=settings.max_length or policy.config.get_text_config().max_position_embeddings,
            on_progress=advance, on_note=notes.append,
        )  # fmt: skip
    say_complaints(console, found.complaints, "rows")
    say_complaints(console, complaints, "completions")
    for note in notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    labels = [x for r in rollouts for x in r.step_labels]
    return rollouts, {
        "rows": found.read,
        "skipped_rows": found.skipped,
        "completions": len(rollouts),
        "skipped_completions": len(found.rows) - len(rollouts),
        "completions_without_labels": sum(set(r.step_labels) <= {UNLABELLED} for r in rollouts),
        "completions_cut": sum(not r.finished for r in rollouts),
        "right_steps": labels.count(1),
        "wrong_steps": labels.count(0),
        "unlabelled_steps": labels.count(UNLABELLED),
    }


def split_problems(rollouts: Sequence[Rollout], settings: PRMTraining) -> tuple[list[Rollout], ...]:
    """The rollouts with labelled steps in three parts (fit, calibrate, measure); no problem is in two of them."""
    rollouts = [r for r in rollouts if set(r.step_labels) - {UNLABELLED}]
    problems = sorted({r.problem_id for r in rollouts})
    if len(problems) < 10:
        raise RunError(f"{settings.data!r} has labelled steps for {len(problems)} different prompts: give at least 10")
    random.Random(f"split {settings.seed}").shuffle(problems)
    calibrate = round(settings.calibration_share * len(problems)) or 1
    measure = round(settings.test_share * len(problems)) or 1
    part = {p: 1 if n < calibrate else 2 if n < calibrate + measure else 0 for n, p in enumerate(problems)}
    return tuple([r for r in rollouts if part[r.problem_id] == k] for k in range(3))


def _require_both_classes(parts: Sequence[Sequence[Rollout]]) -> None:
    for name, share, part in zip(
        ("fitted", "calibrated", "measured"), ("data", "calibration_share", "test_share"), parts, strict=True
    ):
        labels = [x for r in part for x in r.step_labels]
        if not (labels.count(0) and labels.count(1)):
            raise RunError(
                f"the part that the head is {name} on ({len(part)} completions) has {labels.count(1)} right and "
                f"{labels.count(0)} wrong steps, and needs both: give more {share}, or another seed"
            )


def _measure(prm: PRM, held_out: Sequence[Rollout], settings: PRMTraining) -> dict:
    scores = prm.score(held_out, settings)
    return {
        "held_out": agreement(
            [p for row in scores for p in row], [x for r in held_out for x in r.step_labels], float(prm.head.threshold)
        ),
        "held_out_first_errors": process_bench(
            [first_error(prm.label(row)) for row in scores], [known_first_error(r) for r in held_out]
        ),
    }


def _show(metrics: dict, console: Console) -> None:
    counts, view, errors = metrics["counts"], metrics["held_out"], metrics["held_out_first_errors"]
    console.print(
        f"{counts['rows']} rows, {counts['skipped_rows']} skipped; {counts['completions']} completions, "
        f"{counts['skipped_completions']} skipped, {counts['completions_without_labels']} without labels, "
        f"{counts['completions_cut']} cut at max_length; {counts['right_steps']} right steps, "
        f"{counts['wrong_steps']} wrong ones, {counts['unlabelled_steps']} without a label",
        markup=False,
        soft_wrap=True,
    )
    table = Table(title=f"held-out problems: {view['right_steps']} right and {view['wrong_steps']} wrong steps")
    for name in ("figure", "head", "majority class"):
        table.add_column(name, justify="left" if name == "figure" else "right")
    names = {
        "f1": "F1 of wrong steps", "precision": "precision", "recall": "recall", "auroc": "AUROC",
        "balanced_accuracy": "balanced accuracy", "mcc": "Matthews' correlation", "accuracy": "accuracy",
        "ece": "calibration error",
    }  # fmt: skip
    for key, name in names.items():
        table.add_row(name, shown(view[key]), shown(view["majority"][key]) if key in view["majority"] else "")
    for key in ("error_accuracy", "correct_accuracy", "f1"):
        table.add_row(f"first error: {key.replace('_', ' ')}", shown(errors[key]), "")
    console.print(table)
    bins = Table(title=f"reliability (threshold {view['threshold']:.3f})")
    for name in ("said right", "are right", "steps"):
        bins.add_column(name, justify="right")
    for b in view["bins"]:
        bins.add_row(f"{b['probability']:.1%}", f"{b['correct']:.1%}", str(b["count"]))
    console.print(bins)


def shown(value: float | None) -> str:
    """A figure for a table."""
    return "-" if value is None else f"{value:.3f}"


def main(argv: list[str]) -> int:
    """The command line."""
    return run_command(lambda: train_prm(parse_settings(PRMTraining, argv, "stepkto_fast.train_prm")))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
