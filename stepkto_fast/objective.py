"""The objective over packed micro-batches: class weights, reference points, and one accumulated gradient.

Under several ranks everything here takes the same rollouts on every rank, splits them by tokens, and gives the same
result on every rank, that of the whole list: all of them must call it. A rank with fewer micro-batches than the others
goes through the model with a single token instead, which counts nothing, so that the collectives of all ranks match.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from stepkto_kernels import (
    ReferencePoints,
    StepKTOOutput,
    linear_logp,
    linear_logp_kl,
    linear_step_kto,
    reference_points,
    step_kto,
)
from torch import Tensor
from transformers import PreTrainedModel

from .baselines import baseline_loss, count_terms, unit_size, units
from .packing import PackedBatch, micro_batches_of_ranks, pack
from .policy import head, hidden_states
from .ranks import gather, rank, size
from .recipe import Recipe
from .rollout import UNLABELLED, Rollout
from .sharding import is_sharded

LAG = 0.9  # decay of the lagged reference points
# What a rank without a micro-batch goes through the model with.
IDLE = Rollout(-1, 0, "", [0], "", [0], [], True, step_ends=[1])


def log_probs(model: PreTrainedModel, rollouts: Sequence[Rollout], recipe: Recipe) -> list[Tensor]:
    """For each rollout the log-probs (nats, fp32, on the CPU) that `model` gives its completion tokens."""

    def of_batch(batch: PackedBatch) -> Tensor:
        with autocast(model, recipe):
            return linear_logp(
                hidden_states(model, batch),
                target=batch.target,
                temperature=recipe.temperature,
                **head(model),
            )

    lengths = [len(r.completion_ids) for r in rollouts]
    return over_micro_batches(model, rollouts, recipe.max_tokens_per_micro_batch, of_batch, lengths)


@torch.no_grad()
def over_micro_batches(
    model: PreTrainedModel, rollouts: Sequence[Rollout], max_tokens: int, compute: Callable[[PackedBatch], Tensor],
    lengths: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """`compute`, which reads `model`, of all rollouts in packed micro-batches of `max_tokens`: for each rollout its
    `lengths` values (one a token, or a step) on the CPU."""
    found: list[Tensor] = []
    split = micro_batches_of_ranks(rollouts, size(), max_tokens)
    for group in split[rank()]:
        values = compute(_pack(rollouts, group, model))
        if group:
            found.append(values.cpu())
    return in_order(gather(_joined(found)), split, lengths)


def _pack(rollouts: Sequence[Rollout], group: list[int], model: PreTrainedModel) -> PackedBatch:
    return pack([rollouts[index] for index in group] or [IDLE]).to(model.device)


def _joined(values: list[Tensor]) -> Tensor | None:
    return torch.cat(values).cpu() if values else None


def in_order(values: Sequence[Tensor | None], split: list[list[list[int]]], lengths: Sequence[int]) -> list[Tensor]:
    """Each rank's packed `values`, cut at the `lengths` of its rollouts and put in the order of the rollouts.

    values: for each rank (its tokens or steps,), or None where `split`, of `micro_batches_of_ranks`, gives it nothing.
    """
    found: dict[int, Tensor] = {}
    for of_rank, groups in zip(values, split, strict=True):
        indices = [index for group in groups for index in group]
        if of_rank is not None:
            found |= zip(indices, of_rank.split([lengths[index] for index in indices]), strict=True)
    return [found[index] for index in range(len(lengths))]


def autocast(model: PreTrainedModel, recipe: Recipe) -> torch.autocast:
    """bf16 compute where the recipe asks for it; the weights stay fp32."""
    return torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=recipe.bf16)


def class_weights(rollouts: Sequence[Rollout], recipe: Recipe) -> dict[str, Any]:
    """The four class weights of the kernels' options.

    "balanced": right and wrong get the same total weight, 1 on average; a class that is alone keeps weight 1.
    """
    names = ("desirable_weight", "undesirable_weight", "step_desirable_weight", "step_undesirable_weight")
    if recipe.class_weights == "none":
        return {name: getattr(recipe, name) for name in names}
    labels = [r.label for r in rollouts]
    steps = [x for r in rollouts for x in seen_labels(r.step_labels, recipe.after_first_error)]
    balanced = (*balance(sum(labels), len(labels) - sum(labels)), *balance(steps.count(1), steps.count(0)))
    return dict(zip(names, balanced, strict=True))


def balance(right: int, wrong: int) -> tuple[float, float]:
    """Weights of right and wrong with the same total each, 1 on average; 1 and 1 where a class is alone."""
    if not right or not wrong:
        return 1.0, 1.0
    return (right + wrong) / (2 * right), (right + wrong) / (2 * wrong)


def seen_labels(step_labels: Sequence[int], after_first_error: str) -> list[int]:
    """The step labels that the loss sees: with "mask", those behind the first wrong step become unlabelled."""
    labels = list(step_labels)
    if after_first_error == "mask" and 0 in labels:
        first = labels.index(0)
        labels[first + 1 :] = [UNLABELLED] * (len(labels) - first - 1)
    return labels


@dataclass
class LaggedPoints:
    """Moving averages (outcome, step) of earlier batches' mean log-ratios, in nats; they start at 0."""

    outcome: float = 0.0
    step: float = 0.0

    def update(self, outcome: float, step: float) -> None:
        self.outcome = LAG * self.outcome + (1 - LAG) * outcome
        self.step = LAG * self.step + (1 - LAG) * step


@torch.no_grad()
def estimate_points(
    policy: PreTrainedModel,
    reference: PreTrainedModel | None,
    rollouts: Sequence[Rollout],
    recipe: Recipe,
    lagged: LaggedPoints,
    seed: int,
) -> tuple[float, float]:
    """Unclamped (z, z_s) for one optimizer batch, by the recipe's estimator. Averages first; the caller clamps."""
    if recipe.reference_points == "zero":
        return 0.0, 0.0
    if recipe.reference_points == "lagged":
        return lagged.outcome, lagged.step
    assert reference is not None
    pairs = rollouts if recipe.reference_points == "exact" else mismatch(rollouts, seed)
    parts: list[ReferencePoints] = []
    for group in micro_batches_of_ranks(pairs, size(), recipe.max_tokens_per_micro_batch)[rank()]:
        batch = _pack(pairs, group, policy)
        with autocast(policy, recipe):
            states, ref_states = hidden_states(policy, batch), hidden_states(reference, batch)
            p, q = head(policy), head(reference)
            # No name keeps the weights: gathered ones go before the next micro-batch's come.
            both = linear_logp_kl(
                states, p.pop("weight"), ref_states, q.pop("weight"), batch.target, ref_bias=q["bias"],
                temperature=recipe.temperature, **p,
            )  # fmt: skip
        values = both.kl if recipe.reference_points == "exact" else both.logp - both.ref_logp
        if group:
            parts.append(reference_points(values, batch.cu_seqlens, batch.cu_steps))
    own = [float(sum(column)) for column in zip(*parts, strict=True)] or [0.0] * 4
    totals = [sum(column) for column in zip(*gather(own), strict=True)]
    return totals[0] / totals[1], totals[2] / totals[3]


def mismatch(rollouts: Sequence[Rollout], seed: int) -> list[Rollout]:
    """Each prompt with a completion of another prompt, for KTO's mismatched reference point.

    Raises ValueError when all rollouts share one prompt: nothing would be mismatched.
    """
    prompts = {r.problem_id for r in rollouts}
    if len(prompts) < 2:
        raise ValueError(
            f"mismatched reference points need completions of at least two prompts in a batch, got {len(prompts)} "
            f"(problem ids {sorted(prompts)}): raise train_batch_size or choose another estimator"
        )
    rng = random.Random(f"mismatch {seed}")
    paired = []
    for r in rollouts:
        other = rng.choice([o for o in rollouts if o.problem_id != r.problem_id])
        paired.append(replace(other, prompt=r.prompt, prompt_ids=r.prompt_ids, problem_id=r.problem_id, ref_logps=[]))
    return paired


@dataclass
class BatchResult:
    """What one optimizer batch gave: sums over its completions and steps, for metrics and for the lagged points."""

    loss: float
    outcome_loss: float
    step_loss: float
    log_ratios: Tensor  # (B,) nats
    step_log_ratios: Tensor  # (S,) nats
    sequence_logps: Tensor  # (B,) nats


def accumulate_gradients(
    policy: PreTrainedModel,
    rollouts: Sequence[Rollout],
    recipe: Recipe,
    weights: dict[str, Any],
    points: tuple[float, float],
) -> BatchResult:
    """Adds the gradient of the batch's mean loss to the policy's .grad, one packed micro-batch after the other.

    Every micro-batch divides by the whole batch's counts, so that the result does not depend on the split. Rollouts
    with `importance` have their tokens' gradients scaled by it; the loss stays as it is. Raises ValueError for a policy
    that several ranks hold whole: nobody would sum its gradients.
    """
    if size() > 1 and not is_sharded(policy):
        raise ValueError(f"{size()} ranks train a policy that is not sharded over them: call sharding.shard before")
    if recipe.objective == "step_kto":
        objective = _step_kto_options(rollouts, recipe, weights, points)
    else:
        objective = {"terms": count_terms(rollouts, recipe)}
    outputs, sequence_logps = [], []
    split = _split(rollouts, recipe)
    for group in split[rank()]:
        batch = _pack(rollouts, group, policy)
        with autocast(policy, recipe):
            output = _loss(policy, batch, recipe, objective)
        if not group:
            (0 * output.loss).backward()
            continue
        output.loss.backward()
        outputs.append(output)
        sequence_logps.append(torch.stack([x.sum() for x in output.logp.split(batch.cu_seqlens.diff().tolist())]))
    sums = [sum(float(x.detach()) for x in column) for column in zip(*(o[:3] for o in outputs), strict=True)]
    values = [
        _joined([o.log_ratios for o in outputs]),
        _joined([o.step_log_ratios for o in outputs]),
        _joined(sequence_logps),
    ]
    sums_of_ranks, values_of_ranks = zip(*gather((sums or [0.0] * 3, values)), strict=True)
    loss, outcome_loss, step_loss = (sum(column) for column in zip(*sums_of_ranks, strict=True))
    lengths = ([1] * len(rollouts), [len(r.step_ends) for r in rollouts], [1] * len(rollouts))
    log_ratios, step_log_ratios, logps = (
        torch.cat(in_order(of_ranks, split, each))
        for of_ranks, each in zip(zip(*values_of_ranks, strict=True), lengths, strict=True)
    )
    return BatchResult(loss, outcome_loss, step_loss, log_ratios, step_log_ratios, logps)


def _step_kto_options(
    rollouts: Sequence[Rollout], recipe: Recipe, weights: dict[str, Any], points: tuple[float, float]
) -> dict[str, Any]:
    supervised = sum(any(x != UNLABELLED for x in r.step_labels) for r in rollouts)
    z, z_s = points if recipe.loss_type == "kto" else (0.0, 0.0)
    return {
        "kl": max(z, 0.0), "step_kl": max(z_s, 0.0), "beta": recipe.beta, "step_beta": recipe.step_beta,
        "outcome_weight": recipe.outcome_weight, "step_weight": recipe.step_weight,
        "step_reduction": recipe.step_reduction, "after_first_error": recipe.after_first_error,
        "loss_type": recipe.loss_type, "num_completions": len(rollouts), "num_supervised": max(supervised, 1),
    } | weights  # fmt: skip


def _split(rollouts: Sequence[Rollout], recipe: Recipe) -> list[list[list[int]]]:
    """`micro_batches_of_ranks` of a batch, as indices of `rollouts`; what is a unit stays together."""
    per = unit_size(recipe)
    split = micro_batches_of_ranks(units(rollouts, recipe), size(), recipe.max_tokens_per_micro_batch)
    return [[[per * unit + k for unit in group for k in range(per)] for group in groups] for groups in split]


def _loss(policy: PreTrainedModel, batch: PackedBatch, recipe: Recipe, objective: dict[str, Any]) -> StepKTOOutput:
    """The micro-batch's share of the loss. With importance weights the log-probs keep their values, and what comes back
    through them is scaled."""
    options: dict[str, Any] = {
        "target": batch.target, "temperature": recipe.temperature,
        "filter_eps": "auto" if recipe.filter_eps is None else recipe.filter_eps,
    }  # fmt: skip
    packing: dict[str, Any] = {
        "ref_logp": batch.ref_logp, "cu_seqlens": batch.cu_seqlens, "cu_steps": batch.cu_steps,
        "labels": batch.labels, "step_labels": batch.step_labels,
    }  # fmt: skip
    states = hidden_states(policy, batch)
    options |= head(policy)
    if recipe.objective != "step_kto":
        return baseline_loss(linear_logp(states, **options), batch, recipe, **objective)
    if batch.importance is None:
        return linear_step_kto(states, **options, **packing, **objective)
    logp = linear_logp(states, **options)
    constant = logp.detach()
    return step_kto(constant + batch.importance * (logp - constant), **packing, **objective)
