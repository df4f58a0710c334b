"""Evaluation of M_t on held-out problems: greedy Pass@1, Maj@k, flawed right answers, and an audit of the PRM head."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .collect import Asked, check_sync, sample_rollouts
from .objective import log_probs
from .prm import PRM
from .prm_metrics import audit
from .recipe import Recipe
from .rollout import UNLABELLED, Rollout, write_table
from .run_directory import on_main
from .sampler import Sampler, no_progress
from .sampling_shards import weights_digest
from .segmentation import step_statistics
from .task import Task


def evaluate(
    sampler: Sampler, task: Task, policy: PreTrainedModel, initial: PreTrainedModel, prm: PRM | None,
    asked: Sequence[Asked], tokenizer: PreTrainedTokenizerBase, recipe: Recipe, *, iteration: int, seed: int,
    solutions: Path, shards: Path | None = None, on_progress: Callable[[int, int], None] = no_progress,
) -> tuple[dict, int]:  # fmt: skip
    """One entry of summary.json's `iterations`, and how many tokens were sampled for it.

    Greedy solutions go to the parquet file `solutions`; what is sampled is kept in shards under the folder `shards`
    until then. The head is audited (where the task judges steps exactly), the
    KL from M_0 estimated and the weight sync proven on the first sampled completion of each problem.
    """
    k, weights = recipe.num_eval_generations, weights_digest(policy)
    greedy = sample_rollouts(
        sampler, task, asked, tokenizer, recipe, n=1, temperature=0.0, seed=seed,
        folder=shards and shards / "greedy", weights=weights,
    )  # fmt: skip
    sampled = sample_rollouts(
        sampler, task, asked, tokenizer, recipe, n=k, temperature=recipe.temperature, seed=seed + 1,
        on_progress=on_progress, folder=shards and shards / "sampled", weights=weights,
    )  # fmt: skip
    firsts = sampled[::k]
    own, difference = check_sync(policy, firsts, recipe)
    drift = [float((p - q).sum()) for p, q in zip(own, log_probs(initial, firsts, recipe), strict=True)]
    head_view = audit_head(prm, firsts, recipe) if prm is not None and task.exact_steps else {}
    judge = judge_steps(greedy, task, prm, recipe)
    right, majority = right_samples(sampled, k), majority_hits(sampled, task, k)
    on_main(lambda: write_solutions(greedy, right, majority, task, asked, solutions))
    # Of one sample it would have the name of the greedy solutions' rate.
    any_right = {f"pass@{k}": sum(count > 0 for count in right) / len(asked)} if k > 1 else {}
    record = {
        "iteration": iteration,
        **solution_rates(greedy),
        f"maj@{k}": sum(majority) / len(asked),
        **any_right,
        "first_error_step": first_error_step(greedy),
        "prm_f1": head_view.get("f1"),
        "weight_sync_max_abs_logp_diff": difference,
        "steps_judged_by": judge,
        "unverified": sum(not r.verified for r in (*greedy, *sampled)),
        "truncated": sum(not r.finished for r in greedy) / len(greedy),
        "completion_length": sum(len(r.completion_ids) for r in greedy) / len(greedy),
        "kl_from_initial": sum(drift) / len(drift),
        "steps": step_statistics(greedy),
        "prm": head_view,
    }
    return record, sum(len(r.completion_ids) for r in (*greedy, *sampled))


def audit_head(prm: PRM, rollouts: Sequence[Rollout], recipe: Recipe) -> dict:
    """How well the head agrees with the exact checker on `rollouts`."""
    probabilities = [p for row in prm.score(rollouts, recipe) for p in row]
    return audit(probabilities, [x for r in rollouts for x in r.checker_labels], float(prm.head.threshold))


def judge_steps(rollouts: Sequence[Rollout], task: Task, prm: PRM | None, recipe: Recipe) -> str | None:
    """Fills step_probs and step_labels of solutions to be measured; returns who judged: checker, head, or nobody."""
    if prm is not None:
        for r, probabilities in zip(rollouts, prm.score(rollouts, recipe), strict=True):
            r.step_probs, r.step_labels = probabilities, prm.label(probabilities)
    if task.exact_steps or prm is None:
        for r in rollouts:
            r.step_labels = list(r.checker_labels)
    return "checker" if task.exact_steps else None if prm is None else "head"


def solution_rates(greedy: Sequence[Rollout]) -> dict[str, float | None]:
    """pass@1, flawed_correct (None when no right answer has judged steps) and step_accuracy of one completion a
    problem, by its step_labels."""
    flawed, judged = map(sum, zip(*map(flaw_counts, greedy), strict=True))
    right_steps, steps = map(sum, zip(*map(step_counts, greedy), strict=True))
    return {
        "pass@1": sum(r.label for r in greedy) / len(greedy),
        "flawed_correct": flawed / judged if judged else None,
        "step_accuracy": right_steps / steps if steps else None,
    }


def flaw_counts(r: Rollout) -> tuple[int, int]:
    """(1 if it has a wrong step, 1) of a right answer whose steps are judged, else (0, 0)."""
    judged = r.label and any(x != UNLABELLED for x in r.step_labels)
    return int(judged and 0 in r.step_labels), int(judged)


def step_counts(r: Rollout) -> tuple[int, int]:
    """How many of the solution's steps are right, and how many are judged."""
    return r.step_labels.count(1), sum(x != UNLABELLED for x in r.step_labels)


def first_error_step(greedy: Sequence[Rollout]) -> float | None:
    """The mean number of the first wrong step, counted from 1, among solutions that have one; None without any."""
    found = [r.step_labels.index(0) + 1 for r in greedy if 0 in r.step_labels]
    return sum(found) / len(found) if found else None


def right_samples(sampled: Sequence[Rollout], k: int) -> list[int]:
    """For each problem how many of its k samples are right."""
    return [sum(r.label for r in sampled[n : n + k]) for n in range(0, len(sampled), k)]


def majority_hits(sampled: Sequence[Rollout], task: Task, k: int) -> list[bool]:
    """For each problem whether the most frequent answer among its k samples is right (ties: the one sampled first)."""
    groups = [sampled[n : n + k] for n in range(0, len(sampled), k)]
    chosen = task.majority([[r.answer for r in group] for group in groups])
    return [n is not None and group[n].label for group, n in zip(groups, chosen, strict=True)]


def write_solutions(
    greedy: Sequence[Rollout], samples_right: Sequence[int], majority_right: Sequence[bool], task: Task,
    asked: Sequence[Asked], path: Path,
) -> None:  # fmt: skip
    """Greedy solutions as a parquet table for the report and for reading, one row a problem, with what
    `right_samples` and `majority_hits` say of the problem's samples."""
    rows = [
        {
            "problem_id": r.problem_id, "prompt": r.prompt, "answer": task.answer(a.problem),
            "completion": r.completion, "steps": r.steps, "label": r.label, "step_labels": r.step_labels,
            "step_probs": r.step_probs or None, "completion_tokens": len(r.completion_ids),
            "samples_right": right, "majority_right": majority,
        }
        for r, right, majority, a in zip(greedy, samples_right, majority_right, asked, strict=True)
    ]  # fmt: skip
    schema = pa.schema(
        {
            "problem_id": pa.int64(), "prompt": pa.string(), "answer": pa.string(), "completion": pa.string(),
            "steps": pa.list_(pa.string()), "label": pa.bool_(), "step_labels": pa.list_(pa.int8()),
            "step_probs": pa.list_(pa.float32()), "completion_tokens": pa.int32(),
            "samples_right": pa.int32(), "majority_right": pa.bool_(),
        }
    )  # fmt: skip
    write_table(pa.Table.from_pylist(rows, schema=schema), path)
