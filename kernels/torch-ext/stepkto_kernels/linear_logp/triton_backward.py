"""The backward of linear_logp and linear_logp_entropy on a GPU: grouped GEMMs over the (token, vocabulary tile) pairs
of `triton_route`. Chunk by chunk: the pairs' gradients dL/dz into a workspace, TILE entries each; from them dW, whose
tiles each belong to one program; and dhidden, whose blocks of tokens do. No atomics: bitwise reproducible.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..triton_backend import Compilation, chip, interpreting, multiprocessors
from .eager import LOWEST, VOCAB_TILE
from .triton_forward import ELEMENT, precision, rows_contiguous, scalars, tma
from .triton_gradients import hidden_gradients, list_rows, pair_gradients, weight_gradients
from .triton_route import BLOCK, Routes, route

WORKSPACE_BYTES = 2**27  # for gradients of logits; more, 512 bytes a token in bf16, only past 262144 tokens


class Config(NamedTuple):
    """Block sizes of the three GEMMs beside TILE and BLOCK_J, and how each is compiled."""

    pair_d: int
    pair_warps: int
    pair_stages: int
    weight_r: int
    weight_d: int
    weight_warps: int
    weight_stages: int
    hidden_v: int
    hidden_d: int  # with one chunk
    hidden_d_of_chunks: int  # with several: rounding to 16 bits and a remainder needs registers
    hidden_warps: int
    hidden_stages: int


def config(chip: int, dtype: torch.dtype) -> Config:
    little_shared = chip in (89, 120)
    if dtype == torch.float32:  # exact products run on the ordinary units: small blocks keep them in registers
        return Config(16, 8, 2, 16, 32, 8, 2, 16, 64, 64, 8, 2)
    pair_stages = 2 if little_shared else 4
    if dtype == torch.float16:  # gradients in fp32
        return Config(64, 8, pair_stages, 32, 64, 8, 2, 32, 128, 128, 8, 2)
    if little_shared:
        return Config(64, 8, pair_stages, 32, 128, 8, 2, 32, 128, 128, 8, 2)
    # The addresses of gathered rows are loaded themselves: of 5 and 7 stages, three are left for the rows.
    if chip in (90, 100):
        wide = 256 if chip == 90 else 128
        return Config(64, 8, pair_stages, 64, wide, 8, 5, 64, wide, 128, 8, 7)
    return Config(64, 8, pair_stages, 64, 128, 8, 3, 64, 128, 128, 8, 3)


def workspace_dtype(dtype: torch.dtype) -> torch.dtype:
    """That of the pairs' gradients. In fp16 those of confident tokens would underflow: fp32 instead, multiplied as
    tf32, which holds every fp16 number."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def gradient_precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype == torch.float16 else precision(dtype)


class _Problem(NamedTuple):
    """What the backward is of; `entropy` and `grad_entropy` are None for linear_logp."""

    grad_logp: Tensor
    grad_entropy: Tensor | None
    hidden: Tensor
    weight: Tensor
    target: Tensor
    logp: Tensor
    lse: Tensor
    tile_lse: Tensor
    tile_probs: Tensor  # (0, 0) unless the forward kept them
    entropy: Tensor | None
    bias: Tensor | None


def _backward(
    p: _Problem,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    filter_eps: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    (tokens, size), vocabulary, dtype = p.hidden.shape, len(p.weight), p.hidden.dtype
    need_bias = need_bias and p.bias is not None
    dhidden_ND = p.hidden.new_empty(tokens, size) if need_hidden else None
    dweight_VD = p.weight.new_empty(vocabulary, size) if need_weight else None
    dbias_V = p.weight.new_empty(vocabulary) if need_bias else None
    grads = dhidden_ND, dweight_VD, dbias_V
    if not tokens:
        return tuple(None if x is None else x.zero_() for x in grads)  # type: ignore[return-value]
    live_N = p.grad_logp != 0
    if p.grad_entropy is not None:
        live_N |= p.grad_entropy != 0
    live_N &= p.target != ignore_index
    element = torch.empty((), dtype=workspace_dtype(dtype)).element_size()
    workspace_rows = WORKSPACE_BYTES // (VOCAB_TILE * element)
    routes = route(live_N, p.target, p.logp, p.lse, p.tile_lse, p.entropy, filter_eps, workspace_rows)
    _visit(p, routes, scalars(logit_scale, softcap, temperature), softcap is not None, *grads)
    return grads


def _visit(
    p: _Problem,
    routes: Routes,
    scalars: tuple[float, float, float],
    has_softcap: bool,
    dhidden_ND: Tensor | None,
    dweight_VD: Tensor | None,
    dbias_V: Tensor | None,
) -> None:
    (tokens, size), vocabulary, dtype = p.hidden.shape, len(p.weight), p.hidden.dtype
    tiles, blocks = routes.first.shape
    new, c = p.lse.new_empty, config(chip(p.hidden), dtype)
    gradients = new(routes.capacity, VOCAB_TILE, dtype=workspace_dtype(dtype))
    row_token = new(routes.capacity, dtype=torch.int32)
    block_tile = new(routes.capacity // BLOCK, dtype=torch.int32)
    has_remainder = routes.chunks > 1 and dtype != torch.float32
    hidden_d = c.hidden_d_of_chunks if routes.chunks > 1 else c.hidden_d
    remainder_ND = torch.empty_like(dhidden_ND) if has_remainder and dhidden_ND is not None else p.hidden
    programs = multiprocessors(p.hidden)
    use_tma = tma(chip(p.hidden), p.weight)
    interpret = interpreting()

    def weight_rows(rows: int, columns: int) -> Tensor | TensorDescriptor:
        return TensorDescriptor.from_tensor(p.weight, [rows, columns]) if use_tma else p.weight

    for n in range(routes.chunks):
        list_rows[(4 * programs,)](
            routes.order, routes.rank, routes.first, routes.base, routes.first_tile, row_token, block_tile,
            tokens, blocks, n, 4 * programs, BLOCK_J=BLOCK,
        )  # fmt: skip
        pair_gradients[(programs,)](
            p.hidden, weight_rows(VOCAB_TILE, c.pair_d), p.hidden if p.bias is None else p.bias, p.target, p.logp,
            p.lse, p.tile_lse, p.tile_probs, p.lse if p.entropy is None else p.entropy, p.grad_logp,
            p.grad_logp if p.grad_entropy is None else p.grad_entropy, routes.base, routes.first_tile, row_token,
            block_tile, gradients, tokens, vocabulary, size, p.hidden.stride(0), p.weight.stride(0), *scalars, n,
            programs, HAS_BIAS=p.bias is not None, HAS_SOFTCAP=has_softcap, ENTROPY=p.entropy is not None,
            STORED=p.tile_probs.numel() > 0, TO_TF32=gradient_precision(dtype) == "tf32",
            PRECISION=precision(dtype), TMA=use_tma, INTERPRET=interpret, BLOCK_J=BLOCK, BLOCK_D=c.pair_d,
            num_warps=c.pair_warps, num_stages=c.pair_stages,
        )  # fmt: skip
        if dweight_VD is not None or dbias_V is not None:
            weight_gradients[(programs,)](
                gradients, p.hidden, row_token, routes.base, routes.first_tile,
                gradients if dweight_VD is None else dweight_VD, gradients if dbias_V is None else dbias_V,
                vocabulary, size, p.hidden.stride(0), n, programs,
                NEED_WEIGHT=dweight_VD is not None, NEED_BIAS=dbias_V is not None,
                PRECISION=gradient_precision(dtype), INTERPRET=interpret, BLOCK_R=c.weight_r, BLOCK_D=c.weight_d,
                num_warps=c.weight_warps, num_stages=c.weight_stages,
            )  # fmt: skip
        if dhidden_ND is not None:
            hidden_gradients[(blocks, triton.cdiv(size, hidden_d))](
                gradients, weight_rows(c.hidden_v, hidden_d), routes.order, routes.rank, routes.first, routes.base,
                routes.first_tile, routes.active, routes.active_before, dhidden_ND, remainder_ND,
                tokens, vocabulary, size, tiles, blocks, p.weight.stride(0), n,
                FIRST=n == 0, REMAINDER=has_remainder, PRECISION=gradient_precision(dtype), TMA=use_tma,
                INTERPRET=interpret, BLOCK_J=BLOCK, BLOCK_V=c.hidden_v, BLOCK_D=hidden_d,
                SPLIT=VOCAB_TILE // c.hidden_v,
                num_warps=c.hidden_warps, num_stages=c.hidden_stages,
            )  # fmt: skip


def linear_logp_backward(
    grad_logp_N: Tensor,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    logp_N: Tensor,
    lse_N: Tensor,
    tile_lse_TN: Tensor,
    tile_probs_NV: Tensor,
    bias_V: Tensor | None,
    *options,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return linear_logp_entropy_backward(
        grad_logp_N,
        None,
        hidden_ND,
        weight_VD,
        target_N,
        logp_N,
        lse_N,
        tile_lse_TN,
        tile_probs_NV,
        None,
        bias_V,
        *options,
    )


def linear_logp_entropy_backward(
    grad_logp_N: Tensor,
    grad_entropy_N: Tensor | None,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    logp_N: Tensor,
    lse_N: Tensor,
    tile_lse_TN: Tensor,
    tile_probs_NV: Tensor,
    entropy_N: Tensor | None,
    bias_V: Tensor | None,
    *options,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if entropy_N is not None:  # p log p of an entry ruled out by -inf is 0; the kernel has no register left to say so
        logp_N = logp_N.clamp(min=LOWEST)
        if bias_V is not None:
            bias_V = bias_V.clamp(min=max(LOWEST, torch.finfo(bias_V.dtype).min))
    problem = _Problem(
        grad_logp_N.contiguous(),
        None if grad_entropy_N is None else grad_entropy_N.contiguous(),
        rows_contiguous(hidden_ND),
        rows_contiguous(weight_VD),
        target_N.contiguous(),
        logp_N.contiguous(),
        lse_N.contiguous(),
        tile_lse_TN.contiguous(),
        tile_probs_NV.contiguous(),
        None if entropy_N is None else entropy_N.contiguous(),
        None if bias_V is None else bias_V.contiguous(),
    )
    return _backward(problem, *options)


def compilations(chip: int) -> list[Compilation]:
    shipped = []
    for dtype, element in ELEMENT.items():
        c, workspace, matrix = config(chip, dtype), ELEMENT[workspace_dtype(dtype)], dtype != torch.float32
        common = {
            **dict.fromkeys(("hidden", "weight", "bias", "dweight", "dbias", "dhidden", "remainder"), f"*{element}"),
            "tile_probs": f"*{element}",
            **dict.fromkeys(("logp", "lse", "tile_lse", "entropy", "grad_logp", "grad_entropy"), "*fp32"),
            **dict.fromkeys(("order", "first", "first_tile", "active", "active_before"), "*i32"),
            **dict.fromkeys(("row_token", "block_tile"), "*i32"),
            **{"target": "*i64", "base": "*i64", "rank": "*i8", "gradients": f"*{workspace}"},
            **dict.fromkeys(("N", "V", "T", "I", "c", "programs"), "i32"),
            **dict.fromkeys(("D", "stride_hidden", "stride_weight"), "i32:16"),
            **dict.fromkeys(("slope", "cap_in", "cap_out"), "fp32"),
        }
        one: dict[str, Any] = {"INTERPRET": False}
        tf32 = "tf32" if dtype == torch.float16 else "ieee"
        for use_tma in (False, True) if chip >= 90 and matrix else (False,):
            for extras, stored in ((False, False), (True, False), (False, True))[: 3 if matrix else 2]:
                label = f"{element}{' entropy softcap bias' * extras}{' stored entropy' * stored}{' tma' * use_tma}"
                flags: dict[str, Any] = {
                    "HAS_BIAS": extras,
                    "HAS_SOFTCAP": extras,
                    "ENTROPY": extras or stored,
                    "STORED": stored,
                }
                flags |= {"PRECISION": "ieee", "TO_TF32": tf32 == "tf32"}
                shapes = {"TMA": use_tma, "BLOCK_J": BLOCK, "BLOCK_D": c.pair_d}
                box = {"weight": f"tensordesc<{element}[{VOCAB_TILE}, {c.pair_d}]>"} if use_tma else {}
                shipped.append(
                    Compilation(
                        pair_gradients,
                        common | box,
                        one | flags | shapes,
                        c.pair_warps,
                        c.pair_stages,
                        matrix and not stored,
                        label,
                    )
                )
            for is_first, has_remainder in ((True, False), (True, True), (False, matrix)):
                label = f"{element}{' later' * (not is_first)}{' remainder' * has_remainder}{' tma' * use_tma}"
                flags = {"FIRST": is_first, "REMAINDER": has_remainder, "PRECISION": tf32, "TMA": use_tma}
                hidden_d = c.hidden_d if is_first and not has_remainder else c.hidden_d_of_chunks
                shapes = {"BLOCK_J": BLOCK, "BLOCK_V": c.hidden_v, "BLOCK_D": hidden_d}
                shapes |= {"SPLIT": VOCAB_TILE // c.hidden_v}
                box = {"weight": f"tensordesc<{element}[{c.hidden_v}, {hidden_d}]>"} if use_tma else {}
                warps, stages = c.hidden_warps, c.hidden_stages
                shipped.append(
                    Compilation(hidden_gradients, common | box, one | flags | shapes, warps, stages, matrix, label)
                )
        for need_bias in (False, True):
            flags = {"NEED_WEIGHT": True, "NEED_BIAS": need_bias, "PRECISION": tf32}
            shapes = {"BLOCK_R": c.weight_r, "BLOCK_D": c.weight_d}
            label = f"{element}{' bias' * need_bias}"
            shipped.append(
                Compilation(
                    weight_gradients, common, one | flags | shapes, c.weight_warps, c.weight_stages, matrix, label
                )
            )
    signature = {
        **dict.fromkeys(("order", "first", "first_tile", "row_token", "block_tile"), "*i32"),
        **{"rank": "*i8", "base": "*i64"},
        **dict.fromkeys(("N", "I", "c", "programs"), "i32"),
    }
    shipped.append(Compilation(list_rows, signature, {"BLOCK_J": BLOCK}, 4, 3, False))
    return shipped
