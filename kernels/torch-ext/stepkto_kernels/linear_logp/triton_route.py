"""Which (token, vocabulary tile) pairs the backward visits, decided on the device from the masses of the tiles.

Tokens are put into an order, `order`, in which the live ones come first and neighbours share tiles; j counts tokens
in that order, i its blocks of BLOCK tokens, t tiles of the vocabulary. Nothing here makes the host wait.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..routing import Routing, record, watching
from ..triton_backend import Compilation
from .eager import VOCAB_TILE
from .triton_math import NO_MASS, expm1

BLOCK = 128  # tokens
DENSE_RHO = 0.9  # above this share of pairs, leaving out the rest saves less than its error is worth
HALVINGS = tl.constexpr(12)  # of an interval log(T) wide: the threshold is found to 0.002 nats


@triton.jit
def score(log_mass, entropy, ENTROPY: tl.constexpr):
    """The logarithm of what a tile weighs: its mass or, with an entropy gradient, at least sum of p * |log p + H|
    over it: p * |log p + H| <= p * (|log P + H| - log(p / P)), and the entropy within a tile is at most log(TILE)."""
    if ENTROPY:
        return log_mass + tl.log(tl.abs(log_mass + entropy) + 4.852030263919617)  # log 128
    else:
        return log_mass


@triton.jit(do_not_specialize=["N"])
def route_rows(
    tile_lse,  # (T, N)
    lse,
    entropy,
    logp,
    home,  # (N,) the tile of the target, which is never left out; -1 for tokens that visit nothing
    threshold,  # (N,) out: tiles that score less are left out
    kept,  # (N,) out: how many are not
    dropped,  # (N,) out: what the others weigh, as a share of 1 - p_target
    N,
    T,
    filter_eps,
    log_tiles,
    ENTROPY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The largest threshold, found by bisection, under which the tiles together weigh at most filter_eps * (1 - p)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.arange(0, BLOCK_T)
    lse_N = tl.load(lse + n, mask=n < N, other=0.0)
    entropy_N = tl.load(entropy + n, mask=n < N, other=0.0) if ENTROPY else lse_N
    mask_TN = (t < T)[:, None] & (n < N)[None, :]
    log_mass_TN = tl.load(tile_lse + t.to(tl.int64)[:, None] * N + n[None, :], mask=mask_TN, other=NO_MASS)
    log_mass_TN -= lse_N[None, :]
    home_N = tl.load(home + n, mask=n < N, other=-1)
    is_home_TN = home_N[None, :] == t[:, None]
    none_TN = is_home_TN | (log_mass_TN == NO_MASS)
    score_TN = tl.where(none_TN, NO_MASS, score(log_mass_TN, entropy_N[None, :], ENTROPY))
    weight_TN = tl.exp(score_TN)
    rest_N = -expm1(tl.load(logp + n, mask=n < N, other=0.0))
    budget_N = filter_eps * rest_N
    low_N = tl.log(budget_N) - log_tiles - 0.01  # all tiles below this together stay within the budget
    high_N = tl.maximum(tl.max(score_TN, 0), low_N) + 1.0
    for _ in tl.static_range(HALVINGS):
        middle_N = 0.5 * (low_N + high_N)
        fits_N = tl.sum(tl.where(score_TN < middle_N[None, :], weight_TN, 0.0), 0) <= budget_N
        low_N = tl.where(fits_N, middle_N, low_N)
        high_N = tl.where(fits_N, high_N, middle_N)
    # where 1 - p underflows, so does every probability but the target's: there is nothing else to visit
    low_N = tl.where(budget_N > 0, low_N, float("inf"))
    left_out_TN = score_TN < low_N[None, :]
    tl.store(threshold + n, low_N, mask=n < N)
    tl.store(kept + n, tl.sum((mask_TN & (is_home_TN | (left_out_TN == 0))).to(tl.int32), 0), mask=n < N)
    share_N = tl.sum(tl.where(left_out_TN, weight_TN, 0.0), 0) / tl.where(rest_N > 0, rest_N, 1.0)
    tl.store(dropped + n, share_N, mask=n < N)


@triton.jit
def keeps(log_mass, entropy, threshold, home, t, ENTROPY: tl.constexpr):
    """Whether a token visits tile t: it weighs enough, or is that of the target. Never, where home is -1."""
    enough = (score(log_mass, entropy, ENTROPY) < threshold) == 0  # a NaN is visited
    return (home >= 0) & (enough | (home == t))


@triton.jit(do_not_specialize=["N"])
def tile_popularity(
    tile_lse,  # (T, N)
    lse,
    entropy,
    threshold,
    home,
    popularity,  # (T,) out: tokens that visit the tile
    N,
    ENTROPY: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    t = tl.program_id(0)
    count_N = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        log_mass_N = tl.load(tile_lse + tl.cast(t, tl.int64) * N + n, mask=n < N, other=NO_MASS)
        log_mass_N -= tl.load(lse + n, mask=n < N, other=0.0)
        entropy_N = tl.load(entropy + n, mask=n < N, other=0.0) if ENTROPY else log_mass_N
        threshold_N = tl.load(threshold + n, mask=n < N, other=0.0)
        home_N = tl.load(home + n, mask=n < N, other=-1)
        count_N += keeps(log_mass_N, entropy_N, threshold_N, home_N, t, ENTROPY).to(tl.int32)
    tl.store(popularity + t, tl.sum(count_N, 0))


@triton.jit(do_not_specialize=["N"])
def rarest_tiles(
    tile_lse,  # (T, N)
    lse,
    entropy,
    threshold,
    home,
    place,  # (T,): a tile's place among all, the least popular first
    key,  # (N,) int32 out
    N,
    T,
    ENTROPY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The key of the order: a token's least popular tile, then its second; tokens that visit none come last."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.arange(0, BLOCK_T)
    mask_TN = (t < T)[:, None] & (n < N)[None, :]
    log_mass_TN = tl.load(tile_lse + t.to(tl.int64)[:, None] * N + n[None, :], mask=mask_TN, other=NO_MASS)
    log_mass_TN -= tl.load(lse + n, mask=n < N, other=0.0)[None, :]
    entropy_N = tl.load(entropy + n, mask=n < N, other=0.0) if ENTROPY else tl.zeros((BLOCK_N,), tl.float32)
    threshold_N = tl.load(threshold + n, mask=n < N, other=0.0)
    home_N = tl.load(home + n, mask=n < N, other=-1)
    keep_TN = keeps(log_mass_TN, entropy_N[None, :], threshold_N[None, :], home_N[None, :], t[:, None], ENTROPY)
    place_TN = tl.where(keep_TN & mask_TN, tl.load(place + t, mask=t < T, other=0)[:, None], T)
    first_N = tl.min(place_TN, 0)
    second_N = tl.min(tl.where(place_TN == first_N[None, :], T, place_TN), 0)
    second_N = tl.where(first_N % 2 == 0, second_N, T - second_N)  # there and back: neighbours differ less
    tl.store(key + n, first_N * (T + 1) + second_N, mask=n < N)


@triton.jit(do_not_specialize=["N", "I"])
def route_pairs(
    tile_lse,  # (T, N)
    lse,
    entropy,
    threshold,
    home,
    order,  # (N,)
    rank,  # (T, N) int8 out: the pair's number among those of its tile and block, or -1
    counts,  # (T, I) out: how many those are
    N,
    I,
    ENTROPY: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    i, t = tl.program_id(0), tl.program_id(1)
    j = i * BLOCK_J + tl.arange(0, BLOCK_J)
    n = tl.load(order + j, mask=j < N, other=0)
    log_mass_J = tl.load(tile_lse + tl.cast(t, tl.int64) * N + n) - tl.load(lse + n)
    entropy_J = tl.load(entropy + n) if ENTROPY else log_mass_J
    keep_J = keeps(log_mass_J, entropy_J, tl.load(threshold + n), tl.load(home + n), t, ENTROPY)
    keep_J = (keep_J & (j < N)).to(tl.int32)
    before_J = tl.cumsum(keep_J, 0) - keep_J
    tl.store(rank + tl.cast(t, tl.int64) * N + j, tl.where(keep_J != 0, before_J, -1).to(tl.int8), mask=j < N)
    tl.store(counts + t * I + i, tl.sum(keep_J, 0))


class Routes(NamedTuple):
    """Chunk c holds the pairs of tiles first_tile[c] up to first_tile[c + 1]: at most `capacity` rows, of which each
    tile begins a new block. All on the device, but for the number of chunks and their capacity."""

    order: Tensor  # (N,) int32
    rank: Tensor  # (T, N) int8
    first: Tensor  # (T, I) int32: rows of a tile before block i
    base: Tensor  # (T + 1,) int64: rows before a tile
    first_tile: Tensor  # (chunks + 1,) int32
    active: Tensor  # (I, T) int32: the tiles that block i visits, in ascending order, then the others
    active_before: Tensor  # (I, T + 1) int32: how many of them come before tile t
    rows_of_chunks: int  # a chunk begins at a multiple of this
    capacity: int
    chunks: int


def route(
    live_N: Tensor,
    target_N: Tensor,
    logp_N: Tensor,
    lse_N: Tensor,
    tile_lse_TN: Tensor,
    entropy_N: Tensor | None,
    filter_eps: float,
    workspace_rows: int,
) -> Routes:
    """The pairs to visit; recorded for whoever watches."""
    tiles, tokens = tile_lse_TN.shape
    blocks, device = triton.cdiv(tokens, BLOCK), tile_lse_TN.device
    block_t = triton.next_power_of_2(tiles)
    block_n = rows_of_block(block_t)
    row_grid, has_entropy = (triton.cdiv(tokens, block_n),), entropy_N is not None
    per_token = lse_N, lse_N if entropy_N is None else entropy_N
    home_N = torch.where(live_N, target_N // VOCAB_TILE, -1).to(torch.int32)
    threshold_N = torch.full_like(lse_N, -torch.inf)
    dropped_N, kept_N = torch.zeros_like(lse_N), torch.full_like(live_N, tiles, dtype=torch.int32)
    if filter_eps > 0:
        route_rows[row_grid](
            tile_lse_TN, *per_token, logp_N, home_N, threshold_N, kept_N, dropped_N, tokens, tiles, filter_eps,
            math.log(tiles), ENTROPY=has_entropy, BLOCK_N=block_n, BLOCK_T=block_t, num_warps=4,
        )  # fmt: skip
    live_count = live_N.sum()
    all_pairs = (live_count * tiles).clamp(min=1)
    dense = torch.where(live_N, kept_N, 0).sum() / all_pairs > DENSE_RHO
    threshold_N = torch.where(dense, -torch.inf, threshold_N)
    pairs = tile_lse_TN, *per_token, threshold_N, home_N

    # Tokens that share a rare tile share most others: sorted so, a block of 128 visits about twice the tiles that one
    # of its tokens does; sorted by target, over five times (docs/journal.md).
    popularity_T, key_N = kept_N.new_empty(tiles), torch.empty_like(kept_N)
    tile_popularity[(tiles,)](*pairs, popularity_T, tokens, ENTROPY=has_entropy, BLOCK_N=1024)
    place_T = popularity_T.argsort(stable=True).argsort().to(torch.int32)
    rarest_tiles[row_grid](
        *pairs, place_T, key_N, tokens, tiles, ENTROPY=has_entropy, BLOCK_N=block_n, BLOCK_T=block_t, num_warps=4
    )
    order_N = key_N.argsort(stable=True).to(torch.int32)

    rank_TN = torch.empty(tiles, tokens, dtype=torch.int8, device=device)
    counts_TI = torch.empty(tiles, blocks, dtype=torch.int32, device=device)
    route_pairs[(blocks, tiles)](
        *pairs, order_N, rank_TN, counts_TI, tokens, blocks, ENTROPY=has_entropy, BLOCK_J=BLOCK
    )
    rows_T = (counts_TI.sum(1) + BLOCK - 1) // BLOCK * BLOCK
    base_T1 = torch.nn.functional.pad(rows_T.cumsum(0), (1, 0))
    capacity, chunks = chunk(tiles, blocks * BLOCK, workspace_rows)
    rows_of_chunks = capacity - blocks * BLOCK if chunks > 1 else capacity
    chunk_T = base_T1[:-1] // rows_of_chunks
    first_tile = torch.searchsorted(chunk_T, torch.arange(chunks + 1, device=device)).to(torch.int32)
    visits_IT = (counts_TI > 0).T
    if watching():
        share_N = torch.where(live_N & ~dense, dropped_N, 0)
        live_blocks = (live_count + BLOCK - 1) // BLOCK
        rho, rho_blocks = counts_TI.sum() / all_pairs, visits_IT.sum() / (live_blocks * tiles).clamp(min=1)
        record(Routing(rho, rho_blocks, share_N.max(), share_N.sum() / live_count.clamp(min=1), dense))
    return Routes(
        order_N,
        rank_TN,
        (counts_TI.cumsum(1) - counts_TI).to(torch.int32),
        base_T1,
        first_tile,
        (~visits_IT).to(torch.int8).sort(dim=1, stable=True).indices.to(torch.int32).contiguous(),
        torch.nn.functional.pad(visits_IT.cumsum(1), (1, 0)).to(torch.int32).contiguous(),
        rows_of_chunks,
        capacity,
        chunks,
    )


def rows_of_block(block_t: int) -> int:
    """Tokens a program routes at once: their tile masses stay in registers."""
    return max(1, min(32, 4096 // block_t))


def chunk(tiles: int, padded_tokens: int, workspace_rows: int) -> tuple[int, int]:
    """(capacity in rows, number of chunks) such that a tile with every token still fits behind where any begins."""
    everything = tiles * padded_tokens
    if everything <= workspace_rows:
        return everything, 1
    capacity = max(workspace_rows // BLOCK * BLOCK, 2 * padded_tokens)
    return capacity, triton.cdiv(everything, capacity - padded_tokens)


def compilations(chip: int) -> list[Compilation]:
    shipped = []
    for entropy in (False, True):
        pairs = {**dict.fromkeys(("tile_lse", "lse", "entropy", "threshold"), "*fp32"), "home": "*i32"}
        sizes = dict.fromkeys(("N", "T", "I"), "i32")
        for block_t in (256, 2048):  # vocabularies of up to 32768 and 262144
            label = f"{block_t} tiles{' entropy' * entropy}"
            blocks = {"ENTROPY": entropy, "BLOCK_N": rows_of_block(block_t), "BLOCK_T": block_t}
            outputs = {**dict.fromkeys(("logp", "dropped", "filter_eps", "log_tiles"), "*fp32"), "kept": "*i32"}
            outputs |= dict.fromkeys(("filter_eps", "log_tiles"), "fp32")
            shipped.append(Compilation(route_rows, pairs | sizes | outputs, blocks, 4, 3, False, label))
            outputs = dict.fromkeys(("place", "key"), "*i32")
            shipped.append(Compilation(rarest_tiles, pairs | sizes | outputs, blocks, 4, 3, False, label))
        label = "entropy" * entropy
        outputs = {**dict.fromkeys(("order", "counts", "popularity"), "*i32"), "rank": "*i8"}
        blocks = {"ENTROPY": entropy, "BLOCK_N": 1024}
        shipped.append(Compilation(tile_popularity, pairs | sizes | outputs, blocks, 4, 3, False, label))
        blocks = {"ENTROPY": entropy, "BLOCK_J": BLOCK}
        shipped.append(Compilation(route_pairs, pairs | sizes | outputs, blocks, 4, 3, False, label))
    return shipped
