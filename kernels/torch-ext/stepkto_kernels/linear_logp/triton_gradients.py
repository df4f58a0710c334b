"""The kernels of the backward: the list of a chunk's rows, the gradients of their logits, and the two products."""

import triton
import triton.language as tl

from .eager import VOCAB_TILE
from .triton_math import NO_MASS, expm1, logits, multiply, operand, rounded, rounded_to_tf32

TILE = tl.constexpr(VOCAB_TILE)


@triton.jit
def chunk_rows(base, first_tile, c):
    """First tile, tile after the last, first row, row after the last."""
    t0 = tl.load(first_tile + c)
    t1 = tl.load(first_tile + c + 1)
    return t0, t1, tl.load(base + t0), tl.load(base + t1)


@triton.jit(do_not_specialize=["N", "I", "c", "programs"])
def list_rows(
    order,
    rank,  # (T, N)
    first,  # (T, I)
    base,
    first_tile,
    row_token,  # (capacity,) out: the token of each row of the chunk, or -1 where a tile's last block is not full
    block_tile,  # (capacity / BLOCK_J,) out
    N,
    I,
    c,
    programs,
    BLOCK_J: tl.constexpr,
):
    t0, t1, row0, _ = chunk_rows(base, first_tile, c)
    for t in tl.range(t0 + tl.program_id(0), t1, programs):
        start, stop = tl.load(base + t) - row0, tl.load(base + t + 1) - row0
        for b in range(start // BLOCK_J, stop // BLOCK_J):
            tl.store(block_tile + b, t)
        rows = start.to(tl.int32)
        for i in range(0, I):
            j = i * BLOCK_J + tl.arange(0, BLOCK_J)
            rank_J = tl.load(rank + tl.cast(t, tl.int64) * N + j, mask=j < N, other=-1).to(tl.int32)
            before = start.to(tl.int32) + tl.load(first + t * I + i)
            tl.store(row_token + before + rank_J, tl.load(order + j, mask=j < N, other=0), mask=rank_J >= 0)
            rows = tl.maximum(rows, tl.max(tl.where(rank_J >= 0, before + rank_J + 1, 0), 0))
        tail = rows + tl.arange(0, BLOCK_J)
        tl.store(row_token + tail, -1, mask=tail < stop)


@triton.jit(do_not_specialize=["N", "c", "programs"])
def pair_gradients(
    hidden,  # (N, D)
    weight,  # (V, D): a descriptor with TMA, else a pointer
    bias,
    target,
    logp,
    lse,
    tile_lse,  # (T, N), with STORED
    tile_probs,  # (N, T * TILE), with STORED: instead of a product
    entropy,
    grad_logp,
    grad_entropy,
    base,
    first_tile,
    row_token,
    block_tile,
    gradients,  # (capacity, TILE) out: dL/d(hidden @ weight.T + bias), 0 in rows that hold no token
    N,
    V,
    D,
    stride_hidden,
    stride_weight,
    slope,
    cap_in,
    cap_out,
    c,
    programs,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    STORED: tl.constexpr,
    TO_TF32: tl.constexpr,  # what the gradients are multiplied in
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    _, _, row0, row1 = chunk_rows(base, first_tile, c)
    for b in tl.range(tl.program_id(0), ((row1 - row0) // BLOCK_J).to(tl.int32), programs):
        t = tl.load(block_tile + b)
        row = b * BLOCK_J + tl.arange(0, BLOCK_J)
        n = tl.load(row_token + row)
        if STORED:
            is_row = n >= 0
            width = tl.cdiv(V, TILE) * TILE
            from_JV = n.to(tl.int64)[:, None] * width + (t * TILE + tl.arange(0, TILE))[None, :]
            q_JV = tl.load(tile_probs + from_JV, mask=is_row[:, None], other=0.0).to(tl.float32)
            log_mass_J = tl.load(tile_lse + tl.cast(t, tl.int64) * N + n, mask=is_row, other=NO_MASS)
            log_mass_J -= tl.load(lse + n, mask=is_row, other=0.0)
            p_JV = q_JV * tl.exp(log_mass_J)[:, None]
            logq_JV = tl.where(q_JV > 0, tl.log(q_JV) + log_mass_J[:, None], 0.0)
        else:
            hidden_J = hidden + n.to(tl.int64) * stride_hidden
            acc_JV = tl.zeros((BLOCK_J, TILE), tl.float32)
            for k in range(0, D, BLOCK_D):
                d = k + tl.arange(0, BLOCK_D)
                h_JD = tl.load(hidden_J[:, None] + d[None, :], mask=(n >= 0)[:, None] & (d < D)[None, :], other=0.0)
                w_VD = operand(weight, t * TILE, V, k, D, stride_weight, TILE, BLOCK_D, TMA)
                acc_JV = multiply(h_JD, w_VD.T, acc_JV, PRECISION, INTERPRET)
            is_row = n >= 0
            v = t * TILE + tl.arange(0, TILE)
            bias_V = tl.load(bias + v, mask=v < V, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
            z_JV = logits(acc_JV, bias_V, slope, cap_in, cap_out, HAS_BIAS, HAS_SOFTCAP)
            logq_JV = z_JV - tl.load(lse + n, mask=is_row, other=0.0)[:, None]
            p_JV = tl.exp(logq_JV)
        g_J = slope * tl.load(grad_logp + n, mask=is_row, other=0.0)
        logp_J = tl.load(logp + n, mask=is_row, other=0.0)
        at_target_J = -g_J * expm1(logp_J)  # g * (1 - p), to the last digit for p near 1
        if ENTROPY:
            gh_J = slope * tl.load(grad_entropy + n, mask=is_row, other=0.0)
            entropy_J = tl.load(entropy + n, mask=is_row, other=0.0)
            dz_JV = -(g_J[:, None] + gh_J[:, None] * (logq_JV + entropy_J[:, None])) * p_JV
            at_target_J -= gh_J * tl.exp(logp_J) * (logp_J + entropy_J)
        else:
            dz_JV = -g_J[:, None] * p_JV
        column_J = (tl.load(target + n, mask=is_row, other=-1) - t * TILE).to(tl.int32)
        dz_JV = tl.where(column_J[:, None] == tl.arange(0, TILE)[None, :], at_target_J[:, None], dz_JV)
        if HAS_SOFTCAP:
            tanh_JV = z_JV / cap_out
            dz_JV *= 1 - tanh_JV * tanh_JV
        inside_V = t * TILE + tl.arange(0, TILE) < V
        dz_JV = tl.where(is_row[:, None] & inside_V[None, :], dz_JV, 0.0)
        if TO_TF32:
            dz_JV = rounded_to_tf32(dz_JV)
        out = gradients + row.to(tl.int64)[:, None] * TILE + tl.arange(0, TILE)[None, :]
        tl.store(out, rounded(dz_JV, gradients.dtype.element_ty, INTERPRET))


@triton.jit(do_not_specialize=["c", "programs"])
def weight_gradients(
    gradients,  # (capacity, TILE)
    hidden,  # (N, D)
    row_token,
    base,
    first_tile,
    dweight,  # (V, D) out, contiguous
    dbias,  # (V,) out
    V,
    D,
    stride_hidden,
    c,
    programs,
    NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t0, t1, row0, _ = chunk_rows(base, first_tile, c)
    d_blocks = tl.maximum(tl.cdiv(D, BLOCK_D), 1) if NEED_WEIGHT else 1
    for unit in tl.range(tl.program_id(0), (t1 - t0) * d_blocks, programs):
        t, d0 = t0 + unit // d_blocks, unit % d_blocks * BLOCK_D
        v = t * TILE + tl.arange(0, TILE)
        d = d0 + tl.arange(0, BLOCK_D)
        start = (tl.load(base + t) - row0).to(tl.int32)
        stop = (tl.load(base + t + 1) - row0).to(tl.int32)
        acc_VD = tl.zeros((TILE, BLOCK_D), tl.float32)
        acc_V = tl.zeros((TILE,), tl.float32)
        for r in range(start, stop, BLOCK_R):
            row = r + tl.arange(0, BLOCK_R)
            at = row.to(tl.int64)[:, None] * TILE + tl.arange(0, TILE)[None, :]
            g_RV = tl.load(gradients + at)
            if NEED_BIAS:
                acc_V += tl.sum(g_RV.to(tl.float32), 0)
            if NEED_WEIGHT:
                n = tl.load(row_token + row)
                h_RD = tl.load(
                    hidden + n.to(tl.int64)[:, None] * stride_hidden + d[None, :],
                    mask=(n >= 0)[:, None] & (d < D)[None, :],
                    other=0.0,
                ).to(g_RV.dtype)
                acc_VD = multiply(g_RV.T, h_RD, acc_VD, PRECISION, INTERPRET)
        if NEED_WEIGHT:
            out = dweight + v.to(tl.int64)[:, None] * D + d[None, :]
            tl.store(
                out, rounded(acc_VD, dweight.dtype.element_ty, INTERPRET), mask=(v < V)[:, None] & (d < D)[None, :]
            )
        if NEED_BIAS:  # noqa: SIM102 (a compile-time flag, then a value)
            if d0 == 0:
                tl.store(dbias + v, rounded(acc_V, dbias.dtype.element_ty, INTERPRET), mask=v < V)


@triton.jit(do_not_specialize=["N", "I", "c"])
def hidden_gradients(
    gradients,  # (capacity, TILE)
    weight,  # (V, D): a descriptor with TMA, else a pointer
    order,
    rank,  # (T, N)
    first,  # (T, I)
    base,
    first_tile,
    active,  # (I, T)
    active_before,  # (I, T + 1)
    dhidden,  # (N, D) in and out, contiguous
    remainder,  # (N, D) in and out: what dhidden's 16 bits leave of the sum over earlier chunks
    N,
    V,
    D,
    T,
    I,
    stride_weight,
    c,
    FIRST: tl.constexpr,  # chunk: nothing to add to
    REMAINDER: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,  # TILE / BLOCK_V
):
    i, d0 = tl.program_id(0), tl.program_id(1) * BLOCK_D
    t0, t1, row0, _ = chunk_rows(base, first_tile, c)
    if t0 < t1:
        j = i * BLOCK_J + tl.arange(0, BLOCK_J)
        d = d0 + tl.arange(0, BLOCK_D)
        n = tl.load(order + j, mask=j < N, other=0)
        at = n.to(tl.int64)[:, None] * D + d[None, :]
        mask = (j < N)[:, None] & (d < D)[None, :]
        if FIRST:
            acc_JD = tl.zeros((BLOCK_J, BLOCK_D), tl.float32)
        else:
            acc_JD = tl.load(dhidden + at, mask=mask, other=0.0).to(tl.float32)
            if REMAINDER:
                acc_JD += tl.load(remainder + at, mask=mask, other=0.0).to(tl.float32)
        a0 = tl.load(active_before + tl.cast(i, tl.int64) * (T + 1) + t0)
        a1 = tl.load(active_before + tl.cast(i, tl.int64) * (T + 1) + t1)
        for step in range(a0 * SPLIT, a1 * SPLIT):
            t = tl.load(active + tl.cast(i, tl.int64) * T + step // SPLIT)
            v0 = step % SPLIT * BLOCK_V
            rank_J = tl.load(rank + tl.cast(t, tl.int64) * N + j, mask=j < N, other=-1).to(tl.int32)
            before = (tl.load(base + t) - row0) + tl.load(first + tl.cast(t, tl.int64) * I + i)
            from_JV = (before + rank_J)[:, None] * TILE + (v0 + tl.arange(0, BLOCK_V))[None, :]
            g_JV = tl.load(gradients + from_JV, mask=(rank_J >= 0)[:, None], other=0.0)
            w_VD = operand(weight, t * TILE + v0, V, d0, D, stride_weight, BLOCK_V, BLOCK_D, TMA).to(g_JV.dtype)
            acc_JD = multiply(g_JV, w_VD, acc_JD, PRECISION, INTERPRET)
        n = tl.load(order + j, mask=j < N, other=0)
        at = n.to(tl.int64)[:, None] * D + d[None, :]
        mask = (j < N)[:, None] & (d < D)[None, :]
        rounded_JD = rounded(acc_JD, dhidden.dtype.element_ty, INTERPRET)
        tl.store(dhidden + at, rounded_JD, mask=mask)
        if REMAINDER:
            nearest_JD = rounded_JD.to(tl.float32)
            left_JD = tl.where(tl.abs(nearest_JD) < float("inf"), acc_JD - nearest_JD, 0.0)  # inf - inf is NaN
            tl.store(remainder + at, rounded(left_JD, remainder.dtype.element_ty, INTERPRET), mask=mask)
