"""Watchdogs: what looks wrong in a run, as sentences with the number, the limit, the likely cause and the remedy.

`recipe.watch` says what follows: warn, stop, or off. A loss or gradient that is not finite stops the run in any case.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from . import ranks
from .baselines import units
from .errors import RunError, TrainingError
from .objective import BatchResult, accumulate_gradients
from .recipe import Recipe
from .rollout import UNLABELLED, Rollout, write_rollouts
from .run_directory import Progress, RunDirectory, on_main

ABOVE_ZERO = 1e-3  # nats by which rounding may lift a log-prob above 0
NAMED = 5  # completions that a message names
SINGLES = 256  # completions (or pairs) whose gradients are taken one by one, at most, to find one that is not finite


def act(warnings: Sequence[str], recipe: Recipe, say: Callable[[str], None]) -> None:
    """Says the warnings, or raises them as one RunError (`watch: stop`), or neither (`watch: off`)."""
    if recipe.watch == "off" or not warnings:
        return
    if recipe.watch == "stop":
        raise RunError(
            f"{'. '.join(warnings)}. Stopped, as watch is stop; what was written stays, and --resume true with --watch "
            "warn goes on from there"
        )
    for warning in warnings:
        say(f"warning: {warning}")


def same_outcomes(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """TRL's frac_reward_zero_std: the share of prompts whose completions all have the same outcome, among those with
    at least two; empty where there is none."""
    groups: dict[int, list[bool]] = {}
    for r in rollouts:
        groups.setdefault(r.problem_id, []).append(r.label)
    several = [labels for labels in groups.values() if len(labels) > 1]
    return {"frac_reward_zero_std": sum(len(set(x)) == 1 for x in several) / len(several)} if several else {}


def watch_rollouts(rollouts: Sequence[Rollout], recipe: Recipe) -> list[str]:
    """Of an iteration's labelled rollouts: outcomes all the same, step labels of one class, log-probs above 0."""
    found = []
    outcomes = {r.label for r in rollouts}
    all_right = outcomes == {True}
    if len(rollouts) > 1 and len(outcomes) == 1 and not (all_right and recipe.objective == "rft"):
        found.append(
            f"all {len(rollouts)} completions are {'right' if all_right else 'wrong'} (limit: not all the same): "
            "nothing tells right from wrong. The problems are too "
            f"{'easy' if all_right else 'hard'} for the model, or its answers are not found where they are looked for: "
            "read some in rollouts/, then give other problems or another instruction"
        )
    labels = [x for r in rollouts for x in r.step_labels if x != UNLABELLED]
    learns_steps = recipe.objective == "step_kto" and recipe.step_weight > 0
    if learns_steps and not labels:
        found.append(
            "no step has a label (limit: some): there is no step loss. Continuations could not be compared, or the "
            "sources of consensus never agree: set label_source to another one, or step_weight to 0"
        )
    elif learns_steps and len(labels) > 1 and len(set(labels)) == 1:
        cause = (
            "The PRM head may be of other data than the problems, or its threshold at an end: look at prm/* in "
            "metrics.jsonl and at the steps in rollouts/, fit it on more (prm_seed_problems), or set label_source to "
            "another one"
            if recipe.label_source in ("head", "consensus")
            else f"The problems may be too {'easy' if labels[0] else 'hard'} for the model: give others, or set "
            "label_source to another one"
        )
        found.append(
            f"all {len(labels)} step labels are {'right' if labels[0] else 'wrong'} (limit: not all the same): the "
            f"step loss has nothing to compare. {cause}"
        )
    above = [(logp, r) for r in rollouts for logp in r.logps if not logp <= ABOVE_ZERO]
    if above:
        logp, r = max(above, key=lambda pair: (math.isnan(pair[0]), pair[0]))
        found.append(
            f"{len(above)} log-probs of the engine are above 0 or no number, up to {logp:.3g} nats, in {_name(r)} "
            f"(limit {ABOVE_ZERO:g}): no probability is above 1. The engine returns scores before the "
            "softmax, or overflows at this precision: set bf16 to false, or engine to transformers"
        )
    return found


def watch_step(result: BatchResult, batch: Sequence[Rollout], recipe: Recipe) -> list[str]:
    """Of one optimizer batch before the step: completions that the policy has moved far away from the reference on."""
    ratios = result.log_ratios.double().tolist()
    far = sorted(
        ((ratio, r) for ratio, r in zip(ratios, batch, strict=True) if not abs(ratio) <= recipe.watch_log_ratio),
        key=lambda pair: (math.isfinite(pair[0]), -abs(pair[0])),
    )
    if not far:
        return []
    named = ", ".join(f"{ratio:+.3g} on {_name(r)}" for ratio, r in far[:NAMED])
    or_beta = "" if recipe.objective == "rft" else ", or raise beta"
    return [
        f"log-ratios of {len(far)} of {len(batch)} completions are beyond {recipe.watch_log_ratio:g} nats "
        f"(watch_log_ratio): {named}. The policy runs away from the reference: lower learning_rate or "
        f"max_grad_norm{or_beta}; long completions may need a higher limit"
    ]


def watch_evaluation(record: dict[str, Any], recipe: Recipe) -> list[str]:
    """Of an evaluation's record: the KL from M_0."""
    kl = record["kl_from_initial"]
    if kl <= recipe.watch_kl:
        return []
    return [
        f"M_{record['iteration']} is {kl:.3g} nats a completion away from M_0 (KL; limit {recipe.watch_kl:g}, "
        "watch_kl): it may have unlearned what it is not trained on. Lower learning_rate, raise beta, or set reference "
        "to initial; long completions may need a higher limit"
    ]


# ---- losses and gradients that are not finite ----


def stop_on_nonfinite(
    policy: PreTrainedModel, result: BatchResult, norm: float, batch: Sequence[Rollout], recipe: Recipe,
    weights: dict[str, Any], points: tuple[float, float], run: RunDirectory, progress: Progress,
) -> NoReturn:  # fmt: skip
    """Saves the batch and raises a RunError that names the sequences to blame. Clears the policy's gradients.

    Under ranks every one calls it, with the same batch.
    """
    bad, how = offenders(policy, result, batch, recipe, weights, points)
    path = run.path / f"nonfinite_iteration_{progress.iteration}_step_{progress.step}.parquet"
    on_main(lambda: write_rollouts(list(batch), path))
    names = ", ".join(map(_name, bad[:NAMED])) + (f" and {len(bad) - NAMED} more" if len(bad) > NAMED else "")
    if len(bad) == len(batch) > 1:
        names = f"all {len(bad)}, so the weights have diverged rather than a sequence"
    raise TrainingError(
        f"loss {result.loss} and gradient norm {norm} in iteration {progress.iteration}, step {progress.step}: stopped "
        f"before the optimizer moved. {how}: {names or 'none alone, only their sum'}. The batch is in {path}; continue "
        "from the last checkpoint with --resume true and a lower --learning_rate"
    )


def offenders(
    policy: PreTrainedModel, result: BatchResult, batch: Sequence[Rollout], recipe: Recipe,
    weights: dict[str, Any], points: tuple[float, float],
) -> tuple[list[Rollout], str]:  # fmt: skip
    """The completions whose log-ratios are not finite; where there is none, those whose gradient alone (for DPO that of
    their pair) is not.

    With what was looked at. Leaves the policy without gradients; takes a backward for each of at most SINGLES.
    """
    pairs = zip(batch, result.log_ratios.tolist(), strict=True)
    bad = [r for r, ratio in pairs if not math.isfinite(ratio)]
    policy.zero_grad()
    if bad:
        return bad, "Log-ratios that are not finite"
    every = units(batch, recipe)
    for unit in every[:SINGLES]:
        policy.zero_grad()
        alone = accumulate_gradients(policy, unit.rollouts, recipe, weights, points)
        if not (math.isfinite(alone.loss) and _finite_gradients(policy)):
            bad += unit.rollouts
    policy.zero_grad()
    one, several = (" pair", " pairs") if recipe.objective == "dpo" else ("", "")
    part = f"the first {SINGLES} of {len(every)}{several}" if len(every) > SINGLES else f"each{one}"
    return bad, f"Log-ratios are finite. Gradients that are not, of {part} alone"


def _finite_gradients(policy: PreTrainedModel) -> bool:
    """Whether all gradients are finite, on every rank."""
    grads = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in policy.parameters()]
    return all(ranks.gather(all(bool(torch.isfinite(g).all()) for g in grads if g is not None)))


def _name(r: Rollout) -> str:
    return f"problem {r.problem_id} sample {r.sample}"
