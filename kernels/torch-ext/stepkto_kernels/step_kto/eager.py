"""The reference backend of step_kto: segment sums and elementwise torch over completions and steps.

Everything after the per-token difference is in fp64: it is B + S numbers, and long sums then cost no
accuracy.
"""

import torch
from torch import Tensor


def segment_sum(x_N: Tensor, boundaries: Tensor) -> Tensor:
    """Sum over each [boundaries[i], boundaries[i + 1]), in a fixed order."""
    if len(boundaries) == 1:
        return x_N.new_zeros(0)
    return torch.segment_reduce(x_N, "sum", offsets=boundaries.long(), unsafe=True)


def spread(x_S: Tensor, boundaries: Tensor, size: int) -> Tensor:
    """Each segment's value repeated over its members: the transpose of segment_sum."""
    return x_S.repeat_interleave(boundaries.diff(), output_size=size)


def inverse(count: Tensor) -> Tensor:
    """1 / count, or 0 for 0. Counts may be fractions: a global count over the number of ranks."""
    count = count.to(torch.float64)
    return torch.where(count > 0, 1 / count, 0)


def value_terms(
    r: Tensor, desirable: Tensor, beta: float, z: Tensor, desirable_weight: float, undesirable_weight: float
) -> tuple[Tensor, Tensor]:
    """(lam - v, its derivative in r), where v = lam * sigmoid(x) and so lam - v = lam * sigmoid(-x)."""
    sign = desirable.to(r.dtype) * 2 - 1
    # not where(desirable, float, float): that would round the weights to fp32
    lam = torch.where(desirable, r.new_full((), desirable_weight), r.new_full((), undesirable_weight))
    x = beta * sign * (r - z)
    term = lam * torch.sigmoid(-x)
    return term, -beta * sign * term * torch.sigmoid(x)


def step_kto_forward(
    logp_N: Tensor,
    ref_logp_N: Tensor,
    cu_seqlens: Tensor,
    cu_steps: Tensor,
    labels_B: Tensor,
    step_labels_S: Tensor,
    kl: Tensor,
    step_kl: Tensor,
    num_completions: Tensor | None,
    num_supervised: Tensor | None,
    beta: float,
    step_beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    step_desirable_weight: float,
    step_undesirable_weight: float,
    outcome_weight: float,
    step_weight: float,
    step_reduction: str,
    after_first_error: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, outcome_loss, step_loss, r_B, r_S, dL/dlogp_N); the inputs are of the compute dtype."""
    dtype, double = logp_N.dtype, torch.float64
    completions, steps, tokens = len(labels_B), len(step_labels_S), len(logp_N)
    cu_seqsteps = torch.searchsorted(
        cu_steps.contiguous(), cu_seqlens.contiguous()
    )  # sequence boundaries, counted in steps
    r_S = segment_sum((logp_N - ref_logp_N).to(double), cu_steps)
    r_B = segment_sum(r_S, cu_seqsteps)

    outcome_B, slope_B = value_terms(r_B, labels_B, beta, kl.to(double), desirable_weight, undesirable_weight)
    per_completion = inverse(r_B.new_full((), completions) if num_completions is None else num_completions)

    labelled_S = step_labels_S != -1
    if after_first_error == "mask":
        wrong_S = (step_labels_S == 0).long()
        wrong_before_S = wrong_S.cumsum(0) - wrong_S
        labelled_S &= wrong_before_S == spread(wrong_before_S[cu_seqsteps[:-1]], cu_seqsteps, steps)
    labelled_B = segment_sum(labelled_S.to(double), cu_seqsteps)
    share_S = labelled_S * inverse((labelled_B > 0).sum() if num_supervised is None else num_supervised)
    if step_reduction == "mean":
        share_S = share_S / spread(labelled_B.clamp(min=1), cu_seqsteps, steps)
    step_S, step_slope_S = value_terms(
        r_S, step_labels_S == 1, step_beta, step_kl.to(double), step_desirable_weight, step_undesirable_weight
    )

    outcome_loss, step_loss = outcome_B.sum() * per_completion, (step_S * share_S).sum()
    loss = outcome_weight * outcome_loss + step_weight * step_loss
    slope_S = step_weight * step_slope_S * share_S
    slope_S += outcome_weight * spread(slope_B * per_completion, cu_seqsteps, steps)
    coefficient_N = spread(slope_S.to(dtype), cu_steps, tokens)
    loss, outcome_loss, step_loss = (x.to(dtype) for x in (loss, outcome_loss, step_loss))
    return loss, outcome_loss, step_loss, r_B.to(dtype), r_S.to(dtype), coefficient_N
