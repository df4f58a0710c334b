"""The reference backend of linear_logp_stats: what linear_logp's does, watched tile by tile."""

import torch
from torch import Tensor

from ..linear_logp.eager import Head, compute_dtype, forward, place_target


class Observer:
    """Folds tiles of logits, the target's entry among them, into four numbers per token."""

    def __init__(self, hidden_ND: Tensor, target_N: Tensor):
        self.target_N = target_N
        lowest = hidden_ND.new_full(target_N.shape, -torch.inf, dtype=compute_dtype(hidden_ND))
        self.log_sum_sq_N, self.z_target_N, self.before_N, self.after_N = (lowest.clone() for _ in range(4))
        self.sum_N = torch.zeros_like(lowest)

    def add(self, rows: slice | Tensor, tile: slice, z_nv: Tensor) -> None:
        target_n = self.target_N[rows]
        row, column = place_target(target_n, tile)
        z_target_n = self.z_target_N[rows]
        z_target_n[row] = z_nv[row, column]
        self.z_target_N[rows] = z_target_n
        entry_v = torch.arange(tile.start, tile.stop, device=z_nv.device)
        for largest_N, others_nv in (
            (self.before_N, entry_v < target_n[:, None]),
            (self.after_N, entry_v > target_n[:, None]),
        ):
            largest_N[rows] = largest_N[rows].maximum(z_nv.where(others_nv, -torch.inf).amax(-1))
        self.sum_N[rows] += z_nv.sum(-1)
        self.log_sum_sq_N[rows] = self.log_sum_sq_N[rows].logaddexp((2 * z_nv).logsumexp(-1))


def linear_logp_stats_forward(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp, lse, tile_lse, entropy, stats): see the op."""
    head = Head(weight_VD, bias_V, logit_scale, softcap, temperature)
    seen = Observer(hidden_ND, target_N)
    logp_N, lse_N, tile_lse_TN, _, entropy_N = forward(
        hidden_ND, head, target_N, ignore_index, store_probs=False, with_entropy=True, observe=seen.add
    )
    # the first of several largest logits counts, as in argmax
    top1_N = (seen.before_N < seen.z_target_N) & (seen.after_N <= seen.z_target_N)
    stats_3N = torch.stack((seen.log_sum_sq_N - 2 * lse_N, seen.sum_N / len(weight_VD), top1_N.to(lse_N.dtype)))
    return logp_N, lse_N, tile_lse_TN, entropy_N, stats_3N.where(target_N != ignore_index, 0)
