"""Sums over steps and completions from blocks of tokens with fixed borders. See README.md.

Block shapes: n the tokens of one block, s a chunk of the steps in it. A program's own steps and completions are those
that start in its block; the step and the completion that its first token continues are its head.
"""

import triton
import triton.language as tl


@triton.jit
def load_block(start, n, count, BLOCK: tl.constexpr):
    """The first `count` elements, then zeros. A whole block has no mask, which would keep loads from being wide."""
    if count >= BLOCK:  # noqa: SIM108
        x_n = tl.load(start + n)
    else:
        x_n = tl.load(start + n, mask=n < count, other=0.0)
    return x_n


@triton.jit
def narrow(cu, low, high, x, FAN: tl.constexpr):
    """One round of a search for how many elements are below x, which is in [low, high]; high + FAN fits 32 bits."""
    stride = tl.maximum(tl.cdiv(high - low, FAN), 1)
    pivot = low + (tl.arange(0, FAN) + 1) * stride - 1
    inside = pivot < high
    below = inside & (tl.load(cu + pivot, mask=inside, other=0) < x)
    low += tl.sum(below.to(tl.int32), 0) * stride
    return low, tl.minimum(high, low + stride - 1)


@triton.jit
def starts_until(cu, count, place, base, MOST: tl.constexpr):
    """For each place: how many of the `count` <= MOST boundaries at cu are at most base + place."""
    found = tl.zeros_like(place)
    jump = tl.full((), MOST, tl.int32)
    while jump > count:
        jump = jump // 2
    while jump > 0:
        there = found + jump
        inside = there <= count
        before = inside & (tl.load(cu + there - 1, mask=inside, other=0) - base <= place)
        found = tl.where(before, there, found)
        jump = jump // 2
    return found


@triton.jit
def add_tokens(x, step, y, next_step):
    return tl.where(step == next_step, x + y, y), next_step


@triton.jit
def add_steps(r_a, labelled_a, wrong_a, opens_a, r_b, labelled_b, wrong_b, opens_b):
    """Joins two stretches of steps, of which the second may open a completion: of the completion open at the end, the
    sum of log-ratios, the labelled steps up to the first wrong one, and the wrong steps."""
    r = tl.where(opens_b > 0, r_b, r_a + r_b)
    labelled = tl.where(opens_b > 0, labelled_b, labelled_a + tl.where(wrong_a > 0, 0, labelled_b))
    wrong = tl.where(opens_b > 0, wrong_b, wrong_a + wrong_b)
    return r, labelled, wrong, opens_a | opens_b


@triton.jit
def any_labelled(cu_steps, step_labels, step, begin, WIDTH: tl.constexpr):
    """1 if a step up to `step` that starts at token `begin` or later has a label, else 0."""
    found = tl.full((), 0, tl.int32)
    while step >= 0:
        h = step - tl.arange(0, WIDTH)
        inside = (h >= 0) & (tl.load(cu_steps + h, mask=h >= 0, other=-1) >= begin)
        labelled = inside & (tl.load(step_labels + h, mask=inside, other=-1) != -1)
        found = tl.max(labelled.to(tl.int32), 0)
        more = (found == 0) & (tl.min(inside.to(tl.int32), 0) > 0)
        step = tl.where(more, step - WIDTH, -1)
    return found


SIZES = ["S", "B", "rounds"]
SCRATCH = ["first_step", "first_seq", "sum_S", "seq_S", "head_sum_S", "sum_B", "labelled_B", "head_sum_B"]
SCRATCH += ["head_labelled_B", "supervised"]


@triton.jit(do_not_specialize=["N", *SIZES], do_not_specialize_on_alignment=[*SCRATCH, "cu_steps", "cu_seqlens"])
def step_kto_sums(
    logp,
    ref_logp,
    cu_seqlens,
    cu_steps,
    step_labels,
    first_step,  # (P,) out: of P blocks, each one's first own step
    first_seq,  # (P,) out
    sum_S,  # (S,) out, fp64: over the tokens in the step's own block
    seq_S,  # (S,) out: the step's completion i, or ~i if an earlier step of i in this block is wrong
    head_sum_S,  # (P,) out, fp64: over the head step's tokens in this block
    sum_B,  # (B,) out, fp64: over the tokens in the completion's own block
    labelled_B,  # (B,) out: 2 * (labelled steps in that block, up to the first wrong one) + (one is wrong)
    head_sum_B,  # (P,) out, fp64
    head_labelled_B,  # (P,) out
    supervised,  # (P,) out, fp64, with COUNT: completions whose first labelled step is this block's own
    N,
    S,
    B,
    rounds,
    MASK: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    FAN: tl.constexpr,
):
    p = tl.program_id(0)
    base = p * BLOCK  # < N, so it fits; base + BLOCK may not
    n = tl.arange(0, BLOCK)
    d_n = (load_block(logp + base, n, N - base, BLOCK) - load_block(ref_logp + base, n, N - base, BLOCK)).to(tl.float64)

    after = tl.minimum(base, 2**31 - 1 - BLOCK) + BLOCK  # no start is above 2^31 - 2
    h_low = tl.full((), 0, tl.int32)
    i_low, h_after, i_after = h_low, h_low, h_low
    h_high, i_high = h_low + S, h_low + B
    h_end, i_end = h_high, i_high
    for _ in range(rounds):  # four searches side by side: their loads wait together
        h_low, h_high = narrow(cu_steps, h_low, h_high, base, FAN)
        i_low, i_high = narrow(cu_seqlens, i_low, i_high, base, FAN)
        h_after, h_end = narrow(cu_steps, h_after, h_end, after, FAN)
        i_after, i_end = narrow(cu_seqlens, i_after, i_end, after, FAN)
    first, seq0, steps, seqs = h_low, i_low, h_after - h_low, i_after - i_low
    tl.store(first_step + p, first)
    tl.store(first_seq + p, seq0)

    counted = seq0  # the first completion that may have its first labelled step here
    if COUNT:  # noqa: SIM102 -- one is decided when the kernel is compiled, one when it runs
        if seq0 > 0:
            begin = tl.load(cu_seqlens + seq0 - 1)
            counted -= 1 - any_labelled(cu_steps, step_labels, first - 1, begin, CHUNK)

    # running sums within each step; step 0 is the head, 1 the first own
    step_n = starts_until(cu_steps + first, steps, n, base, BLOCK)
    r_n, step_n = tl.associative_scan((d_n, step_n), 0, add_tokens)
    # of the completion that is open at a chunk's end
    r_open, labelled_open = tl.full((), 0.0, tl.float64), tl.full((), 0, tl.int32)
    wrong_open = labelled_open
    supervised_s = tl.zeros((CHUNK,), tl.int32)
    for k in range(0, steps + 1, CHUNK):
        s = k + tl.arange(0, CHUNK)
        h = first - 1 + s
        live_s = (s <= steps) & (h >= 0)
        own_s = live_s & (s > 0)
        start_s = tl.load(cu_steps + h, mask=live_s, other=0) - base
        stop_s = tl.load(cu_steps + h + 1, mask=live_s, other=0) - base
        last_s = tl.minimum(stop_s, BLOCK) - 1  # -1: the head ended with the previous block
        r_s = tl.where(live_s & (last_s >= 0), tl.gather(r_n, tl.maximum(last_s, 0), 0), 0.0)
        tl.store(sum_S + h, r_s, mask=own_s)
        tl.store(head_sum_S + p + s, r_s, mask=s == 0)

        seq_s = seq0 - 1 + starts_until(cu_seqlens + seq0, seqs, start_s, base, BLOCK)
        head_s = seq_s < seq0
        opens_s = own_s & (tl.load(cu_seqlens + seq_s, mask=own_s, other=0) - base == start_s)
        label_s = tl.load(step_labels + h, mask=own_s, other=-1)
        wrong_s = (own_s & (label_s == 0)).to(tl.int32) if MASK else tl.zeros_like(s)
        state_s = r_s, (label_s != -1).to(tl.int32), wrong_s, opens_s.to(tl.int32)
        r_s, labelled_s, wrongs_s, opens_s = tl.associative_scan(state_s, 0, add_steps)
        r_s, labelled_s, wrongs_s, opens_s = add_steps(
            r_open, labelled_open, wrong_open, 0, r_s, labelled_s, wrongs_s, opens_s
        )
        tl.store(seq_S + h, tl.where(wrongs_s > wrong_s, -1 - seq_s, seq_s), mask=own_s)

        seq_stop_s = tl.load(cu_seqlens + seq_s + 1, mask=live_s, other=0) - base
        closes_s = live_s & ((s == steps) | (stop_s == seq_stop_s))
        state_s = 2 * labelled_s + (wrongs_s > 0).to(tl.int32)
        tl.store(sum_B + seq_s, r_s, mask=closes_s & ~head_s)
        tl.store(labelled_B + seq_s, state_s, mask=closes_s & ~head_s)
        tl.store(head_sum_B + p + tl.zeros_like(s), r_s, mask=closes_s & head_s)
        tl.store(head_labelled_B + p + tl.zeros_like(s), state_s, mask=closes_s & head_s)
        supervised_s += (closes_s & (labelled_s > 0) & (seq_s >= counted)).to(tl.int32)
        end_s = s == k + CHUNK - 1
        r_open = tl.sum(tl.where(end_s, r_s, 0.0), 0)
        labelled_open = tl.sum(tl.where(end_s, labelled_s, 0), 0)
        wrong_open = tl.sum(tl.where(end_s, wrongs_s, 0), 0)
    if COUNT:
        tl.store(supervised + p, tl.sum(supervised_s, 0).to(tl.float64))


@triton.jit
def sum_heads(head, low, stop, WIDTH: tl.constexpr):
    """Sum over the blocks [low, stop)."""
    total = tl.full((), 0.0, tl.float64)
    for q in range(low, stop, WIDTH):
        block = q + tl.arange(0, WIDTH)
        total += tl.sum(tl.load(head + block, mask=block < stop, other=0.0), 0)
    return total


@triton.jit
def count_heads(head_labelled_B, low, stop, WIDTH: tl.constexpr):
    """Of a completion's part in the blocks [low, stop): its labelled steps up to the first wrong one, and that step's
    block, or a number beyond every block."""
    labelled, wrong_block = tl.full((), 0, tl.int32), tl.full((), 2**31 - 1, tl.int32)
    for q in range(low, stop, WIDTH):
        block = q + tl.arange(0, WIDTH)
        state = tl.load(head_labelled_B + block, mask=block < stop, other=0)
        counts = block <= tl.minimum(wrong_block, tl.min(tl.where((state & 1) > 0, block, 2**31 - 1), 0))
        wrong_block = tl.minimum(wrong_block, tl.min(tl.where((state & 1) > 0, block, 2**31 - 1), 0))
        labelled += tl.sum(tl.where(counts, state >> 1, 0), 0)
    return labelled, wrong_block
