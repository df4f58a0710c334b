"""The Triton backend of step_kto. See README.md for its passes."""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_backend import Compilation, interpreting
from .triton_segments import SCRATCH, count_heads, starts_until, step_kto_sums, sum_heads


@triton.jit
def value_terms(r, desirable, beta, z, desirable_weight, undesirable_weight):
    """(lam - v, its derivative in r), as in eager.py."""
    lam = tl.where(desirable, tl.zeros_like(r) + desirable_weight, tl.zeros_like(r) + undesirable_weight)
    slope = tl.where(desirable, tl.zeros_like(r) + beta, tl.zeros_like(r) - beta)
    x = slope * (r - z)
    e = tl.exp(-tl.abs(x))
    high = 1 / (1 + e)  # sigmoid(|x|); a quotient of exponentials would overflow
    low = e * high
    term = lam * tl.where(x >= 0, low, high)
    return term, -slope * term * tl.where(x >= 0, high, low)


@triton.jit
def inverse(count):
    return tl.where(count > 0, 1 / tl.where(count > 0, count, 1.0), 0.0)


@triton.jit
def completions_of(count, B, GLOBAL: tl.constexpr):
    if GLOBAL:
        return tl.load(count)
    else:
        return tl.full((), 0.0, tl.float64) + B


UNSPECIALISED = [*SCRATCH, "cu_steps", "cu_seqlens", "labels", "step_labels", "r_S", "r_B", "outcome_P", "step_P"]


@triton.jit(do_not_specialize=["N", "S", "B", "P", "counts"], do_not_specialize_on_alignment=UNSPECIALISED)
def step_kto_values(
    coefficient,  # (N,) out
    r_S,  # (S,) out
    r_B,  # (B,) out
    outcome_P,  # (P,) out, fp64: the losses of each block's own completions
    step_P,  # (P,) out, fp64: of its own steps, divided by the supervised completions
    cu_seqlens,
    cu_steps,
    labels,
    step_labels,
    first_step,
    first_seq,
    sum_S,
    seq_S,
    head_sum_S,
    sum_B,
    labelled_B,
    head_sum_B,
    head_labelled_B,
    supervised,  # (counts,) fp64: to be added
    num_completions,  # 0-d fp64, with GLOBAL
    kl,
    step_kl,
    N,
    S,
    B,
    P,
    counts,
    beta: tl.float64,
    step_beta: tl.float64,
    desirable_weight: tl.float64,
    undesirable_weight: tl.float64,
    step_desirable_weight: tl.float64,
    step_undesirable_weight: tl.float64,
    outcome_weight: tl.float64,
    step_weight: tl.float64,
    GLOBAL: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    p = tl.program_id(0)
    base = p * BLOCK
    n = tl.arange(0, BLOCK)
    first, seq0 = tl.load(first_step + p), tl.load(first_seq + p)
    steps = tl.load(first_step + p + 1, mask=p + 1 < P, other=S) - first
    seqs = tl.load(first_seq + p + 1, mask=p + 1 < P, other=B) - seq0
    z, z_step = tl.load(kl).to(tl.float64), tl.load(step_kl).to(tl.float64)
    per_completion = inverse(completions_of(num_completions, B, GLOBAL))
    per_supervised = inverse(sum_heads(supervised, 0, counts, WIDTH))

    # what other blocks hold of the head and of the last own step and completion; nothing is an empty range
    head_stop, head_seq_stop = tl.load(cu_steps + first), tl.load(cu_seqlens + seq0)
    has_head, has_head_seq = head_stop > base, head_seq_stop > base
    head_block = tl.load(cu_steps + first - 1, mask=has_head, other=0) // BLOCK
    head_seq_block = tl.load(cu_seqlens + seq0 - 1, mask=has_head_seq, other=0) // BLOCK
    tail_stop = tl.load(cu_steps + first + steps, mask=steps > 0, other=0)
    tail_seq_stop = tl.load(cu_seqlens + seq0 + seqs, mask=seqs > 0, other=0)
    low, stop = head_block + 1, tl.where(has_head, (head_stop - 1) // BLOCK + 1, 0)
    head_rest = sum_heads(head_sum_S, low, stop, WIDTH)
    tail_rest = sum_heads(head_sum_S, p + 1, (tail_stop - 1) // BLOCK + 1, WIDTH)
    low, stop = head_seq_block + 1, tl.where(has_head_seq, (head_seq_stop - 1) // BLOCK + 1, 0)
    head_seq_rest = sum_heads(head_sum_B, low, stop, WIDTH)
    head_labelled, wrong_block = count_heads(head_labelled_B, low, stop, WIDTH)
    low, stop = p + 1, (tail_seq_stop - 1) // BLOCK + 1
    tail_seq_rest = sum_heads(head_sum_B, low, stop, WIDTH)
    tail_labelled, _ = count_heads(head_labelled_B, low, stop, WIDTH)

    lowest, own_seq0 = tl.where(has_head, 0, 1), tl.where(has_head_seq, seq0, 0)
    step_n = starts_until(cu_steps + first, steps, n, base, BLOCK)
    coefficient_n = tl.zeros((BLOCK,), tl.float32)
    outcome, step = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    for k in range(0, steps + 1, CHUNK):
        s = k + tl.arange(0, CHUNK)
        h = first - 1 + s
        own_s = (s > 0) & (s <= steps)
        live_s = (s >= lowest) & (s <= steps)
        start_s = tl.load(cu_steps + h, mask=live_s, other=0)
        label_s = tl.load(step_labels + h, mask=live_s, other=-1)
        seq_s = tl.load(seq_S + h, mask=live_s, other=0)
        wrong_before_s = seq_s < 0
        seq_s = tl.where(wrong_before_s, -1 - seq_s, seq_s)
        r_s = tl.load(sum_S + h, mask=live_s, other=0.0)
        r_s += tl.where(s == 0, head_rest, tl.where(s == steps, tail_rest, 0.0))
        tl.store(r_S + h, r_s.to(tl.float32), mask=own_s)

        # of each step's completion
        head_s = seq_s < own_seq0
        tail_s = (seq_s >= seq0) & (seq_s == seq0 + seqs - 1)
        r_seq_s = tl.load(sum_B + seq_s, mask=live_s, other=0.0)
        r_seq_s += tl.where(head_s, head_seq_rest, tl.where(tail_s, tail_seq_rest, 0.0))
        state_s = tl.load(labelled_B + seq_s, mask=live_s, other=0)
        wrong_s = (state_s & 1) > 0
        rest_s = tl.where(head_s, head_labelled, tl.where(tail_s, tail_labelled, 0))
        labelled_in_seq_s = (state_s >> 1) + tl.where(wrong_s, 0, rest_s)
        block_s = start_s // BLOCK
        wrong_before_s |= head_s & ((wrong_s & (head_seq_block < block_s)) | (wrong_block < block_s))
        opens_s = own_s & (tl.load(cu_seqlens + seq_s, mask=own_s, other=-1) == start_s)
        desirable_s = tl.load(labels + seq_s, mask=live_s, other=0) != 0
        outcome_s, slope_s = value_terms(r_seq_s, desirable_s, beta, z, desirable_weight, undesirable_weight)
        tl.store(r_B + seq_s, r_seq_s.to(tl.float32), mask=opens_s)
        outcome += tl.sum(tl.where(opens_s, outcome_s, 0.0), 0)

        share_s = tl.where(live_s & (label_s != -1) & ~wrong_before_s, per_supervised, 0.0)
        if MEAN:
            share_s /= tl.maximum(labelled_in_seq_s, 1).to(tl.float64)
        term_s, step_slope_s = value_terms(
            r_s, label_s == 1, step_beta, z_step, step_desirable_weight, step_undesirable_weight
        )
        step += tl.sum(tl.where(own_s, term_s * share_s, 0.0), 0)
        slope_s = step_weight * step_slope_s * share_s + outcome_weight * (slope_s * per_completion)
        here_n = (step_n >= k) & (step_n < k + CHUNK)
        gathered_n = tl.gather(slope_s.to(tl.float32), tl.where(here_n, step_n - k, 0), 0)
        coefficient_n = tl.where(here_n, gathered_n, coefficient_n)
    if N - base >= BLOCK:  # without a mask, which would keep stores from being wide
        tl.store(coefficient + base + n, coefficient_n)
    else:
        tl.store(coefficient + base + n, coefficient_n, mask=n < N - base)
    tl.store(outcome_P + p, outcome)
    tl.store(step_P + p, step)


@triton.jit(do_not_specialize=["B", "P"], do_not_specialize_on_alignment=["outcome_P", "step_P"])
def step_kto_loss(
    loss,
    outcome_loss,
    step_loss,
    outcome_P,
    step_P,
    num_completions,
    B,
    P,
    outcome_weight: tl.float64,
    step_weight: tl.float64,
    GLOBAL: tl.constexpr,
    WIDTH: tl.constexpr,
):
    outcome = sum_heads(outcome_P, 0, P, WIDTH) * inverse(completions_of(num_completions, B, GLOBAL))
    step = sum_heads(step_P, 0, P, WIDTH)
    tl.store(loss, (outcome_weight * outcome + step_weight * step).to(tl.float32))
    tl.store(outcome_loss, outcome.to(tl.float32))
    tl.store(step_loss, step.to(tl.float32))


WARPS = 8
# tokens a program, steps it handles at a time, fan of the search for its first step, partial sums read at a time
SHAPE = {"BLOCK": 2048, "CHUNK": 256, "FAN": 512, "WIDTH": 1024}
INTERPRETER_SHAPE = {"BLOCK": 32, "CHUNK": 8, "FAN": 4, "WIDTH": 4}  # small batches then cross every border
COUNTS_READ_BY_ALL = 1024  # blocks up to which every program adds all their counts, which saves a launch


def rounds(size: int, fan: int) -> int:
    """Of `narrow`, until one of size + 1 places is left."""
    count = 0
    while size > 0:
        size, count = triton.cdiv(size, fan) - 1, count + 1
    return count


def step_kto_forward(
    logp_N: Tensor,
    ref_logp_N: Tensor,
    cu_seqlens: Tensor,
    cu_steps: Tensor,
    labels_B: Tensor,
    step_labels_S: Tensor,
    kl: Tensor,
    step_kl: Tensor,
    num_completions: Tensor | None,
    num_supervised: Tensor | None,
    beta: float,
    step_beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    step_desirable_weight: float,
    step_undesirable_weight: float,
    outcome_weight: float,
    step_weight: float,
    step_reduction: str,
    after_first_error: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, outcome_loss, step_loss, r_B, r_S, dL/dlogp_N) in fp32."""
    shape = INTERPRETER_SHAPE if interpreting() else SHAPE
    N, S, B = len(logp_N), len(step_labels_S), len(labels_B)
    P = triton.cdiv(N, shape["BLOCK"])
    logp_N, ref_logp_N, step_labels_S = logp_N.contiguous(), ref_logp_N.contiguous(), step_labels_S.contiguous()
    cu_seqlens, cu_steps = cu_seqlens.contiguous(), cu_steps.contiguous()
    labels_B = labels_B.contiguous().view(torch.uint8)
    loss, outcome_loss, step_loss = logp_N.new_empty(()), logp_N.new_empty(()), logp_N.new_empty(())
    r_B, r_S, coefficient_N = logp_N.new_empty(B), logp_N.new_empty(S), torch.empty_like(logp_N)
    sum_S, sum_B, *double_P = logp_N.new_empty(S + B + 5 * P, dtype=torch.float64).split([S, B, P, P, P, P, P])
    head_sum_S, head_sum_B, supervised, outcome_P, step_P = double_P
    seq_S, labelled_B, *int_P = cu_steps.new_empty(S + B + 3 * P).split([S, B, P, P, P])
    first_step, first_seq, head_labelled_B = int_P
    has_completions = num_completions is not None
    count = num_completions if has_completions else outcome_P
    options = {"num_warps": WARPS, "num_stages": 1}
    if P:
        step_kto_sums[(P,)](
            logp_N, ref_logp_N, cu_seqlens, cu_steps, step_labels_S, first_step, first_seq, sum_S, seq_S,
            head_sum_S, sum_B, labelled_B, head_sum_B, head_labelled_B, supervised, N, S, B,
            rounds(max(S, B), shape["FAN"]), MASK=after_first_error == "mask", COUNT=num_supervised is None,
            BLOCK=shape["BLOCK"], CHUNK=shape["CHUNK"], FAN=shape["FAN"], **options,
        )  # fmt: skip
        if num_supervised is not None:
            supervised = num_supervised
        elif P > COUNTS_READ_BY_ALL:
            supervised = supervised.sum()
        step_kto_values[(P,)](
            coefficient_N, r_S, r_B, outcome_P, step_P, cu_seqlens, cu_steps, labels_B, step_labels_S,
            first_step, first_seq, sum_S, seq_S, head_sum_S, sum_B, labelled_B, head_sum_B, head_labelled_B,
            supervised, count, kl, step_kl, N, S, B, P, supervised.numel(), beta, step_beta, desirable_weight,
            undesirable_weight, step_desirable_weight, step_undesirable_weight, outcome_weight, step_weight,
            GLOBAL=has_completions, MEAN=step_reduction == "mean", BLOCK=shape["BLOCK"], CHUNK=shape["CHUNK"],
            WIDTH=shape["WIDTH"], **options,
        )  # fmt: skip
    step_kto_loss[(1,)](
        loss, outcome_loss, step_loss, outcome_P, step_P, count, B, P, outcome_weight, step_weight,
        GLOBAL=has_completions, WIDTH=shape["WIDTH"], **options,
    )  # fmt: skip
    return loss, outcome_loss, step_loss, r_B, r_S, coefficient_N


FLOATS = ("logp", "ref_logp", "coefficient", "r_S", "r_B", "kl", "step_kl", "loss", "outcome_loss", "step_loss")
DOUBLES = ("sum_S", "sum_B", "head_sum_S", "head_sum_B", "supervised", "outcome_P", "step_P", "num_completions")
INTEGERS = ("cu_seqlens", "cu_steps", "first_step", "first_seq", "seq_S", "labelled_B", "head_labelled_B")
SIGNATURE = {
    **dict.fromkeys(FLOATS, "*fp32"),
    **dict.fromkeys(DOUBLES, "*fp64"),
    **dict.fromkeys(INTEGERS, "*i32"),
    **dict.fromkeys(("N", "S", "B", "P", "rounds", "counts"), "i32"),
    "labels": "*u8",
    "step_labels": "*i8",
}


def compilations(chip: int) -> list[Compilation]:
    """Of every shipped configuration; all chips run the same."""
    flags = {step_kto_sums: ("MASK", "COUNT"), step_kto_values: ("GLOBAL", "MEAN"), step_kto_loss: ("GLOBAL",)}
    shipped = []
    for kernel, names in flags.items():
        for values in itertools.product((False, True), repeat=len(names)):
            constants = SHAPE | dict(zip(names, values, strict=True))
            constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
            signature = {x: SIGNATURE.get(x, "fp64") for x in kernel.arg_names if x not in constants}
            label = " ".join(name.lower() for name, value in zip(names, values, strict=True) if value)
            shipped.append(Compilation(kernel, signature, constants, WARPS, 1, False, label))
    return shipped
