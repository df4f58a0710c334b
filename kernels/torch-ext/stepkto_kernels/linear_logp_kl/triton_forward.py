"""The forward of linear_logp_kl on a GPU: policy and reference logits of a block side by side in registers, reduced to
two log-sum-exps and one KL per (token, vocabulary tile); then one pass over those. One read of the head's weights
where both models share it."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..linear_logp.eager import VOCAB_TILE, vocab_tiles
from ..linear_logp.triton_forward import ELEMENT, Config, precision, rows_contiguous, scalars, tma
from ..linear_logp.triton_math import NO_MASS, grouped, log_sum_exp, logits, multiply, operand
from ..triton_backend import Compilation, chip, interpreting, multiprocessors


@triton.jit
def row_log_sum_exp(z_NV):
    """-inf for a row without a finite entry."""
    m_N = tl.max(z_NV, 1)
    m_N = tl.where(m_N == NO_MASS, 0.0, m_N)
    return m_N + tl.log(tl.sum(tl.exp(z_NV - m_N[:, None]), 1))


@triton.jit(do_not_specialize=["N", "ignore_index", "programs"])
def linear_logp_kl_tiles(
    hidden,  # (N, D): descriptors with TMA, else pointers
    weight,  # (V, D)
    ref_hidden,  # (N, E)
    ref_weight,  # (V, E); not read with SAME_WEIGHT
    bias,
    ref_bias,
    target,
    tile_lse,  # (T, N) out
    ref_tile_lse,  # (T, N) out
    tile_kl,  # (T, N) out: KL between the two softmaxes within the tile
    target_logit,  # (N,) out
    ref_target_logit,  # (N,) out
    N,
    V,
    D,
    E,
    stride_hidden,
    stride_weight,
    stride_ref_hidden,
    stride_ref_weight,
    slope,
    cap_in,
    cap_out,
    ignore_index,
    programs,
    SAME_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_REF_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    REF_PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_blocks, col_blocks = tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V)
    for index in tl.range(tl.program_id(0), row_blocks * col_blocks, programs):
        i, j = grouped(index, row_blocks, col_blocks, GROUP)
        n = i * BLOCK_N + tl.arange(0, BLOCK_N)
        v = j * BLOCK_V + tl.arange(0, BLOCK_V)
        live_N = tl.load(target + n, mask=n < N, other=ignore_index) != ignore_index
        if tl.max(live_N.to(tl.int32), 0) != 0:
            acc_NV = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
            ref_acc_NV = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
            for k in range(0, D, BLOCK_D):
                h_ND = operand(hidden, i * BLOCK_N, N, k, D, stride_hidden, BLOCK_N, BLOCK_D, TMA)
                w_VD = operand(weight, j * BLOCK_V, V, k, D, stride_weight, BLOCK_V, BLOCK_D, TMA)
                acc_NV = multiply(h_ND, w_VD.T, acc_NV, PRECISION, INTERPRET)
                if SAME_WEIGHT:
                    h_ND = operand(ref_hidden, i * BLOCK_N, N, k, D, stride_ref_hidden, BLOCK_N, BLOCK_D, TMA)
                    ref_acc_NV = multiply(h_ND, w_VD.T, ref_acc_NV, REF_PRECISION, INTERPRET)
            if not SAME_WEIGHT:
                for k in range(0, E, BLOCK_D):
                    h_NE = operand(ref_hidden, i * BLOCK_N, N, k, E, stride_ref_hidden, BLOCK_N, BLOCK_D, TMA)
                    w_VE = operand(ref_weight, j * BLOCK_V, V, k, E, stride_ref_weight, BLOCK_V, BLOCK_D, TMA)
                    ref_acc_NV = multiply(h_NE, w_VE.T, ref_acc_NV, REF_PRECISION, INTERPRET)
            bias_V = tl.load(bias + v, mask=v < V, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
            ref_bias_V = tl.load(ref_bias + v, mask=v < V, other=0.0).to(tl.float32) if HAS_REF_BIAS else 0.0
            z_NV = logits(acc_NV, bias_V, slope, cap_in, cap_out, HAS_BIAS, HAS_SOFTCAP)
            y_NV = logits(ref_acc_NV, ref_bias_V, slope, cap_in, cap_out, HAS_REF_BIAS, HAS_SOFTCAP)
            target_N = tl.load(target + n, mask=n < N, other=ignore_index)
            column_N = tl.where(target_N == ignore_index, -1, target_N - j * BLOCK_V)
            here_N = (column_N >= 0) & (column_N < BLOCK_V)
            z_NV = tl.where((v < V)[None, :], z_NV, NO_MASS)
            if tl.max(here_N.to(tl.int32), 0) != 0:
                is_target_NV = column_N.to(tl.int32)[:, None] == tl.arange(0, BLOCK_V)[None, :]
                tl.store(target_logit + n, tl.sum(tl.where(is_target_NV, z_NV, 0.0), 1), mask=here_N)
                tl.store(ref_target_logit + n, tl.sum(tl.where(is_target_NV, y_NV, 0.0), 1), mask=here_N)
                z_NV = tl.where(is_target_NV, NO_MASS, z_NV)
            y_NV = tl.where(z_NV == NO_MASS, NO_MASS, y_NV)
            lse_N, ref_lse_N = row_log_sum_exp(z_NV), row_log_sum_exp(y_NV)
            finite_N = tl.where(ref_lse_N == NO_MASS, 0.0, ref_lse_N)  # a reference without mass here: KL is infinite
            term_NV = tl.exp(z_NV - lse_N[:, None]) * ((z_NV - y_NV) - (lse_N - finite_N)[:, None])
            kl_N = tl.sum(tl.where(z_NV == NO_MASS, 0.0, term_NV), 1)
            out = tl.cast(j, tl.int64) * N + n
            tl.store(tile_lse + out, lse_N, mask=n < N)
            tl.store(ref_tile_lse + out, ref_lse_N, mask=n < N)
            tl.store(tile_kl + out, kl_N, mask=n < N)


@triton.jit(do_not_specialize=["N", "ignore_index"])
def linear_logp_kl_rows(
    tile_lse,  # (T, N)
    ref_tile_lse,
    tile_kl,
    target_logit,  # (N,)
    ref_target_logit,
    target,
    logp,  # (N,) out
    ref_logp,
    kl,
    lse,
    N,
    T,
    ignore_index,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """KL = sum over the target and all tiles of P * (KL within it + log P - log Q)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    kept_N = (n < N) & (tl.load(target + n, mask=n < N, other=ignore_index) != ignore_index)
    z_N = tl.load(target_logit + n, mask=kept_N, other=0.0)
    y_N = tl.load(ref_target_logit + n, mask=kept_N, other=0.0)
    lse_N, logp_N = log_sum_exp(tile_lse, z_N, n, kept_N, N, T, BLOCK_N, BLOCK_T)
    ref_lse_N, ref_logp_N = log_sum_exp(ref_tile_lse, y_N, n, kept_N, N, T, BLOCK_N, BLOCK_T)
    kl_N = tl.exp(logp_N) * (logp_N - ref_logp_N)
    for t0 in range(0, T, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        at_TN = t.to(tl.int64)[:, None] * N + n[None, :]
        mask_TN = (t < T)[:, None] & kept_N[None, :]
        log_mass_TN = tl.load(tile_lse + at_TN, mask=mask_TN, other=NO_MASS) - lse_N[None, :]
        ref_log_mass_TN = tl.load(ref_tile_lse + at_TN, mask=mask_TN, other=NO_MASS) - ref_lse_N[None, :]
        mass_TN = tl.exp(log_mass_TN)
        term_TN = tl.load(tile_kl + at_TN, mask=mask_TN, other=0.0) + log_mass_TN - ref_log_mass_TN
        kl_N += tl.sum(tl.where(mass_TN == 0, 0.0, mass_TN * term_TN), 0)  # NaN stays NaN
    tl.store(lse + n, tl.where(kept_N, lse_N, 0.0), mask=n < N)
    tl.store(logp + n, tl.where(kept_N, logp_N, 0.0), mask=n < N)
    tl.store(ref_logp + n, tl.where(kept_N, ref_logp_N, 0.0), mask=n < N)
    tl.store(kl + n, tl.where(kept_N, tl.where(kl_N < 0, 0.0, kl_N), 0.0), mask=n < N)


def config(chip: int, dtype: torch.dtype) -> Config:
    """Two accumulators of BLOCK_N x BLOCK_V, BLOCK_V the width of a tile."""
    if dtype == torch.float32:
        return Config(16, VOCAB_TILE, 16, 8, 2, 4, 2)
    return Config(64, VOCAB_TILE, 64, 8, 1, 8, 2 if chip in (89, 120) else 4)


def same_matrix(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


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
    (tokens, size), vocabulary = hidden_ND.shape, len(weight_VD)
    tiles, same_weight = vocab_tiles(vocabulary), same_matrix(weight_VD, ref_weight_VE)
    if ref_hidden_NE.dtype == torch.float64:  # computed in the policy's precision
        ref_hidden_NE, ref_weight_VE = ref_hidden_NE.float(), ref_weight_VE.float()
        ref_bias_V = None if ref_bias_V is None else ref_bias_V.float()
    hidden_ND, weight_VD, ref_hidden_NE, ref_weight_VE = map(
        rows_contiguous, (hidden_ND, weight_VD, ref_hidden_NE, ref_weight_VE)
    )
    target_N = target_N.contiguous()
    new = target_N.new_empty
    logp_N, ref_logp_N, kl_N, lse_N, z_N, y_N = (new(tokens, dtype=torch.float32) for _ in range(6))
    tile_lse_TN, ref_tile_lse_TN, tile_kl_TN = (new(tiles, tokens, dtype=torch.float32) for _ in range(3))
    if not tokens:
        return logp_N, ref_logp_N, kl_N, lse_N, tile_lse_TN
    c = config(chip(hidden_ND), torch.promote_types(hidden_ND.dtype, ref_hidden_NE.dtype))
    operands = hidden_ND, weight_VD, ref_hidden_NE, ref_weight_VE
    use_tma = tma(chip(hidden_ND), *operands)
    rows = c.BLOCK_N, c.BLOCK_V, c.BLOCK_N, c.BLOCK_V
    blocks = triton.cdiv(tokens, c.BLOCK_N) * tiles
    programs = min(blocks, c.per_multiprocessor * multiprocessors(hidden_ND))
    linear_logp_kl_tiles[(programs,)](
        *(
            TensorDescriptor.from_tensor(x, [size, c.BLOCK_D]) if use_tma else x
            for x, size in zip(operands, rows, strict=True)
        ),
        hidden_ND if bias_V is None else bias_V.contiguous(),
        ref_hidden_NE if ref_bias_V is None else ref_bias_V.contiguous(),
        target_N,
        tile_lse_TN,
        ref_tile_lse_TN,
        tile_kl_TN,
        z_N,
        y_N,
        tokens,
        vocabulary,
        size,
        ref_hidden_NE.shape[1],
        *(x.stride(0) for x in operands),
        *scalars(logit_scale, softcap, temperature),
        ignore_index,
        programs,
        SAME_WEIGHT=same_weight,
        HAS_BIAS=bias_V is not None,
        HAS_REF_BIAS=ref_bias_V is not None,
        HAS_SOFTCAP=softcap is not None,
        PRECISION=precision(hidden_ND.dtype),
        REF_PRECISION=precision(ref_hidden_NE.dtype),
        TMA=use_tma,
        INTERPRET=interpreting(),
        **c.options(),
    )
    linear_logp_kl_rows[(triton.cdiv(tokens, 32),)](
        tile_lse_TN,
        ref_tile_lse_TN,
        tile_kl_TN,
        z_N,
        y_N,
        target_N,
        logp_N,
        ref_logp_N,
        kl_N,
        lse_N,
        tokens,
        tiles,
        ignore_index,
        BLOCK_N=32,
        BLOCK_T=64,
    )
    return logp_N, ref_logp_N, kl_N, lse_N, tile_lse_TN


def compilations(chip: int) -> list[Compilation]:
    shipped = []
    for dtype, element in ELEMENT.items():
        c = config(chip, dtype)
        blocks = c.options()
        warps, stages = blocks.pop("num_warps"), blocks.pop("num_stages")
        rows = {"hidden": c.BLOCK_N, "weight": c.BLOCK_V, "ref_hidden": c.BLOCK_N, "ref_weight": c.BLOCK_V}
        for same, extras in ((False, False), (True, False), (False, True)):
            for use_tma in (False, True) if chip >= 90 and dtype != torch.float32 else (False,):
                signature = {
                    name: f"tensordesc<{element}[{size}, {c.BLOCK_D}]>" if use_tma else f"*{element}"
                    for name, size in rows.items()
                } | {
                    **dict.fromkeys(("bias", "ref_bias"), f"*{element}"),
                    "target": "*i64",
                    **dict.fromkeys(("tile_lse", "ref_tile_lse", "tile_kl"), "*fp32"),
                    **dict.fromkeys(("target_logit", "ref_target_logit"), "*fp32"),
                    **dict.fromkeys(("N", "V", "ignore_index", "programs"), "i32"),
                    **dict.fromkeys(("D", "E", *(f"stride_{name}" for name in rows)), "i32:16"),
                    **dict.fromkeys(("slope", "cap_in", "cap_out"), "fp32"),
                }
                flags = {"SAME_WEIGHT": same, "HAS_BIAS": extras, "HAS_REF_BIAS": extras, "HAS_SOFTCAP": extras}
                kinds = {"PRECISION": "ieee", "REF_PRECISION": "ieee", "TMA": use_tma, "INTERPRET": False}
                label = f"{element}{' one head' * same}{' softcap bias' * extras}{' tma' * use_tma}"
                matrix = dtype != torch.float32
                shipped.append(
                    Compilation(linear_logp_kl_tiles, signature, flags | kinds | blocks, warps, stages, matrix, label)
                )
    signature = {
        **dict.fromkeys(("tile_lse", "ref_tile_lse", "tile_kl", "target_logit", "ref_target_logit"), "*fp32"),
        **dict.fromkeys(("logp", "ref_logp", "kl", "lse"), "*fp32"),
        "target": "*i64",
        **dict.fromkeys(("N", "T", "ignore_index"), "i32"),
    }
    shipped.append(Compilation(linear_logp_kl_rows, signature, {"BLOCK_N": 32, "BLOCK_T": 64}, 4, 3, False))
    return shipped
