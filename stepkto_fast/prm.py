"""The process-reward (PRM) head: a small head on the policy that says of each step how likely it is right.

Every token of a step enters as (the hidden state that predicted it, the embedding of the token that was written, its
log-prob, the entropy of its prediction); a two-layer MLP mixes these, a learned softmax pools the step's tokens, one
logit comes out. The state that predicted a result knows what should have been written, the embedding what was:
together they tell. (The usual head on the last token's final state is at chance on small models, which do not look
back at what they wrote.)

The head is fitted on a labelled seed set; by default its trunk is detached, so it never moves the policy.
"""

import copy
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from stepkto_kernels import linear_logp_entropy
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import PreTrainedModel

from .packing import PackedBatch, micro_batches, pack
from .policy import head, hidden_states
from .recipe import Recipe
from .rollout import Rollout

HELD_OUT = 5  # every fifth seed problem is never fitted on
TOKENS_A_STEP = 2048  # trunk tokens of one fitting step


class PRMHead(nn.Module):
    """Features of packed tokens -> one calibrated logit a step."""

    mean: Tensor
    std: Tensor
    scale: Tensor
    shift: Tensor
    threshold: Tensor

    def __init__(self, hidden_size: int, width: int = 128):
        super().__init__()
        features = 2 * hidden_size + 2
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.pool = nn.Linear(width, 1)
        self.out = nn.Linear(width, 1)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("threshold", torch.tensor(0.5))

    def forward(self, features: Tensor, cu_steps: Tensor) -> Tensor:
        """features (N, 2 D + 2) fp32, cu_steps (S + 1,) int32 -> logits (S,) of "this step is right"."""
        u_NW = self.mlp((features - self.mean) / self.std)
        lengths_S = cu_steps.diff().long()
        step_N = torch.repeat_interleave(torch.arange(len(lengths_S), device=features.device), lengths_S)
        score_N = self.pool(u_NW)[:, 0]
        top_S = score_N.new_full((len(lengths_S),), -math.inf).scatter_reduce(0, step_N, score_N.detach(), "amax")
        e_N = (score_N - top_S[step_N]).exp()
        share_N = e_N / e_N.new_zeros(len(lengths_S)).index_add(0, step_N, e_N)[step_N]
        pooled_SW = u_NW.new_zeros(len(lengths_S), u_NW.shape[1]).index_add(0, step_N, share_N[:, None] * u_NW)
        return self.scale * self.out(pooled_SW)[:, 0] + self.shift


@dataclass
class PRM:
    """A fitted head and the trunk it reads. `score` gives probabilities, `label` the 0/1 labels training uses."""

    trunk: PreTrainedModel
    head: PRMHead

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout], recipe: Recipe) -> list[list[float]]:
        """For each rollout, the probability that each of its steps is right."""
        found: list[list[float]] = []
        for group in micro_batches(rollouts, recipe.max_tokens_per_micro_batch):
            batch = pack(group).to(self.trunk.device)
            probabilities = self.head(features(self.trunk, batch, recipe.temperature), batch.cu_steps).sigmoid()
            found += [p.tolist() for p in probabilities.cpu().split([len(r.step_ends) for r in group])]
        return found

    def label(self, probabilities: Sequence[float]) -> list[int]:
        """1 where the probability reaches the calibrated threshold, else 0."""
        return [int(p >= float(self.head.threshold)) for p in probabilities]


def features(trunk: PreTrainedModel, batch: PackedBatch, temperature: float) -> Tensor:
    """What the head reads of each scored token: (N, 2 D + 2) fp32. Log-prob and entropy carry no gradient."""
    hidden = hidden_states(trunk, batch)
    with torch.no_grad():
        logp, entropy = linear_logp_entropy(hidden, target=batch.target, temperature=temperature, **head(trunk))
    written = trunk.get_input_embeddings()(batch.target)
    return torch.cat([hidden.float(), written.float(), logp[:, None], entropy[:, None]], dim=1)


def seed_generations(recipe: Recipe) -> tuple[int, int]:
    """How many of a seed problem's completions are sampled at the rollouts' temperature, and how many hotter.

    The hot half shows mistakes that M_0 seldom makes but a later policy may: pushing down one wrong answer raises
    others. Without it the head misses most of them.
    """
    hot = recipe.prm_seed_generations // 2
    return recipe.prm_seed_generations - hot, hot


def calibrates(r: Rollout, recipe: Recipe) -> bool:
    """Whether a seed completion calibrates the head: a held-out problem, sampled as rollouts are."""
    return r.problem_id % HELD_OUT == 0 and r.sample < seed_generations(recipe)[0]


def fit_prm(
    policy: PreTrainedModel,
    seed_set: Sequence[Rollout],
    recipe: Recipe,
    seed: int,
    on_step: Callable[[int, int], None] = lambda step, total: None,
) -> PRM:
    """A head fitted on `seed_set` (its checker_labels), calibrated on problems of it that are held out.

    `recipe.prm_trunk` "trained" gives the head a copy of the policy's trunk and trains both; otherwise the policy
    itself is read and left alone. `on_step(step, total)` reports progress.
    """
    train_trunk = recipe.prm_trunk == "trained"
    trunk = copy.deepcopy(policy) if train_trunk else policy
    fitting = [r for r in seed_set if r.problem_id % HELD_OUT]
    calibrating = [r for r in seed_set if calibrates(r, recipe)]
    groups = list(micro_batches(sorted(fitting, key=len), TOKENS_A_STEP))
    batches = [(pack(g).to(policy.device), _labels(g, policy.device)) for g in groups]
    with torch.no_grad():
        cached = [features(trunk, batch, recipe.temperature) for batch, _ in batches]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        prm = PRM(trunk, PRMHead(policy.config.hidden_size).to(policy.device))
    every = torch.cat(cached)
    prm.head.mean.copy_(every.mean(0))
    prm.head.std.copy_(every.std(0).clamp_min(1e-6))
    settings = [{"params": prm.head.parameters(), "lr": recipe.prm_learning_rate, "weight_decay": 0.01}]
    if train_trunk:
        settings.append({"params": trunk.get_decoder().parameters(), "lr": recipe.prm_trunk_learning_rate})
    optimizer = torch.optim.AdamW(settings)
    total = recipe.prm_epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
    order = random.Random(f"fit_prm {seed}")
    for epoch in range(recipe.prm_epochs):
        for done, k in enumerate(order.sample(range(len(batches)), len(batches))):
            batch, labels_S = batches[k]
            x_NF = features(trunk, batch, recipe.temperature) if train_trunk else cached[k]
            binary_cross_entropy_with_logits(prm.head(x_NF, batch.cu_steps), labels_S).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            on_step(epoch * len(batches) + done + 1, total)
    _calibrate(prm, calibrating, recipe)
    return prm


def _labels(rollouts: Sequence[Rollout], device: torch.device) -> Tensor:
    return torch.tensor([float(x) for r in rollouts for x in r.checker_labels], device=device)


def _calibrate(prm: PRM, held_out: Sequence[Rollout], recipe: Recipe) -> None:
    """Platt scaling of the logits, then the threshold with the best F1 at finding wrong steps."""
    probabilities = torch.tensor([p for row in prm.score(held_out, recipe) for p in row], dtype=torch.float64)
    truth = _labels(held_out, torch.device("cpu")).double()
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
    prm.head.scale.copy_(line[0].detach())
    prm.head.shift.copy_(line[1].detach())
    calibrated = (line[0] * logits + line[1]).sigmoid().detach().numpy()
    candidates = np.unique(np.quantile(calibrated, np.linspace(0, 1, 401)))
    scores = [_f1(calibrated < t, truth.numpy() == 0) for t in candidates]
    best = int(np.argmax(scores))
    # Halfway to the next candidate below, so that the boundary does not sit on a sample.
    prm.head.threshold.fill_(float((candidates[best] + candidates[max(best - 1, 0)]) / 2))


def _f1(found: np.ndarray, wanted: np.ndarray) -> float:
    hits = float((found & wanted).sum())
    return 2 * hits / max(float(found.sum() + wanted.sum()), 1.0)


def audit(probabilities: Sequence[float], labels: Sequence[int], threshold: float) -> dict:
    """How well probabilities of "right" agree with exact labels; "wrong" is the class to find.

    F1, precision and recall at `threshold`, AUROC, expected calibration error over ten equal bins, and the bins. A
    figure that is not defined (no wrong step, say) is None.
    """
    p, right = np.asarray(probabilities, dtype=np.float64), np.asarray(labels) == 1
    found, wrong = p < threshold, ~right
    hits = int((found & wrong).sum())
    place = np.clip((p * 10).astype(int), 0, 9)
    bins = [
        {
            "probability": float(p[place == k].mean()),
            "correct": float(right[place == k].mean()),
            "count": int((place == k).sum()),
        }
        for k in range(10)
        if (place == k).any()
    ]
    return {
        "f1": _f1(found, wrong) if wrong.any() else None,
        "precision": hits / int(found.sum()) if found.any() else None,
        "recall": hits / int(wrong.sum()) if wrong.any() else None,
        "auroc": _auroc(p, right),
        "ece": sum(b["count"] * abs(b["probability"] - b["correct"]) for b in bins) / len(p) if len(p) else None,
        "threshold": threshold,
        "bins": bins,
    }


def _auroc(p: np.ndarray, right: np.ndarray) -> float | None:
    """The chance that a right step scores above a wrong one, ties counting half (Mann-Whitney)."""
    n_right, n_wrong = int(right.sum()), int((~right).sum())
    if not n_right or not n_wrong:
        return None
    _, inverse, counts = np.unique(p, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[right].sum() - n_right * (n_right + 1) / 2) / (n_right * n_wrong))
