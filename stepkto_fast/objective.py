"""The Step-KTO objective over packed micro-batches: class weights, reference points, and one accumulated gradient."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from stepkto_kernels import ReferencePoints, linear_logp, linear_logp_kl, linear_step_kto, reference_points
from torch import Tensor
from transformers import PreTrainedModel

from .packing import micro_batches, pack
from .policy import head, hidden_states
from .recipe import Recipe
from .rollout import UNLABELLED, Rollout

LAG = 0.9  # decay of the lagged reference points


@torch.no_grad()
def log_probs(model: PreTrainedModel, rollouts: Sequence[Rollout], recipe: Recipe) -> list[Tensor]:
    """For each rollout the log-probs (nats, fp32, on the CPU) that `model` gives its completion tokens."""
    found: list[Tensor] = []
    for group in micro_batches(rollouts, recipe.max_tokens_per_micro_batch):
        batch = pack(group).to(model.device)
        with autocast(model, recipe):
            logp = linear_logp(
                hidden_states(model, batch),
                target=batch.target,
                temperature=recipe.temperature,
                **head(model),
            )
        found += logp.cpu().split([len(r.completion_ids) for r in group])
    return found


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
    for group in micro_batches(pairs, recipe.max_tokens_per_micro_batch):
        batch = pack(group).to(policy.device)
        with autocast(policy, recipe):
            p, q = head(policy), head(reference)
            both = linear_logp_kl(
                hidden_states(policy, batch), p.pop("weight"), hidden_states(reference, batch), q["weight"],
                batch.target, ref_bias=q["bias"], temperature=recipe.temperature, **p,
            )  # fmt: skip
        values = both.kl if recipe.reference_points == "exact" else both.logp - both.ref_logp
        parts.append(reference_points(values, batch.cu_seqlens, batch.cu_steps))
    totals = [float(sum(column)) for column in zip(*parts, strict=True)]
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

    Every micro-batch divides by the whole batch's counts, so that the result does not depend on the split.
    """
    supervised = sum(any(x != UNLABELLED for x in r.step_labels) for r in rollouts)
    z, z_s = points if recipe.loss_type == "kto" else (0.0, 0.0)
    outputs = []
    for group in micro_batches(rollouts, recipe.max_tokens_per_micro_batch):
        batch = pack(group).to(policy.device)
        with autocast(policy, recipe):
            output = linear_step_kto(
                hidden_states(policy, batch), target=batch.target, ref_logp=batch.ref_logp,
                cu_seqlens=batch.cu_seqlens, cu_steps=batch.cu_steps,
                labels=batch.labels, step_labels=batch.step_labels,
                kl=max(z, 0.0), step_kl=max(z_s, 0.0), beta=recipe.beta, step_beta=recipe.step_beta,
                outcome_weight=recipe.outcome_weight, step_weight=recipe.step_weight,
                step_reduction=recipe.step_reduction, after_first_error=recipe.after_first_error,
                loss_type=recipe.loss_type, num_completions=len(rollouts), num_supervised=max(supervised, 1),
                temperature=recipe.temperature, filter_eps="auto" if recipe.filter_eps is None else recipe.filter_eps,
                **weights, **head(policy),
            )  # fmt: skip
        output.loss.backward()
        logps = torch.stack([x.sum() for x in output.logp.split(batch.cu_seqlens.diff().tolist())])
        outputs.append((output, logps))
    return BatchResult(
        loss=sum(float(o.loss.detach()) for o, _ in outputs),
        outcome_loss=sum(float(o.outcome_loss) for o, _ in outputs),
        step_loss=sum(float(o.step_loss) for o, _ in outputs),
        log_ratios=torch.cat([o.log_ratios for o, _ in outputs]).cpu(),
        step_log_ratios=torch.cat([o.step_log_ratios for o, _ in outputs]).cpu(),
        sequence_logps=torch.cat([x for _, x in outputs]).cpu(),
    )
