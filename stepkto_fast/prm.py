"""The process-reward model (PRM): a trunk and a head on it that says of each step how likely it is right.

`fit_prm` fits the head on labelled rollouts and calibrates it on others; by default the trunk is detached, so the head
never moves the policy. The heads are in `prm_head`, the figures that judge a fit in `prm_metrics`.
"""

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import PreTrainedModel

from .errors import RunError
from .objective import balance, over_micro_batches
from .packing import PackedBatch, micro_batches, pack
from .prm_head import HEADS, PRMHead
from .prm_metrics import f1
from .recipe import Recipe
from .rollout import UNLABELLED, Rollout

HELD_OUT = 5  # every fifth seed problem is never fitted on
TOKENS_A_STEP = 2048  # trunk tokens of one fitting step
CACHED_BYTES = 2**30  # of features; the steps beyond them run the trunk in every epoch


class ScoreSettings(Protocol):
    """What scoring reads of a recipe."""

    @property
    def max_tokens_per_micro_batch(self) -> int: ...
    @property
    def bf16(self) -> bool: ...


class PRMSettings(ScoreSettings, Protocol):
    """What fitting reads of a recipe, or of `train_prm`'s settings. Learning rates are peaks of a linear decay."""

    @property
    def prm_trunk(self) -> str: ...
    @property
    def prm_pooling(self) -> str: ...
    @property
    def prm_class_weights(self) -> str: ...
    @property
    def prm_epochs(self) -> int: ...
    @property
    def prm_learning_rate(self) -> float: ...
    @property
    def prm_trunk_learning_rate(self) -> float: ...
    @property
    def temperature(self) -> float: ...


@dataclass
class PRM:
    """A fitted head, the trunk it reads, and the temperature of the log-probs among its features.

    `score` gives probabilities, `label` the 0/1 labels training uses. calibrated: False where there were only right or
    only wrong steps to calibrate on, so that the probabilities are raw and the threshold is 0.5.
    """

    trunk: PreTrainedModel
    head: PRMHead
    temperature: float
    calibrated: bool = True

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout], settings: ScoreSettings) -> list[list[float]]:
        """For each rollout, the probability that each of its steps is right. Under several ranks all take part, each
        with its share, and every one returns all."""

        def judge(batch: PackedBatch) -> Tensor:
            return self.head(self.features(batch, settings), batch.cu_steps).sigmoid()

        steps = [len(r.step_ends) for r in rollouts]
        judged = over_micro_batches(self.trunk, rollouts, settings.max_tokens_per_micro_batch, judge, steps)
        return [p.tolist() for p in judged]

    def features(self, batch: PackedBatch, settings: ScoreSettings) -> Tensor:
        """What the head reads of the batch; the trunk runs in bf16 where the settings ask for it."""
        with torch.autocast(self.trunk.device.type, dtype=torch.bfloat16, enabled=settings.bf16):
            return self.head.read(self.trunk, batch, self.temperature)

    def label(self, probabilities: Sequence[float]) -> list[int]:
        """1 where the probability reaches the calibrated threshold, else 0."""
        return [int(p >= float(self.head.threshold)) for p in probabilities]


def seed_generations(recipe: Recipe) -> tuple[int, int]:
    """How many of a seed problem's completions are sampled at the rollouts' temperature, and how many hotter.

    The hot half shows mistakes that M_0 seldom makes but a later policy may: pushing down one wrong answer raises
    others. Without it the head misses most of them.
    """
    hot = recipe.prm_seed_generations // 2
    return recipe.prm_seed_generations - hot, hot


def fits(r: Rollout) -> bool:
    """Whether the head is fitted on a seed completion: its problem is not held out."""
    return r.problem_id % HELD_OUT != 0


def calibrates(r: Rollout, recipe: Recipe) -> bool:
    """Whether a seed completion calibrates the head: a held-out problem, sampled as rollouts are."""
    return not fits(r) and r.sample < seed_generations(recipe)[0]


def fit_prm(
    policy: PreTrainedModel,
    fitting: Sequence[Rollout],
    calibrating: Sequence[Rollout],
    settings: PRMSettings,
    seed: int,
    on_step: Callable[[int, int, float], None] = lambda step, total, loss: None,
    copy_trunk: bool = True,
) -> PRM:
    """A head fitted on the step_labels of `fitting` and calibrated on those of `calibrating`; -1 is passed over.

    `settings.prm_trunk` "trained" gives the head a copy of the policy's trunk and trains both; otherwise the policy
    itself is read and left alone. `copy_trunk` False trains the policy's own, for callers with no further use for it.
    `on_step(step, total, loss)` reports progress, the loss in nats a step. Where `calibrating` has one class only, the
    head stays uncalibrated (`PRM.calibrated`).
    Raises RunError where either part has no labelled step, `fitting` lacks right or wrong ones, or the fit diverges.
    """
    fitting, calibrating = ([r for r in part if set(r.step_labels) - {UNLABELLED}] for part in (fitting, calibrating))
    if not fitting or not calibrating:
        raise RunError(
            f"{len(fitting)} completions with labelled steps to fit the PRM head on, {len(calibrating)} to calibrate "
            "it: both need some; give more labelled problems"
        )
    given = [x for r in fitting for x in r.step_labels]
    if not (given.count(0) and given.count(1)):
        raise RunError(
            f"the PRM head would be fitted on {given.count(1)} right and {given.count(0)} wrong steps, and needs "
            "both: give more labelled problems, or a model that gets some steps right and some wrong"
        )
    train_trunk = settings.prm_trunk == "trained"
    trunk = copy.deepcopy(policy) if train_trunk and copy_trunk else policy
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        head = HEADS[settings.prm_pooling](policy.config.get_text_config().hidden_size).to(policy.device)
    prm = PRM(trunk, head, settings.temperature)
    batches = [pack(group) for group in micro_batches(sorted(fitting, key=len), TOKENS_A_STEP)]
    cached = _standardise(prm, batches, settings)
    if train_trunk:
        cached = {}  # its states move
    groups = [{"params": head.parameters(), "lr": settings.prm_learning_rate, "weight_decay": 0.01}]
    if train_trunk:
        groups.append({"params": trunk.get_decoder().parameters(), "lr": settings.prm_trunk_learning_rate})
    optimizer = torch.optim.AdamW(groups)
    total = settings.prm_epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
    weights = _class_weights(fitting, settings).to(policy.device)
    order = random.Random(f"fit_prm {seed}")
    for epoch in range(settings.prm_epochs):
        for done, k in enumerate(order.sample(range(len(batches)), len(batches))):
            batch = batches[k].to(policy.device)
            with torch.set_grad_enabled(train_trunk):
                x = cached[k] if k in cached else prm.features(batch, settings)
            seen_S = batch.step_labels != UNLABELLED
            labels = batch.step_labels[seen_S]
            loss = binary_cross_entropy_with_logits(
                head(x, batch.cu_steps)[seen_S], labels.float(), weight=weights[labels.long()]
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            on_step(epoch * len(batches) + done + 1, total, float(loss.detach()))
    probabilities, truth = _judged(prm, calibrating, settings)
    if not all(x.isfinite().all() for x in (*head.state_dict().values(), probabilities)):
        lower = f"a prm_learning_rate below {settings.prm_learning_rate}"
        if train_trunk:
            lower += f" or a prm_trunk_learning_rate below {settings.prm_trunk_learning_rate}"
        raise RunError(f"the PRM head diverged, its numbers are not finite: give {lower}")
    prm.calibrated = set(truth.tolist()) == {0, 1}
    if prm.calibrated:
        _calibrate(head, probabilities, truth)
    return prm


@torch.no_grad()
def _standardise(prm: PRM, batches: Sequence[PackedBatch], settings: PRMSettings) -> dict[int, Tensor]:
    """Sets the head's mean and std from the features of as many batches as may be kept, which are returned."""
    cached: dict[int, Tensor] = {}
    used = 0
    # Batches are sorted by length: without shuffling, many data would be standardised by their short completions.
    for k in random.Random(len(batches)).sample(range(len(batches)), len(batches)):
        if used < CACHED_BYTES:
            cached[k] = prm.features(batches[k].to(prm.trunk.device), settings)
            used += cached[k].nbytes
    every = torch.cat([cached[k] for k in sorted(cached)])
    prm.head.mean.copy_(every.mean(0))
    prm.head.std.copy_(every.std(0).clamp_min(1e-6))
    return cached


def _class_weights(rollouts: Sequence[Rollout], settings: PRMSettings) -> Tensor:
    """(2,) fp32: the weight of a wrong step's loss and of a right step's."""
    labels = [x for r in rollouts for x in r.step_labels]
    right, wrong = balance(labels.count(1), labels.count(0)) if settings.prm_class_weights == "balanced" else (1.0, 1.0)
    return torch.tensor([wrong, right])


def _judged(prm: PRM, rollouts: Sequence[Rollout], settings: ScoreSettings) -> tuple[Tensor, Tensor]:
    """(S,) fp64 each: the probabilities and the labels of all labelled steps."""
    scored = zip(prm.score(rollouts, settings), rollouts, strict=True)
    pairs = [pair for row, r in scored for pair in zip(row, r.step_labels, strict=True) if pair[1] != UNLABELLED]
    probabilities, truth = torch.tensor(pairs, dtype=torch.float64).T
    return probabilities, truth


def _calibrate(head: PRMHead, probabilities: Tensor, truth: Tensor) -> None:
    """Platt scaling of the logits, then the threshold with the best F1 at finding wrong steps."""
    logits = probabilities.clamp(1e-7, 1 - 1e-7).logit()
    line = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([line], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        # The small pull towards the identity keeps the fit finite where the classes separate perfectly.
        loss = (
            binary_cross_entropy_with_logits(line[0] * logits + line[1], truth)
            + 1e-3 * (line - line.new_tensor([1, 0])).square().sum()
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    head.scale.copy_(line[0].detach())
    head.shift.copy_(line[1].detach())
    calibrated = (line[0] * logits + line[1]).sigmoid().detach().numpy()
    candidates = np.unique(np.quantile(calibrated, np.linspace(0, 1, 401)))
    scores = [f1(calibrated < t, truth.numpy() == 0) for t in candidates]
    best = int(np.argmax(scores))
    # Halfway to the next candidate below, so that the boundary does not sit on a sample.
    head.threshold.fill_(float((candidates[best] + candidates[max(best - 1, 0)]) / 2))
