"""The reference backend of linear_logp_kl: both heads over the same bounded tiles of the vocabulary."""

import torch
from torch import Tensor

from ..linear_logp.eager import (
    VOCAB_TILE,
    Head,
    compute_dtype,
    finite,
    place_target,
    row_blocks,
    tile_logsumexp,
    vocab_tiles,
)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp, ref_logp, kl, lse, tile_lse): see the op; E is the reference model's hidden size."""
    dtype = compute_dtype(hidden_ND)
    policy = Head(weight_VD, bias_V, logit_scale, softcap, temperature)
    reference = Head(ref_weight_VE, ref_bias_V, logit_scale, softcap, temperature)
    logp_N = hidden_ND.new_zeros(len(target_N), dtype=dtype)
    ref_logp_N, kl_N, lse_N = torch.zeros_like(logp_N), torch.zeros_like(logp_N), torch.zeros_like(logp_N)
    tile_lse_TN = logp_N.new_zeros(vocab_tiles(len(weight_VD)), len(target_N))
    zero = logp_N.new_zeros(())
    for rows in row_blocks(target_N != ignore_index, len(weight_VD)):
        h_nD, ref_h_nE, target_n = hidden_ND[rows].to(dtype), ref_hidden_NE[rows].to(dtype), target_N[rows]
        z_target_n, y_target_n = logp_N.new_zeros(len(target_n)), logp_N.new_zeros(len(target_n))
        lse_tiles, ref_lse_tiles, kl_tiles = [], [], []
        for tile in policy.tiles():
            z_nv = policy.logits(h_nD, policy.weight_tile(tile, dtype), tile)
            y_nv = reference.logits(ref_h_nE, reference.weight_tile(tile, dtype), tile)
            row, column = place_target(target_n, tile)
            z_target_n[row], y_target_n[row] = z_nv[row, column], y_nv[row, column]
            z_nv[row, column] = y_nv[row, column] = -torch.inf
            lse_nt = tile_logsumexp(z_nv)
            tile_lse_TN[tile.start // VOCAB_TILE :][: lse_nt.shape[1], rows] = lse_nt.T
            lse_tiles.append(lse_nt.logsumexp(-1))
            ref_lse_tiles.append(y_nv.logsumexp(-1))
            logp_nv, ref_logp_nv = (
                z_nv.sub_(finite(lse_tiles[-1])[:, None]),
                y_nv.sub_(finite(ref_lse_tiles[-1])[:, None]),
            )
            terms_nv = logp_nv.exp() * (logp_nv - ref_logp_nv)
            terms_nv[row, column] = 0
            kl_tiles.append(terms_nv.sum(-1))
        lse_nt, ref_lse_nt = torch.stack(lse_tiles, -1), torch.stack(ref_lse_tiles, -1)
        rest_n, ref_rest_n = lse_nt.logsumexp(-1), ref_lse_nt.logsumexp(-1)
        lse_n, ref_lse_n = torch.logaddexp(rest_n, z_target_n), torch.logaddexp(ref_rest_n, y_target_n)
        logp_n, ref_logp_n = (
            -torch.logaddexp(rest_n - z_target_n, zero),
            -torch.logaddexp(ref_rest_n - y_target_n, zero),
        )
        lse_N[rows], logp_N[rows], ref_logp_N[rows] = lse_n, logp_n, ref_logp_n
        # chain rule of the KL over the target and the tiles: KL = sum_t P_t * (KL_t + log P_t - log Q_t)
        logp_nt, ref_logp_nt = lse_nt - lse_n[:, None], ref_lse_nt - ref_lse_n[:, None]
        p_nt = logp_nt.exp()
        kl_nt = torch.where(p_nt == 0, zero, p_nt * (torch.stack(kl_tiles, -1) + logp_nt - ref_logp_nt))
        kl_N[rows] = (kl_nt.sum(-1) + logp_n.exp() * (logp_n - ref_logp_n)).clamp_(min=0)
    return logp_N, ref_logp_N, kl_N, lse_N, tile_lse_TN
