"""The reference backend of linear_logp and linear_logp_entropy: torch calls over bounded tiles of the logits.

Rows that are ignored, and in the backward rows whose coefficients are 0, are taken out first: they cost
nothing, and whatever their hidden states hold (NaN included) reaches no sum.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import triton_backend

VOCAB_TILE = 128  # width of the vocabulary tiles whose log-sum-exps a forward saves, on every backend
STORED_BYTES = 2**28  # the most that a forward may keep for an exact backward; see `stores_probs`
TILE_V = 8192  # a multiple of it: what this backend multiplies at a time
LOWEST = -1e30  # what a log-probability of -inf is clamped to where it is multiplied by its probability, 0
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


def vocab_tiles(vocabulary: int) -> int:
    return -(-vocabulary // VOCAB_TILE)


def stores_probs(hidden_ND: Tensor, weight_VD: Tensor, softcap: float | None, filter_eps: float) -> bool:
    """Whether a forward keeps each tile's softmax, in 16 bits, so that the backward need not multiply again.

    Only where the backward visits every tile for certain (filter_eps 0), and 16 bits are what it would round the
    gradient of a logit to anyway; not on CPUs, whose kernels do not use it.
    """
    elements = len(hidden_ND) * vocab_tiles(len(weight_VD)) * VOCAB_TILE
    on_gpu = hidden_ND.device.type == "cuda" or triton_backend.interpreting()
    sixteen_bits = hidden_ND.dtype in (torch.bfloat16, torch.float16)
    return on_gpu and sixteen_bits and softcap is None and filter_eps == 0 and 2 * elements <= STORED_BYTES


def probs_shape(stored: bool, tokens: int, vocabulary: int) -> tuple[int, int]:
    return (tokens, vocab_tiles(vocabulary) * VOCAB_TILE) if stored else (0, 0)


def tile_logsumexp(z_nv: Tensor) -> Tensor:
    """(n, v) logits to the (n, ceil(v / VOCAB_TILE)) log-sum-exps of their tiles."""
    short = -z_nv.shape[1] % VOCAB_TILE
    if short:
        z_nv = torch.nn.functional.pad(z_nv, (0, short), value=-torch.inf)
    return z_nv.unflatten(1, (-1, VOCAB_TILE)).logsumexp(-1)


def finite(lse_n: Tensor) -> Tensor:
    """Logarithms that can be subtracted: that of a tile which holds nothing but the target is -inf."""
    return torch.where(lse_n == -torch.inf, 0, lse_n)


def linear_logp_forward(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    store_probs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logp, lse, tile_lse, tile_probs): see the op."""
    head = Head(weight_VD, bias_V, logit_scale, softcap, temperature)
    return forward(hidden_ND, head, target_N, ignore_index, store_probs, with_entropy=False)[:4]


def linear_logp_entropy_forward(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    store_probs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp, lse, tile_lse, tile_probs, entropy): see the op."""
    head = Head(weight_VD, bias_V, logit_scale, softcap, temperature)
    return forward(hidden_ND, head, target_N, ignore_index, store_probs, with_entropy=True)


def forward(
    hidden_ND: Tensor,
    head: Head,
    target_N: Tensor,
    ignore_index: int,
    store_probs: bool,
    with_entropy: bool,
    observe: Callable[[slice | Tensor, slice, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The target's own entry is kept apart from all sums, so that 1 - p of a confident token keeps its digits.

    A target that is no entry of this head (of a shard, then) has probability 0 here. `observe(rows, tile, z_nv)` is
    shown all logits on their way.
    """
    dtype = compute_dtype(hidden_ND)
    logp_N = hidden_ND.new_zeros(len(target_N), dtype=dtype)
    lse_N, entropy_N = torch.zeros_like(logp_N), torch.zeros_like(logp_N)
    tile_lse_TN = logp_N.new_zeros(vocab_tiles(len(head.weight)), len(target_N))
    tile_probs_NV = hidden_ND.new_zeros(probs_shape(store_probs, len(target_N), len(head.weight)))
    for rows in row_blocks(target_N != ignore_index, len(head.weight)):
        h_nD, target_n = hidden_ND[rows].to(dtype), target_N[rows]
        z_target_n = logp_N.new_full((len(target_n),), -torch.inf)
        lse_tiles, entropy_tiles = [], []
        for tile in head.tiles():
            z_nv = head.logits(h_nD, head.weight_tile(tile, dtype), tile)
            if observe is not None:
                observe(rows, tile, z_nv)
            row, column = place_target(target_n, tile)
            z_target_n[row] = z_nv[row, column]
            z_nv[row, column] = -torch.inf
            lse_nt = tile_logsumexp(z_nv)
            tile_lse_TN[tile.start // VOCAB_TILE :][: lse_nt.shape[1], rows] = lse_nt.T
            lse_tiles.append(lse_nt.logsumexp(-1))
            if store_probs:
                within_nv = finite(lse_nt).repeat_interleave(VOCAB_TILE, 1)[:, : z_nv.shape[1]]
                tile_probs_NV[rows, tile] = (z_nv - within_nv).exp().to(tile_probs_NV.dtype)
            if with_entropy:
                logq_nv = z_nv.sub_(finite(lse_tiles[-1])[:, None])
                terms_nv = logq_nv.exp().mul_(logq_nv.clamp_(min=LOWEST))
                terms_nv[row, column] = 0
                entropy_tiles.append(-terms_nv.sum(-1))
        lse_nt = torch.stack(lse_tiles, -1)
        rest_n = lse_nt.logsumexp(-1)
        lse_n = torch.logaddexp(rest_n, z_target_n)
        logp_n = -torch.logaddexp(rest_n - z_target_n, torch.zeros_like(rest_n))
        lse_N[rows], logp_N[rows] = lse_n, logp_n
        if with_entropy:
            # chain rule of entropy over the target and the tiles, each term >= 0: H = sum_t P_t * (H_t - log P_t)
            logp_nt = lse_nt - lse_n[:, None]
            p_nt = logp_nt.exp()
            of_tiles_n = (p_nt * torch.stack(entropy_tiles, -1) + torch.special.entr(p_nt)).sum(-1)
            entropy_N[rows] = of_tiles_n - logp_n.exp() * finite(logp_n)
    return logp_N, lse_N, tile_lse_TN, tile_probs_NV, entropy_N


def linear_logp_backward(
    grad_logp_N: Tensor,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    logp_N: Tensor,
    lse_N: Tensor,
    tile_lse_TN: Tensor,  # for backends that skip tiles
    tile_probs_NV: Tensor,  # for backends that need not multiply again
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
    return _backward(grad_logp_N, None, hidden_ND, head, target_N, logp_N, lse_N, None, ignore_index, needs)


def linear_logp_entropy_backward(
    grad_logp_N: Tensor,
    grad_entropy_N: Tensor,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    logp_N: Tensor,
    lse_N: Tensor,
    tile_lse_TN: Tensor,
    tile_probs_NV: Tensor,
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
    return _backward(
        grad_logp_N, grad_entropy_N, hidden_ND, head, target_N, logp_N, lse_N, entropy_N, ignore_index, needs
    )


def _backward(
    grad_logp_N: Tensor,
    grad_entropy_N: Tensor | None,
    hidden_ND: Tensor,
    head: Head,
    target_N: Tensor,
    logp_N: Tensor,
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
            row, column = place_target(target_N[rows], tile)
            logp_n = logp_N[rows][row]
            target_term_n = -g_n[row, 0] * logp_n.expm1()  # g * (1 - p), to the last digit for p near 1
            if grad_entropy_N is None or entropy_N is None:
                dz_nv = logp_nv.exp_().mul_(-g_n)
            else:
                gH_n, entropy_n = grad_entropy_N[rows, None].to(dtype) * head.slope, entropy_N[rows, None]
                p_nv = logp_nv.exp()
                dz_nv = (g_n + gH_n * (logp_nv.clamp_(min=LOWEST) + entropy_n)).mul_(p_nv).neg_()
                target_term_n -= gH_n[row, 0] * logp_n.exp() * (logp_n.clamp(min=LOWEST) + entropy_n[row, 0])
            dz_nv[row, column] = target_term_n
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
