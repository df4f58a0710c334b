"""Importance weights for rollouts that were sampled from other probabilities than the trained policy gives them.

The engine's kernels round in another way than the trainer's, and with `max_staleness: 1` it holds older weights. With
d_t = logp_trainer(t) - logp_engine(t) in nats for each token t of a completion, the weight of the token's gradient is

    token       min(exp(d_t), C)                  truncated importance sampling: Ionides 2008,
                                                  doi:10.1198/106186008X320456; of tokens: Yao et al. 2025, "Your
                                                  Efficient RL Framework Secretly Brings You Off-Policy RL Training"
    sequence    min(exp(sum over t of d_t), C)    one weight for all tokens of a completion

with C = `importance_cap`: what TRL calls vllm_importance_sampling_mode token_truncate and sequence_truncate with
vllm_importance_sampling_clip_max, and verl rollout_is token and sequence with rollout_is_threshold. Weights are
constants: no gradient flows through them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import RunError
from .recipe import Recipe
from .rollout import Rollout


def importance_weights(
    recomputed: Sequence[Tensor], rollouts: Sequence[Rollout], recipe: Recipe
) -> tuple[list[list[float]], dict[str, float]]:
    """The weight of every completion token, and metrics.

    recomputed: for each rollout the trainer's log-probs (n,) of its completion tokens in nats, at the temperature it
    was sampled at; `Rollout.logps` are the engine's. Weights are lists of n floats, or empty ones (1 for all) where
    `recipe.importance_correction` is none. The metrics are there in every case, those of ratios at both levels
    (`token_ratio`, `sequence_ratio`):

    importance/sampling_logp_difference/mean, /max   |d_t| in nats, as TRL's
    importance/token_ratio/min, /mean, /max          exp(d_t) before truncation, as TRL's importance_sampling_ratio
    importance/token_ratio/capped                    share above C
    importance/token_ratio/effective_sample_size     (sum w)^2 / (n sum w^2) of truncated weights (Kish 1965): 1 where
                                                     all are the same, 1/n where one has all the weight

    Raises RunError for log-probs that are not finite: they have no ratio. ValueError for unequal lengths.
    """
    differences = []
    for r, logp in zip(rollouts, recomputed, strict=True):
        if len(logp) != len(r.logps):
            raise ValueError(
                f"problem {r.problem_id} sample {r.sample}: {len(logp)} recomputed log-probs for {len(r.logps)}"
            )
        d_n = logp.double().cpu() - torch.tensor(r.logps, dtype=torch.float64)
        if not d_n.isfinite().all():
            raise RunError(
                f"problem {r.problem_id} sample {r.sample}: a log-prob of the engine or of the trainer is not finite, "
                "so its importance ratio is not defined. The weights may have diverged: lower learning_rate"
            )
        differences.append(d_n)
    tokens, sequences = torch.cat(differences), torch.stack([d.sum() for d in differences])
    metrics = {
        "importance/sampling_logp_difference/mean": float(tokens.abs().mean()),
        "importance/sampling_logp_difference/max": float(tokens.abs().max()),
    }
    cap = recipe.importance_cap
    for level, log_ratios in (("token", tokens), ("sequence", sequences)):
        ratios = log_ratios.exp()
        weights = ratios.clamp(max=cap)
        metrics |= {
            f"importance/{level}_ratio/min": float(ratios.min()),
            f"importance/{level}_ratio/mean": float(ratios.mean()),
            f"importance/{level}_ratio/max": float(ratios.max()),
            f"importance/{level}_ratio/capped": float((ratios > cap).double().mean()),
            f"importance/{level}_ratio/effective_sample_size": float(
                weights.sum() ** 2 / (len(weights) * weights.square().sum())
            ),
        }
    if recipe.importance_correction == "none":
        return [[] for _ in rollouts], metrics
    if recipe.importance_correction == "token":
        return [d.exp().clamp(max=cap).tolist() for d in differences], metrics
    return [d.sum().exp().clamp(max=cap).expand(len(d)).tolist() for d in differences], metrics
