"""The reference backend of linear_logp_kl: both heads over the same bounded tiles of the vocabulary."""

import torch
from torch import Tensor

from ..linear_logp.eager import Head, compute_dtype, place_target, row_blocks


def linear_logp_kl_forward(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    ref_hidden_NE: Tensor,
    ref_weight_VE: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    ref_bias_V: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logp, ref_logp, kl, lse); E is the reference model's hidden size."""
    dtype = compute_dtype(hidden_ND)
    policy = Head(weight_VD, bias_V, logit_scale, softcap, temperature)
    reference = Head(ref_weight_VE, ref_bias_V, logit_scale, softcap, temperature)
    logp_N = hidden_ND.new_zeros(len(target_N), dtype=dtype)
    ref_logp_N, kl_N, lse_N = torch.zeros_like(logp_N), torch.zeros_like(logp_N), torch.zeros_like(logp_N)
    for rows in row_blocks(target_N != ignore_index, len(weight_VD)):
        h_nD, ref_h_nE, target_n = hidden_ND[rows].to(dtype), ref_hidden_NE[rows].to(dtype), target_N[rows]
        target_logit_n, ref_target_logit_n = logp_N.new_zeros(len(target_n)), logp_N.new_zeros(len(target_n))
        lse_tiles, ref_lse_tiles, kl_tiles = [], [], []
        for tile in policy.tiles():
            z_nv = policy.logits(h_nD, policy.weight_tile(tile, dtype), tile)
            y_nv = reference.logits(ref_h_nE, reference.weight_tile(tile, dtype), tile)
            row, column = place_target(target_n, tile)
            target_logit_n[row], ref_target_logit_n[row] = z_nv[row, column], y_nv[row, column]
            lse_tiles.append(z_nv.logsumexp(-1))
            ref_lse_tiles.append(y_nv.logsumexp(-1))
            logp_nv, ref_logp_nv = z_nv.sub_(lse_tiles[-1][:, None]), y_nv.sub_(ref_lse_tiles[-1][:, None])
            kl_tiles.append((logp_nv.exp() * (logp_nv - ref_logp_nv)).sum(-1))
        lse_nt, ref_lse_nt = torch.stack(lse_tiles, -1), torch.stack(ref_lse_tiles, -1)
        lse_n, ref_lse_n = lse_nt.logsumexp(-1), ref_lse_nt.logsumexp(-1)
        lse_N[rows] = lse_n
        logp_N[rows] = (target_logit_n - lse_n).clamp_(max=0)
        ref_logp_N[rows] = (ref_target_logit_n - ref_lse_n).clamp_(max=0)
        # chain rule of the KL over tiles: KL = sum_t P_t * (KL_t + log P_t - log Q_t)
        logp_nt, ref_logp_nt = lse_nt - lse_n[:, None], ref_lse_nt - ref_lse_n[:, None]
        kl_n = (logp_nt.exp() * (torch.stack(kl_tiles, -1) + logp_nt - ref_logp_nt)).sum(-1)
        kl_N[rows] = kl_n.clamp_(min=0)
    return logp_N, ref_logp_N, kl_N, lse_N
