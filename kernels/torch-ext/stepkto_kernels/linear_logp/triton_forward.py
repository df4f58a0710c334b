"""The forward of linear_logp, its entropy and stats on a GPU: one GEMM whose epilogue keeps, instead of logits, the
log-sum-exp of each (token, vocabulary tile); then one pass over those."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..triton_backend import Compilation, chip, interpreting, multiprocessors
from .eager import VOCAB_TILE, probs_shape, vocab_tiles
from .triton_math import NO_MASS, grouped, log_sum_exp, logits, multiply, operand, rounded

TILE = tl.constexpr(VOCAB_TILE)


@triton.jit(do_not_specialize=["N", "ignore_index", "programs"])  # they change from call to call
def linear_logp_tiles(
    hidden,  # (N, D): a descriptor with TMA, else a pointer
    weight,  # (V, D)
    bias,
    target,
    tile_lse,  # (T, N) out
    tile_entropy,  # (T, N) out, with ENTROPY
    tile_probs,  # (N, T * TILE) out, with STORE
    tile_stats,  # (3, T, N) out, with STATS: sum of logits, of squares of the softmax, and the target's largest rival
    target_logit,  # (N,) out
    N,
    V,
    D,
    stride_hidden,
    stride_weight,
    slope,
    cap_in,
    cap_out,
    ignore_index,
    programs,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    STORE: tl.constexpr,
    STATS: tl.constexpr,
    PRECISION: tl.constexpr,
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
        if tl.max(live_N.to(tl.int32), 0) != 0:  # a block of prompt tokens costs nothing
            acc_NV = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
            for k in range(0, D, BLOCK_D):
                h_ND = operand(hidden, i * BLOCK_N, N, k, D, stride_hidden, BLOCK_N, BLOCK_D, TMA)
                w_VD = operand(weight, j * BLOCK_V, V, k, D, stride_weight, BLOCK_V, BLOCK_D, TMA)
                acc_NV = multiply(h_ND, w_VD.T, acc_NV, PRECISION, INTERPRET)
            bias_V = tl.load(bias + v, mask=v < V, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
            z_NV = logits(acc_NV, bias_V, slope, cap_in, cap_out, HAS_BIAS, HAS_SOFTCAP)
            if STATS:
                sum_NT = tl.sum(tl.reshape(tl.where((v < V)[None, :], z_NV, 0.0), (BLOCK_N, BLOCK_V // TILE, TILE)), 2)
                beaten_NT = tl.zeros((BLOCK_N, BLOCK_V // TILE), tl.int32)
            z_NV = tl.where((v < V)[None, :], z_NV, NO_MASS)
            target_N = tl.load(target + n, mask=n < N, other=ignore_index)
            column_N = tl.where(target_N == ignore_index, -1, target_N - j * BLOCK_V)
            here_N = (column_N >= 0) & (column_N < BLOCK_V)
            if tl.max(here_N.to(tl.int32), 0) != 0:  # one block in V / BLOCK_V holds a given token's target
                is_target_NV = column_N.to(tl.int32)[:, None] == tl.arange(0, BLOCK_V)[None, :]
                z_N = tl.sum(tl.where(is_target_NV, z_NV, 0.0), 1)
                tl.store(target_logit + n, z_N, mask=here_N)
                if STATS:  # by an entry of its tile that comes before it
                    place_V, place_N = tl.arange(0, BLOCK_V), column_N.to(tl.int32)
                    before_NV = (place_V[None, :] < place_N[:, None]) & here_N[:, None]
                    beats_NV = before_NV & (place_V // TILE == (place_N // TILE)[:, None]) & (z_NV >= z_N[:, None])
                    beats_NTV = tl.reshape(beats_NV.to(tl.int32), (BLOCK_N, BLOCK_V // TILE, TILE))
                    beaten_NT = tl.max(beats_NTV, 2)
                z_NV = tl.where(is_target_NV, NO_MASS, z_NV)
            z_NTV = tl.reshape(z_NV, (BLOCK_N, BLOCK_V // TILE, TILE))
            m_NT = tl.max(z_NTV, 2)
            rival_NT = m_NT
            m_NT = tl.where(m_NT == NO_MASS, 0.0, m_NT)
            x_NTV = z_NTV - m_NT[:, :, None]
            e_NTV = tl.exp(x_NTV)
            s_NT = tl.sum(e_NTV, 2)
            t = j * (BLOCK_V // TILE) + tl.arange(0, BLOCK_V // TILE)
            out_NT = t.to(tl.int64)[None, :] * N + n[:, None]
            mask_NT = (n < N)[:, None] & (t < tl.cdiv(V, TILE))[None, :]
            tl.store(tile_lse + out_NT, m_NT + tl.log(s_NT), mask=mask_NT)
            if STORE:
                q_NTV = e_NTV / tl.where(s_NT > 0, s_NT, 1.0)[:, :, None]
                q_NV = rounded(tl.reshape(q_NTV, (BLOCK_N, BLOCK_V)), tile_probs.dtype.element_ty, INTERPRET)
                width = tl.cdiv(V, TILE) * TILE
                to_NV = tile_probs + n.to(tl.int64)[:, None] * width + v[None, :]
                tl.store(to_NV, q_NV, mask=(n < N)[:, None] & (v < width)[None, :])
            if ENTROPY:
                u_NT = tl.sum(tl.where(e_NTV > 0, e_NTV * x_NTV, 0.0), 2)
                h_NT = tl.log(s_NT) - u_NT / s_NT
                tl.store(tile_entropy + out_NT, tl.where(s_NT > 0, h_NT, 0.0), mask=mask_NT)
            if STATS:
                squares_NT = tl.sum(e_NTV * e_NTV, 2) / tl.where(s_NT > 0, s_NT * s_NT, 1.0)
                rival_NT = tl.where(beaten_NT > 0, float("inf"), rival_NT)
                tl.store(tile_stats + out_NT, sum_NT, mask=mask_NT)
                t += tl.cdiv(V, TILE)
                tl.store(tile_stats + t.to(tl.int64)[None, :] * N + n[:, None], squares_NT, mask=mask_NT)
                t += tl.cdiv(V, TILE)
                tl.store(tile_stats + t.to(tl.int64)[None, :] * N + n[:, None], rival_NT, mask=mask_NT)


@triton.jit(do_not_specialize=["N", "ignore_index"])
def linear_logp_rows(
    tile_lse,  # (T, N)
    tile_entropy,  # (T, N), with ENTROPY
    tile_stats,  # (3, T, N), with STATS
    target_logit,  # (N,)
    target,
    logp,  # (N,) out
    lse,  # (N,) out
    entropy,  # (N,) out, with ENTROPY
    stats,  # (3, N) out, with STATS: log sum p^2, mean logit, whether the target comes first
    N,
    V,
    T,
    ignore_index,
    ENTROPY: tl.constexpr,
    STATS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Over the target and all tiles: lse, logp = -log(1 + exp(rest - z_target)), H = sum_t P_t (H_t - log P_t)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    target_N = tl.load(target + n, mask=n < N, other=ignore_index)
    kept_N = (n < N) & (target_N != ignore_index)
    # a target that is no entry of this head (of a shard, then) has probability 0 here
    here_N = (target_N >= 0) & (target_N < V)
    z_N = tl.load(target_logit + n, mask=kept_N & here_N, other=0.0)
    z_N = tl.where(kept_N & (here_N == 0), NO_MASS, z_N)
    lse_N, logp_N = log_sum_exp(tile_lse, z_N, n, kept_N, N, T, BLOCK_N, BLOCK_T)
    tl.store(lse + n, tl.where(kept_N, lse_N, 0.0), mask=n < N)
    tl.store(logp + n, tl.where(kept_N, logp_N, 0.0), mask=n < N)
    if ENTROPY:
        h_N = tl.where(logp_N == NO_MASS, 0.0, -tl.exp(logp_N) * logp_N)
        for t0 in range(0, T, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            at_TN = t.to(tl.int64)[:, None] * N + n[None, :]
            mask_TN = (t < T)[:, None] & kept_N[None, :]
            log_mass_TN = tl.load(tile_lse + at_TN, mask=mask_TN, other=NO_MASS) - lse_N[None, :]
            within_TN = tl.load(tile_entropy + at_TN, mask=mask_TN, other=0.0)
            mass_TN = tl.exp(log_mass_TN)
            h_N += tl.sum(tl.where(mass_TN > 0, mass_TN * (within_TN - log_mass_TN), 0.0), 0)
        tl.store(entropy + n, tl.where(kept_N, h_N, 0.0), mask=n < N)
    if STATS:
        total_N = tl.zeros((BLOCK_N,), tl.float32)
        squares_N = tl.exp(2 * logp_N)
        rivals_N = tl.zeros((BLOCK_N,), tl.int32)
        for t0 in range(0, T, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            at_TN = t.to(tl.int64)[:, None] * N + n[None, :]
            mask_TN = (t < T)[:, None] & kept_N[None, :]
            mass_TN = tl.exp(tl.load(tile_lse + at_TN, mask=mask_TN, other=NO_MASS) - lse_N[None, :])
            total_N += tl.sum(tl.load(tile_stats + at_TN, mask=mask_TN, other=0.0), 0)
            within_TN = tl.load(tile_stats + (t + T).to(tl.int64)[:, None] * N + n[None, :], mask=mask_TN, other=0.0)
            squares_N += tl.sum(mass_TN * mass_TN * within_TN, 0)
            at_TN = (t + 2 * T).to(tl.int64)[:, None] * N + n[None, :]
            rival_TN = tl.load(tile_stats + at_TN, mask=mask_TN, other=NO_MASS)
            earlier_TN = t[:, None] < (target_N // TILE)[None, :]
            wins_TN = tl.where(earlier_TN, rival_TN >= z_N[None, :], rival_TN > z_N[None, :])
            rivals_N += tl.sum((wins_TN & mask_TN).to(tl.int32), 0)
        tl.store(stats + n, tl.where(kept_N, tl.log(squares_N), 0.0), mask=n < N)
        tl.store(stats + N + n, tl.where(kept_N, total_N / V, 0.0), mask=n < N)
        first_N = kept_N & (rivals_N == 0)
        tl.store(stats + 2 * N + n, tl.where(first_N, 1.0, 0.0), mask=n < N)


class Config(NamedTuple):
    """The shape of a GEMM's blocks, and how it is compiled."""

    BLOCK_N: int
    BLOCK_V: int
    BLOCK_D: int
    GROUP: int
    per_multiprocessor: int  # programs that fit side by side: one computes while another is in its epilogue
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        return {name: value for name, value in self._asdict().items() if name != "per_multiprocessor"}


def config(chip: int, dtype: torch.dtype, long_epilogue: bool, longest_epilogue: bool = False) -> Config:
    """The epilogues of the entropy, a softcap, a bias or stored probabilities need registers beside the
    accumulators; entropy and stored probabilities together, or the stats, more still."""
    if dtype == torch.float32:  # exact products run on the ordinary units: small blocks keep them in registers
        return Config(64, 128, 16, 8, 2, 8, 2)
    if chip == 90 and not long_epilogue:
        return Config(256, 128, 64, 8, 1, 8, 3)
    return Config(64 if longest_epilogue else 128, 128, 64, 8, 1, 8, 2 if chip in (89, 120) else 4)


def precision(dtype: torch.dtype) -> str:
    matmul = torch.backends.cuda.matmul
    # torch refuses to say allow_tf32 once fp32_precision has been set
    return "tf32" if dtype == torch.float32 and matmul.fp32_precision == "tf32" else "ieee"


def tma(chip: int, *matrices: Tensor) -> bool:
    """Whether the copy engine can read these: contiguous rows that begin on 16 bytes. Not worth it without tensor
    cores: exact fp32 products wait for arithmetic, and its blocks take their registers."""
    return chip >= 90 and all(
        x.dtype != torch.float32
        and x.stride(1) == 1
        and x.stride(0) >= x.shape[1]
        and x.stride(0) * x.element_size() % 16 == 0
        and x.data_ptr() % 16 == 0
        and x.numel() > 0
        for x in matrices
    )


def rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def scalars(logit_scale: float, softcap: float | None, temperature: float) -> tuple[float, float, float]:
    """slope, cap_in, cap_out of `triton_math.logits`."""
    cap = 1.0 if softcap is None else softcap
    return logit_scale / temperature, logit_scale / cap, cap / temperature


def _forward(
    with_entropy: bool,
    with_stats: bool,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    store_probs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (tokens, size), vocabulary = hidden_ND.shape, len(weight_VD)
    tiles = vocab_tiles(vocabulary)
    hidden_ND, weight_VD, target_N = rows_contiguous(hidden_ND), rows_contiguous(weight_VD), target_N.contiguous()
    logp_N = torch.empty(tokens, dtype=torch.float32, device=hidden_ND.device)
    lse_N, target_logit_N = torch.empty_like(logp_N), torch.empty_like(logp_N)
    entropy_N = torch.empty_like(logp_N) if with_entropy else logp_N
    tile_lse_TN = logp_N.new_empty(tiles, tokens)
    tile_entropy_TN = torch.empty_like(tile_lse_TN) if with_entropy else tile_lse_TN
    tile_probs_NV = hidden_ND.new_empty(probs_shape(store_probs, tokens, vocabulary))
    stats_3N = logp_N.new_empty(3, tokens) if with_stats else logp_N
    tile_stats_3TN = logp_N.new_empty(3, tiles, tokens) if with_stats else logp_N
    if not tokens:
        return logp_N, lse_N, tile_lse_TN, tile_probs_NV, entropy_N, stats_3N
    long_epilogue = with_entropy or store_probs or softcap is not None or bias_V is not None
    c = config(chip(hidden_ND), hidden_ND.dtype, long_epilogue, (store_probs and with_entropy) or with_stats)
    use_tma = tma(chip(hidden_ND), hidden_ND, weight_VD)
    blocks = triton.cdiv(tokens, c.BLOCK_N) * triton.cdiv(vocabulary, c.BLOCK_V)
    programs = min(blocks, c.per_multiprocessor * multiprocessors(hidden_ND))
    linear_logp_tiles[(programs,)](
        TensorDescriptor.from_tensor(hidden_ND, [c.BLOCK_N, c.BLOCK_D]) if use_tma else hidden_ND,
        TensorDescriptor.from_tensor(weight_VD, [c.BLOCK_V, c.BLOCK_D]) if use_tma else weight_VD,
        hidden_ND if bias_V is None else bias_V.contiguous(),
        target_N,
        tile_lse_TN,
        tile_entropy_TN,
        tile_probs_NV,
        tile_stats_3TN,
        target_logit_N,
        tokens,
        vocabulary,
        size,
        hidden_ND.stride(0),
        weight_VD.stride(0),
        *scalars(logit_scale, softcap, temperature),
        ignore_index,
        programs,
        HAS_BIAS=bias_V is not None,
        HAS_SOFTCAP=softcap is not None,
        ENTROPY=with_entropy,
        STORE=store_probs,
        STATS=with_stats,
        PRECISION=precision(hidden_ND.dtype),
        TMA=use_tma,
        INTERPRET=interpreting(),
        **c.options(),
    )
    linear_logp_rows[(triton.cdiv(tokens, 32),)](
        tile_lse_TN,
        tile_entropy_TN,
        tile_stats_3TN,
        target_logit_N,
        target_N,
        logp_N,
        lse_N,
        entropy_N,
        stats_3N,
        tokens,
        vocabulary,
        tiles,
        ignore_index,
        ENTROPY=with_entropy,
        STATS=with_stats,
        BLOCK_N=32,
        BLOCK_T=64,
    )
    return logp_N, lse_N, tile_lse_TN, tile_probs_NV, entropy_N, stats_3N


def linear_logp_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward(False, False, *arguments)[:4]


def linear_logp_entropy_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _forward(True, False, *arguments)[:5]


def linear_logp_stats_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    logp_N, lse_N, tile_lse_TN, _, entropy_N, stats_3N = _forward(True, True, *(*arguments, False))
    return logp_N, lse_N, tile_lse_TN, entropy_N, stats_3N


ELEMENT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def matrices(names: dict[str, int], c: Config, dtype: torch.dtype, use_tma: bool) -> dict[str, str]:
    """Signature of (rows, D) operands: name -> rows of a block."""
    element = ELEMENT[dtype]
    return {
        name: f"tensordesc<{element}[{rows}, {c.BLOCK_D}]>" if use_tma else f"*{element}"
        for name, rows in names.items()
    }


def compilations(chip: int) -> list[Compilation]:
    shipped = []
    for dtype in ELEMENT:
        for entropy, extras, store, stats in (
            (False, False, False, False),
            (False, True, False, False),
            (True, True, False, False),
            (False, False, True, False),
            (True, False, True, False),
            (True, True, False, True),
        ):
            if store and dtype == torch.float32:
                continue
            for use_tma in (False, True) if chip >= 90 and dtype != torch.float32 else (False,):
                c = config(chip, dtype, entropy or extras or store, (entropy and store) or stats)
                element = ELEMENT[dtype]
                options = c.options()
                warps, stages = options.pop("num_warps"), options.pop("num_stages")
                signature = {
                    **matrices({"hidden": c.BLOCK_N, "weight": c.BLOCK_V}, c, dtype, use_tma),
                    **dict.fromkeys(("bias", "tile_probs"), f"*{element}"),
                    "target": "*i64",
                    **dict.fromkeys(("tile_lse", "tile_entropy", "tile_stats", "target_logit"), "*fp32"),
                    **dict.fromkeys(("N", "V", "ignore_index", "programs"), "i32"),
                    **dict.fromkeys(("D", "stride_hidden", "stride_weight"), "i32:16"),
                    **dict.fromkeys(("slope", "cap_in", "cap_out"), "fp32"),
                }
                constants = {
                    "HAS_BIAS": extras,
                    "HAS_SOFTCAP": extras,
                    "ENTROPY": entropy,
                    "STORE": store,
                    "STATS": stats,
                    "PRECISION": "ieee",
                    "TMA": use_tma,
                    "INTERPRET": False,
                    **options,
                }
                kinds = {"entropy": entropy, "stats": stats, "softcap bias": extras, "store": store, "tma": use_tma}
                label = " ".join([element, *(kind for kind, present in kinds.items() if present)])
                shipped.append(
                    Compilation(linear_logp_tiles, signature, constants, warps, stages, dtype != torch.float32, label)
                )
    for label in ("", "entropy", "entropy stats"):
        of_tiles, of_tokens = ("tile_lse", "tile_entropy", "tile_stats"), ("logp", "lse", "entropy", "stats")
        signature = {
            **dict.fromkeys((*of_tiles, "target_logit", *of_tokens), "*fp32"),
            "target": "*i64",
            **dict.fromkeys(("N", "V", "T", "ignore_index"), "i32"),
        }
        constants = {"ENTROPY": "entropy" in label, "STATS": "stats" in label, "BLOCK_N": 32, "BLOCK_T": 64}
        shipped.append(Compilation(linear_logp_rows, signature, constants, 4, 3, False, label))
    return shipped
