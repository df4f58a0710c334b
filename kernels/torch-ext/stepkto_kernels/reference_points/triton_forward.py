"""The Triton backend of reference_points: a sum of each block of tokens, then the sum of those."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_backend import Compilation, interpreting


@triton.jit
def block_sums(values, sum_P, N, BLOCK: tl.constexpr):
    base = tl.program_id(0) * BLOCK  # < N, so it fits; base + BLOCK may not
    n = tl.arange(0, BLOCK)
    if N - base >= BLOCK:  # noqa: SIM108 -- without a mask, which would keep loads from being wide
        x_n = tl.load(values + base + n)
    else:
        x_n = tl.load(values + base + n, mask=n < N - base, other=0.0)
    tl.store(sum_P + tl.program_id(0), tl.sum(x_n.to(tl.float64), 0))


@triton.jit(do_not_specialize=["P", "B", "S"])
def points(outcome_sum, outcome_count, step_sum, step_count, sum_P, P, B, S, WIDTH: tl.constexpr):
    total = tl.full((), 0.0, tl.float64)
    for first in range(0, P, WIDTH):
        block = first + tl.arange(0, WIDTH)
        total += tl.sum(tl.load(sum_P + block, mask=block < P, other=0.0), 0)
    tl.store(outcome_sum, total.to(tl.float32))
    tl.store(outcome_count, B.to(tl.float32))
    tl.store(step_sum, total.to(tl.float32))
    tl.store(step_count, S.to(tl.float32))


BLOCK, WIDTH, WARPS = 8192, 2048, 8
INTERPRETER_BLOCK, INTERPRETER_WIDTH = 64, 8  # small batches then have many blocks


def reference_points_forward(
    values_N: Tensor, cu_seqlens: Tensor, cu_steps: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    block, width = (INTERPRETER_BLOCK, INTERPRETER_WIDTH) if interpreting() else (BLOCK, WIDTH)
    values_N, N = values_N.contiguous(), len(values_N)
    P = triton.cdiv(N, block)
    sum_P = values_N.new_empty(P, dtype=torch.float64)
    outcome_sum, outcome_count, step_sum, step_count = (values_N.new_empty((), dtype=torch.float32) for _ in range(4))
    options = {"num_warps": WARPS, "num_stages": 1}
    if P:
        block_sums[(P,)](values_N, sum_P, N, BLOCK=block, **options)
    points[(1,)](
        outcome_sum, outcome_count, step_sum, step_count, sum_P, P, len(cu_seqlens) - 1, len(cu_steps) - 1,
        WIDTH=width, **options,
    )  # fmt: skip
    return outcome_sum, outcome_count, step_sum, step_count


def compilations(chip: int) -> list[Compilation]:
    """Of every shipped configuration; all chips run the same."""
    shipped = [
        Compilation(
            block_sums, {"values": f"*{dtype}", "sum_P": "*fp64", "N": "i32"}, {"BLOCK": BLOCK}, WARPS, 1, False, dtype
        )
        for dtype in ("fp32", "bf16", "fp16")
    ]
    names = ("outcome_sum", "outcome_count", "step_sum", "step_count")
    signature = {**dict.fromkeys(names, "*fp32"), "sum_P": "*fp64", **dict.fromkeys(("P", "B", "S"), "i32")}
    return [*shipped, Compilation(points, signature, {"WIDTH": WIDTH}, WARPS, 1, False)]
