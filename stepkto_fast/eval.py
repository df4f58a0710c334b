"""Evaluation of any model: `python -m stepkto_fast.eval [file.yaml] --model DIR [--key value ...]`.

Greedy solutions and `num_eval_generations` samples of the held-out problems, judged by the task: rates with bootstrap
intervals over problems, as a table and as eval.json in `output_dir`, beside the solutions (greedy.parquet,
samples.parquet). The keys are those of training, so that a recipe or a run's config.yaml serves; what only training
reads is not looked at.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from .atomic import replacing
from .collect import ask, sample_rollouts
from .command import open_device, progress_bar, run_command, say_complaints
from .errors import RunError
from .estimators import bootstrap, mean, pass_at_k, ratio
from .evaluation import flaw_counts, judge_steps, majority_hits, right_samples, step_counts, write_solutions
from .policy import load_policy
from .prm import PRM
from .prm_files import HEAD, load_prm
from .recipe import Recipe
from .rollout import Rollout, write_rollouts
from .sampler import open_sampler, require_engine
from .segmentation import step_statistics, step_style, style_warning
from .settings import parse_settings, setting
from .setup_run import derived_seed
from .task import Task, open_task

RESULTS = "eval.json"
LEVEL = 0.95  # of the intervals
TRUNCATED = 0.2  # share of greedy solutions from which a word is said about it


@dataclass
class EvalSettings(Recipe):
    """The settings of training, with another place for the results."""

    output_dir: str = setting("", "folder of the results; empty: runs/eval/MODEL/PROBLEMS")

    def folder(self) -> Path:
        """Where the results go."""
        model = "-".join(Path(self.model or "").resolve().parts[-2:])
        problems = Path(self.test_dataset).name if self.test_dataset else self.task
        return Path(self.output_dir or Path("runs", "eval", model, problems))


@dataclass(frozen=True)
class Metric:
    """A rate over problems. `values`: (problems,) for `mean`, (problems, 2) for `ratio`."""

    title: str
    values: NDArray
    statistic: Callable[[NDArray], NDArray]

    def result(self, seed: int) -> dict[str, float | None]:
        """The value and its interval; None where there is none (a ratio whose denominator is 0)."""
        low, high = bootstrap(self.values, self.statistic, seed=seed, level=LEVEL)
        found = {"value": float(self.statistic(self.values)), "low": low, "high": high}
        return {name: None if math.isnan(x) else x for name, x in found.items()}


def evaluate_model(settings: EvalSettings) -> dict:
    """Evaluates `settings.model` and returns what eval.json holds. Raises RunError for what the user can mend."""
    if settings.model is None:
        raise RunError("model is not set: give --model, a directory that save_pretrained wrote or a hub name")
    results = settings.folder() / RESULTS
    if results.exists() and not settings.overwrite:
        raise RunError(f"{results} exists: --overwrite true replaces it, --output_dir writes elsewhere")
    # What can be wrong is found out before a model is loaded.
    step_style(settings.step_style, settings.step_pattern)
    require_engine(settings)
    with closing(open_task(settings)) as task:
        return _evaluate(settings, task, settings.model, Console(highlight=False))


def _evaluate(settings: EvalSettings, task: Task, model: str, console: Console) -> dict:
    start, folder, k = time.monotonic(), settings.folder(), settings.num_eval_generations
    device = open_device(settings.device)
    problems, complaints = task.held_out()
    say_complaints(console, complaints, "rows")
    policy, tokenizer = load_policy(model)
    if require_engine(settings) == "transformers":  # vLLM loads the weights itself
        policy.to(device)
    policy.eval()
    asked, unusable = ask(task, problems, tokenizer, policy, settings)
    say_complaints(console, unusable, "prompts")
    prm, why_not_judged = open_prm(settings, task, device, tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    sampler = open_sampler(settings, policy, tokenizer, Path(model), folder / "engine.log")
    with progress_bar(console, "greedy solutions") as advance:
        greedy = sample_rollouts(
            sampler, task, asked, tokenizer, settings, n=1, temperature=0.0, seed=derived_seed(settings, "greedy"),
            on_progress=advance,
        )  # fmt: skip
    with progress_bar(console, f"{k} samples of each problem") as advance:
        sampled = sample_rollouts(
            sampler, task, asked, tokenizer, settings, n=k, temperature=settings.temperature,
            seed=derived_seed(settings, "samples"), on_progress=advance,
        )  # fmt: skip
    judge = judge_steps(greedy, task, prm, settings)
    right, majority = right_samples(sampled, k), majority_hits(sampled, task, k)
    write_solutions(greedy, right, majority, task, asked, folder / "greedy.parquet")
    write_rollouts(sampled, folder / "samples.parquet")
    metrics = rates(greedy, right, majority, k)
    found = {
        "model": model,
        "task": task.name,
        "test_dataset": settings.test_dataset,
        "engine": sampler.name,
        "problems": len(asked),
        "skipped_rows": len(complaints),
        "skipped_prompts": len(unusable),
        "interval_level": LEVEL,
        "metrics": {name: metric.result(derived_seed(settings, "bootstrap")) for name, metric in metrics.items()},
        "steps_judged_by": judge,
        "steps_not_judged_because": why_not_judged,
        "greedy": summary(greedy),
        "samples": {"per_problem": k, "temperature": settings.temperature, **summary(sampled)},
        "seconds": time.monotonic() - start,
        "settings": asdict(settings),
    }
    with replacing(folder / RESULTS) as unfinished:
        unfinished.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    _show(found, {name: metric.title for name, metric in metrics.items()}, settings, console)
    console.print(f"results  {folder / RESULTS}", markup=False, soft_wrap=True)
    return found


def open_prm(
    settings: EvalSettings, task: Task, device: torch.device, tokenizer: PreTrainedTokenizerBase
) -> tuple[PRM | None, str | None]:
    """The PRM of `prm`, or the one beside the model, where the task judges no steps itself; or why there is none."""
    if task.exact_steps:
        return None, None
    if settings.prm is not None:
        return load_prm(settings.prm, device, tokenizer), None
    if settings.model is not None and (Path(settings.model) / HEAD).is_file():
        return load_prm(settings.model, device, tokenizer), None
    return None, f"task {task.name} has no exact checker of steps and no PRM lies beside {settings.model}: set prm"


def rates(greedy: Sequence[Rollout], right: Sequence[int], majority: Sequence[bool], k: int) -> dict[str, Metric]:
    """What is measured, from a greedy solution of each problem, how many of its k samples are right, and whether the
    answer of most of them is, in the problems' order."""

    def average(title: str, values: Sequence[float]) -> Metric:
        return Metric(title, np.array(values, dtype=float), mean)

    def share(title: str, counts: Sequence[tuple[int, int]]) -> Metric:
        return Metric(title, np.array(counts, dtype=float), ratio)

    sizes = sorted({1 << n for n in range(k.bit_length())} | {k})
    return {
        "greedy_pass@1": average("Pass@1 of greedy solutions", [r.label for r in greedy]),
        **{f"pass@{n}": average(f"Pass@{n} from {k} samples", [pass_at_k(k, c, n) for c in right]) for n in sizes},
        f"maj@{k}": average(f"Maj@{k}", majority),
        "flawed_correct": share("right answers with a wrong step", [flaw_counts(r) for r in greedy]),
        "step_accuracy": share("right steps", [step_counts(r) for r in greedy]),
    }


def summary(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """Shares of the completions that were cut and that hold no answer, how many answers could not be compared, mean
    length in tokens, and statistics of steps."""
    return {
        "truncated": sum(not r.finished for r in rollouts) / len(rollouts),
        "without_answer": sum(r.answer is None for r in rollouts) / len(rollouts),
        "unverified": sum(not r.verified for r in rollouts),
        "completion_length": sum(len(r.completion_ids) for r in rollouts) / len(rollouts),
        "steps": step_statistics(rollouts),
    }


def _show(found: dict, titles: dict[str, str], settings: EvalSettings, console: Console) -> None:
    table = Table(title=f"{found['model']}: {found['problems']} problems of {found['test_dataset'] or found['task']}")
    for column in ("rate", "value", f"{LEVEL:.0%} interval"):
        table.add_column(column, justify="left" if column == "rate" else "right")
    for name, result in found["metrics"].items():
        value, low, high = ("-" if x is None else f"{x:.1%}" for x in result.values())
        table.add_row(titles[name], value, "-" if low == "-" else f"{low} to {high}")
    console.print(table)
    for name in ("greedy", "samples"):
        one = found[name]
        steps = one["steps"]["steps_mean"]
        console.print(
            f"{name}: {one['truncated']:.1%} truncated, {one['without_answer']:.1%} without answer, "
            f"{one['unverified']} unverified, {one['completion_length']:.0f} tokens and "
            f"{0 if steps is None else steps:.1f} steps on average",
            markup=False,
            soft_wrap=True,
        )
    if why := found["steps_not_judged_because"]:
        console.print(f"steps are not judged: {why}", markup=False, soft_wrap=True)
    if found["greedy"]["truncated"] > TRUNCATED:
        console.print(
            f"warning: {found['greedy']['truncated']:.0%} of the greedy solutions are cut at max_completion_length "
            f"({settings.max_completion_length} tokens) and count as they stand: raise it",
            markup=False,
            soft_wrap=True,
        )
    if warning := style_warning(found["samples"]["steps"], settings.step_style):
        console.print(f"warning: {warning}", markup=False, soft_wrap=True)


def main(argv: list[str]) -> int:
    """The command line."""
    return run_command(lambda: evaluate_model(parse_settings(EvalSettings, argv, "stepkto_fast.eval")))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
