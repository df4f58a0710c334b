"""The reference backend of linear_logp and linear_logp_entropy: torch calls over bounded tiles of the logits.

Rows that are ignored, and in the backward rows whose coefficients are 0, are taken out first: they cost
nothing, and whatever their hidden states hold (NaN included) reaches no sum.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

TILE_V = 8192
TILE_ELEMENTS = 2**24  # of logits held at a time: 64 MiB in fp32


class Head(NamedTuple):
    """A row of hidden states to a row of logits, one vocabulary tile at a time, never rounded below fp32."""

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    temperature: float

    def tiles(self) -> list[slice]:
        vocabulary = len(self.weight)
        return [slice(lo, min(lo + TILE_V, vocabulary)) for lo in range(0, vocabulary, TILE_V)]

    def weight_tile(self, tile: slice, dtype: torch.dtype) -> Tensor:
        return self.weight[tile].to(dtype)

    def logits(self, h_nD: Tensor, w_vD: Tensor, tile: slice) -> Tensor:
        bias_v = None if self.bias is None else self.bias[tile].to(h_nD.dtype)
        z_nv = torch.nn.functional.linear(h_nD, w_vD, bias_v)
        if self.softcap is not None:
            return z_nv.mul_(self.logit_scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        return z_nv if self.slope == 1 else z_nv.mul_(self.slope)

    @property
    def slope(self) -> float:
        """dz / d(hidden @ weight.T + bias), but for the softcap's factor."""
        return self.logit_scale / self.temperature

    def pull_back_(self, dz_nv: Tensor, z_nv: Tensor) -> Tensor:
        """slope * dL/dz to dL/d(hidden @ weight.T + bias), in place; tanh is read off the logits."""
        if self.softcap is None:
            return dz_nv
        tanh_nv = z_nv.mul_(self.temperature / self.softcap)
        return dz_nv.mul_(1 - tanh_nv.square_())


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def row_blocks(kept_N: Tensor, vocabulary: int) -> Iterator[slice | Tensor]:
    """The kept rows in blocks whose logits over one vocabulary tile hold at most TILE_ELEMENTS entries.

    Slices where every row is kept (they index without a copy), else row numbers.
    """
    size = max(1, TILE_ELEMENTS // min(TILE_V, vocabulary))
    if kept_N.all():
        for start in range(0, len(kept_N), size):
            yield slice(start, start + size)
    elif kept_N.any():
        yield from kept_N.nonzero().squeeze(1).split(size)


def place_target(target_n: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
    """(row, column) of the target entries that lie in the tile."""
    (row,) = torch.nonzero((target_n >= tile.start) & (target_n < tile.stop), as_tuple=True)
    return row, target_n[row] - tile.start


def linear_logp_forward(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    head = Head(weight_VD, bias_V, logit_scale, softcap, temperature)
    return _forward(hidden_ND, head, target_N, ignore_index, with_entropy=False)[:2]


def linear_logp_entropy_forward(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    head = Head(weight_VD, bias_V, logit_scale, softcap, temperature)
    return _forward(hidden_ND, head, target_N, ignore_index, with_entropy=True)


def _forward(
    hidden_ND: Tensor, head: Head, target_N: Tensor, ignore_index: int, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(hidden_ND)
    logp_N = hidden_ND.new_zeros(len(target_N), dtype=dtype)
    lse_N, entropy_N = torch.zeros_like(logp_N), torch.zeros_like(logp_N)
    for rows in row_blocks(target_N != ignore_index, len(head.weight)):
        h_nD, target_n = hidden_ND[rows].to(dtype), target_N[rows]
        z_target_n = logp_N.new_zeros(len(target_n))
        lse_tiles, entropy_tiles = [], []
        for tile in head.tiles():
            z_nv = head.logits(h_nD, head.weight_tile(tile, dtype), tile)
            row, column = place_target(target_n, tile)
            z_target_n[row] = z_nv[row, column]
            lse_tiles.append(z_nv.logsumexp(-1))
            if with_entropy:
                logq_nv = z_nv.sub_(lse_tiles[-1][:, None])
                entropy_tiles.append(-(logq_nv.exp() * logq_nv).sum(-1))
        lse_nt = torch.stack(lse_tiles, -1)
        lse_n = lse_nt.logsumexp(-1)
        lse_N[rows] = lse_n
        # above 0 only if a device's logsumexp rounds below the maximum: never a result
        logp_N[rows] = (z_target_n - lse_n).clamp_(max=0)
        if with_entropy:
            # chain rule of entropy over tiles, each term >= 0: H = sum_t P_t * (H_t - log P_t)
            logp_nt = lse_nt - lse_n[:, None]
            entropy_n = (logp_nt.exp() * (torch.stack(entropy_tiles, -1) - logp_nt)).sum(-1)
            entropy_N[rows] = entropy_n.clamp_(min=0)
    return logp_N, lse_N, entropy_N


def linear_logp_backward(
    grad_logp_N: Tensor,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    lse_N: Tensor,
    bias_V: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    filter_eps: float,  # a bound on what may be dropped: dropping nothing satisfies it
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    head = Head(weight_VD, bias_V, logit_scale, softcap, temperature)
    needs = need_hidden, need_weight, need_bias
    return _backward(grad_logp_N, None, hidden_ND, head, target_N, lse_N, None, ignore_index, needs)


def linear_logp_entropy_backward(
    grad_logp_N: Tensor,
    grad_entropy_N: Tensor,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    lse_N: Tensor,
    entropy_N: Tensor,
    bias_V: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    filter_eps: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    head = Head(weight_VD, bias_V, logit_scale, softcap, temperature)
    needs = need_hidden, need_weight, need_bias
    return _backward(grad_logp_N, grad_entropy_N, hidden_ND, head, target_N, lse_N, entropy_N, ignore_index, needs)


def _backward(
    grad_logp_N: Tensor,
    grad_entropy_N: Tensor | None,
    hidden_ND: Tensor,
    head: Head,
    target_N: Tensor,
    lse_N: Tensor,
    entropy_N: Tensor | None,
    ignore_index: int,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dz_v = g * ([v = target] - p_v) - g_H * p_v * (log p_v + H), then the two GEMMs of each tile."""
    need_hidden, need_weight, need_bias = needs
    dtype = compute_dtype(hidden_ND)
    dh_ND = hidden_ND.new_zeros(hidden_ND.shape, dtype=dtype) if need_hidden else None
    dw_VD = head.weight.new_empty(head.weight.shape) if need_weight else None
    db_V = None if head.bias is None or not need_bias else head.bias.new_empty(head.bias.shape)

    live_N = grad_logp_N != 0
    if grad_entropy_N is not None:
        live_N |= grad_entropy_N != 0
    live_N &= target_N != ignore_index

    for tile in head.tiles():
        w_vD = head.weight_tile(tile, dtype)
        dw_vD = w_vD.new_zeros(w_vD.shape if need_weight else 0)
        db_v = w_vD.new_zeros(len(w_vD))
        for rows in row_blocks(live_N, len(head.weight)):
            # the slope goes into the coefficients: one pass over N numbers instead of N * V
            h_nD, g_n = hidden_ND[rows].to(dtype), grad_logp_N[rows, None].to(dtype) * head.slope
            z_nv = head.logits(h_nD, w_vD, tile)
            logp_nv = z_nv - lse_N[rows, None]
            if grad_entropy_N is None or entropy_N is None:
                dz_nv = logp_nv.exp_().mul_(-g_n)
            else:
                gH_n = grad_entropy_N[rows, None].to(dtype) * head.slope
                dz_nv = (g_n + gH_n * (logp_nv + entropy_N[rows, None])).mul_(logp_nv.exp()).neg_()
            row, column = place_target(target_N[rows], tile)
            dz_nv[row, column] += g_n[row, 0]
            dz_nv = head.pull_back_(dz_nv, z_nv)
            if dh_ND is not None:
                dh_ND[rows] += dz_nv @ w_vD
            if dw_VD is not None:
                dw_vD.addmm_(dz_nv.T, h_nD)
            if db_V is not None:
                db_v += dz_nv.sum(0)
        if dw_VD is not None:
            dw_VD[tile] = dw_vD
        if db_V is not None:
            db_V[tile] = db_v
    return None if dh_ND is None else dh_ND.to(hidden_ND.dtype), dw_VD, db_V
