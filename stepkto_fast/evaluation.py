"""Evaluation of M_t on held-out problems: greedy Pass@1, Maj@k, flawed right answers, and an audit of the PRM head."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .collect import Asked, check_sync, sample_rollouts
from .objective import log_probs
from .prm import PRM, audit
from .recipe import Recipe
from .rollout import Rollout, write_table
from .sampler import Sampler, no_progress
from .tasks import arithmetic


def evaluate(
    sampler: Sampler, policy: PreTrainedModel, initial: PreTrainedModel, prm: PRM, asked: Sequence[Asked],
    tokenizer: PreTrainedTokenizerBase, recipe: Recipe, *, iteration: int, seed: int, solutions: Path,
    on_progress: Callable[[int, int], None] = no_progress,
) -> tuple[dict, int]:  # fmt: skip
    """One entry of summary.json's `iterations`, and how many tokens were sampled for it.

    Greedy solutions go to the parquet file `solutions`. The head is audited, the KL from M_0 estimated and the weight
    sync proven on the first sampled completion of each problem.
    """
    greedy = sample_rollouts(sampler, asked, tokenizer, recipe, n=1, temperature=0.0, seed=seed)
    k = recipe.num_eval_generations
    sampled = sample_rollouts(
        sampler, asked, tokenizer, recipe, n=k, temperature=recipe.temperature, seed=seed + 1, on_progress=on_progress
    )
    firsts = sampled[::k]
    own, difference = check_sync(policy, firsts, recipe)
    drift = [float((p - q).sum()) for p, q in zip(own, log_probs(initial, firsts, recipe), strict=True)]
    head_view = audit(
        [p for row in prm.score(firsts, recipe) for p in row],
        [x for r in firsts for x in r.checker_labels],
        float(prm.head.threshold),
    )
    for r, probabilities in zip(greedy, prm.score(greedy, recipe), strict=True):
        r.step_probs = probabilities
    write_solutions(greedy, asked, solutions)
    record = {
        "iteration": iteration,
        **solution_rates(greedy),
        f"maj@{k}": majority_rate(sampled, asked, k),
        "prm_f1": head_view["f1"],
        "weight_sync_max_abs_logp_diff": difference,
        "completion_length": sum(len(r.completion_ids) for r in greedy) / len(greedy),
        "kl_from_initial": sum(drift) / len(drift),
        "prm": head_view,
    }
    return record, sum(len(r.completion_ids) for r in (*greedy, *sampled))


def solution_rates(greedy: Sequence[Rollout]) -> dict[str, float | None]:
    """pass@1, flawed_correct (None when no answer is right) and step_accuracy of one completion a problem."""
    right = [r for r in greedy if r.label]
    steps = [x for r in greedy for x in r.checker_labels]
    return {
        "pass@1": len(right) / len(greedy),
        "flawed_correct": sum(0 in r.checker_labels for r in right) / len(right) if right else None,
        "step_accuracy": sum(steps) / len(steps) if steps else None,
    }


def majority_rate(sampled: Sequence[Rollout], asked: Sequence[Asked], k: int) -> float:
    """Share of problems whose most frequent boxed answer among k samples is right (ties: the one sampled first)."""
    hits = 0
    for n, a in enumerate(asked):
        answers = [arithmetic.boxed_answer(r.completion) for r in sampled[n * k : (n + 1) * k]]
        votes = Counter(x for x in answers if x is not None).most_common(1)
        hits += bool(votes) and votes[0][0] == str(a.problem.answer)
    return hits / len(asked)


def write_solutions(greedy: Sequence[Rollout], asked: Sequence[Asked], path: Path) -> None:
    """Greedy solutions as a parquet table for the report and for reading."""
    rows = [
        {
            "problem_id": r.problem_id, "prompt": r.prompt, "answer": str(a.problem.answer), "completion": r.completion,
            "steps": r.steps, "label": r.label, "step_labels": r.checker_labels, "step_probs": r.step_probs,
            "completion_tokens": len(r.completion_ids),
        }
        for r, a in zip(greedy, asked, strict=True)
    ]  # fmt: skip
    schema = pa.schema(
        {
            "problem_id": pa.int64(), "prompt": pa.string(), "answer": pa.string(), "completion": pa.string(),
            "steps": pa.list_(pa.string()), "label": pa.bool_(), "step_labels": pa.list_(pa.int8()),
            "step_probs": pa.list_(pa.float32()), "completion_tokens": pa.int32(),
        }
    )  # fmt: skip
    write_table(pa.Table.from_pylist(rows, schema=schema), path)
