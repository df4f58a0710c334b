"""The objectives that Step-KTO is compared with (`recipe.objective`): their batches and their losses.

    rft    rejection-sampling fine-tuning (Yuan et al. 2023, arXiv 2308.01825): the mean negative log-likelihood of the
           tokens of right completions
    dpo    direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290, equation 7): a right completion
           against a wrong one of the same prompt; TRL's `loss_type: sigmoid`

Both take as many optimizer steps of as many completions as Step-KTO takes on the same rollouts.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from stepkto_kernels import StepKTOOutput
from torch import Tensor
from torch.nn.functional import logsigmoid

from .errors import TrainingError
from .packing import PackedBatch
from .recipe import Recipe
from .rollout import Rollout


@dataclass(frozen=True)
class Unit:
    """Completions that one micro-batch must have together. Its length is their trunk tokens."""

    rollouts: tuple[Rollout, ...]

    def __len__(self) -> int:
        return sum(map(len, self.rollouts))


def unit_size(recipe: Recipe) -> int:
    """Completions of a unit: 2 for the pairs of DPO, else 1."""
    return 2 if recipe.objective == "dpo" else 1


def units(batch: Sequence[Rollout], recipe: Recipe) -> list[Unit]:
    """An optimizer batch as what cannot be split: single completions, or for DPO pairs (right, wrong)."""
    size = unit_size(recipe)
    return [Unit(tuple(batch[start : start + size])) for start in range(0, len(batch), size)]


def baseline_batches(
    rollouts: Sequence[Rollout], sizes: Iterable[int], recipe: Recipe, iteration: int
) -> list[list[Rollout]]:
    """The optimizer batches of RFT or DPO, of `sizes` completions each (DPO: of size // 2 pairs, at least one).

    RFT goes through the right completions again and again, each time in a new order. DPO pairs each prompt's right
    completions with its wrong ones at random, min(right, wrong) pairs a prompt, and pairs anew when they are used up;
    a batch is right, wrong, right, wrong, ... Depends on the rollouts, the seed and the iteration alone.

    Raises TrainingError where there is nothing to learn from: no right completion, or for DPO no prompt with both.
    """
    rng = random.Random(f"{recipe.objective} {recipe.seed} {iteration}")
    draw = _endless_pairs if recipe.objective == "dpo" else _endless_right
    drawn, per = draw(rollouts, rng, iteration), unit_size(recipe)
    return [[r for unit in islice(drawn, max(1, size // per)) for r in unit] for size in sizes]


def _endless_right(rollouts: Sequence[Rollout], rng: random.Random, iteration: int) -> Iterator[tuple[Rollout, ...]]:
    right = [r for r in rollouts if r.label]
    if not right:
        raise TrainingError(
            f"iteration {iteration}: none of {len(rollouts)} completions is right, and objective rft learns from right "
            "ones alone: raise num_prompts or num_generations, give easier problems or a better model, or set "
            "objective to step_kto"
        )
    while True:
        yield from ((r,) for r in rng.sample(right, len(right)))


def _endless_pairs(rollouts: Sequence[Rollout], rng: random.Random, iteration: int) -> Iterator[tuple[Rollout, ...]]:
    prompts: dict[int, tuple[list[Rollout], list[Rollout]]] = {}
    for r in rollouts:
        prompts.setdefault(r.problem_id, ([], []))[0 if r.label else 1].append(r)
    mixed = [(right, wrong) for right, wrong in prompts.values() if right and wrong]
    if not mixed:
        raise TrainingError(
            f"iteration {iteration}: none of {len(prompts)} prompts has both a right and a wrong completion, and "
            "objective dpo learns from such pairs alone: raise num_prompts or num_generations, give problems that the "
            "model sometimes solves, or set objective to step_kto"
        )
    while True:
        pairs: list[tuple[Rollout, Rollout]] = []
        for right, wrong in mixed:
            count = min(len(right), len(wrong))
            pairs += zip(rng.sample(right, count), rng.sample(wrong, count), strict=True)
        rng.shuffle(pairs)
        yield from pairs


def count_terms(batch: Sequence[Rollout], recipe: Recipe) -> int:
    """What an optimizer batch's loss is the mean over: completion tokens (rft) or pairs (dpo)."""
    return len(batch) // 2 if recipe.objective == "dpo" else sum(len(r.completion_ids) for r in batch)


def baseline_loss(logp: Tensor, batch: PackedBatch, recipe: Recipe, terms: int) -> StepKTOOutput:
    """A micro-batch's share of the loss of RFT or DPO, as the kernels give Step-KTO's: `outcome_loss` is the loss,
    `step_loss` 0.

    logp (N,): the policy's log-probs of the batch's tokens in nats, with a gradient. terms: `count_terms` of the whole
    optimizer batch. With r the sum of logp - ref_logp over a completion,

        rft    -(sum of logp) / terms
        dpo    (sum over pairs of -log σ(beta (r_right - r_wrong))) / terms

    in fp64 beyond the log-probs.
    """
    differences = logp.double() - batch.ref_logp.double()
    log_ratios = _sums(differences, batch.cu_seqlens)
    if recipe.objective == "dpo":
        # An idle rank's single completion is no pair, and both slices are then empty.
        right, wrong = log_ratios[:-1:2], log_ratios[1::2]
        loss = -logsigmoid(recipe.beta * (right - wrong)).sum() / terms
    else:
        loss = -logp.double().sum() / terms
    nothing = torch.zeros((), dtype=loss.dtype, device=loss.device)
    steps = _sums(differences.detach(), batch.cu_steps)
    return StepKTOOutput(
        loss, loss.detach(), nothing, log_ratios.detach().float(), steps.float(), logp.detach(), nothing, nothing
    )


def _sums(values_N: Tensor, boundaries: Tensor) -> Tensor:
    """The sum over each [boundaries[i], boundaries[i + 1])."""
    return torch.stack([x.sum() for x in values_N.split(boundaries.diff().tolist())])
