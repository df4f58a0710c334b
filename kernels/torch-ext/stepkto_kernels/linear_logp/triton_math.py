"""What the head kernels compute on a block of logits. Block shapes: N rows (tokens), V columns (vocabulary)."""

import triton
import triton.language as tl

NO_MASS = tl.constexpr(float("-inf"))


@triton.jit
def multiply(a, b, acc, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """acc + a @ b with fp32 accumulators."""
    if INTERPRET:  # its products of bf16 are garbage (triton 3.6 to 3.9); those of their fp32 values are right
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def rounded(x, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """fp32 to the nearest number of DTYPE."""
    if INTERPRET and tl.bfloat16 == DTYPE:  # it cuts the lower 16 bits off: round them first, ties to even
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def rounded_to_tf32(x):
    """fp32 to nearest with 11 bits, what a tf32 product would otherwise cut off, always towards 0."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def tanh(x):
    """Relative error below 1e-6, also near 0, where 1 - 2 / (exp(2x) + 1) would cancel."""
    e = tl.exp(-2 * tl.abs(x))
    large = (1 - e) / (1 + e)
    s = x * x
    small = tl.abs(x) * (1 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835)))))
    magnitude = tl.where(s < 0.04, small, large)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def log1p(x):
    """For x >= 0; Kahan's correction of log(1 + x) for what the sum rounds away."""
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * (x / tl.where(u == 1, 1.0, u - 1)))


@triton.jit
def expm1(x):
    """For x <= 0; exp(x) - 1, by its series near 0."""
    series = x * (1 + x * (1.0 / 2 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720))))))
    return tl.where(x > -0.3, series, tl.exp(x) - 1)


@triton.jit
def logits(acc_NV, bias_V, slope, cap_in, cap_out, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """hidden @ weight.T to logits; cap_in = logit_scale / softcap, cap_out = softcap / temperature."""
    if HAS_BIAS:
        acc_NV += bias_V[None, :]
    if HAS_SOFTCAP:
        return cap_out * tanh(acc_NV * cap_in)
    else:
        return acc_NV * slope


@triton.jit
def grouped(index, row_blocks, col_blocks, GROUP: tl.constexpr):
    """(row block, column block) number `index` in an order whose neighbours share operands in the L2 cache."""
    per_group = GROUP * col_blocks
    first = index // per_group * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    within = index % per_group
    return first + within % size, within // size


@triton.jit
def operand(desc_or_ptr, row0, rows, k0, D, stride, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr):
    """Rows row0.. and columns k0.. of a (rows, D) matrix as a block, zeros outside."""
    if TMA:
        return desc_or_ptr.load([row0, k0])
    else:
        row = row0 + tl.arange(0, BLOCK_ROWS)
        k = k0 + tl.arange(0, BLOCK_D)
        mask = (row < rows)[:, None] & (k < D)[None, :]
        return tl.load(desc_or_ptr + row.to(tl.int64)[:, None] * stride + k[None, :], mask=mask, other=0.0)


@triton.jit
def log_sum_exp(tiles, z_N, n, kept_N, N, T, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr):
    """Over the target's logit z and all tiles of (T, N): (lse, the target's log-probability)."""
    m_N = z_N
    for t0 in range(0, T, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        mask_TN = (t < T)[:, None] & kept_N[None, :]
        lse_TN = tl.load(tiles + t.to(tl.int64)[:, None] * N + n[None, :], mask=mask_TN, other=NO_MASS)
        m_N = tl.maximum(m_N, tl.max(lse_TN, 0))
    s_N = tl.zeros((BLOCK_N,), tl.float32)
    for t0 in range(0, T, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        mask_TN = (t < T)[:, None] & kept_N[None, :]
        lse_TN = tl.load(tiles + t.to(tl.int64)[:, None] * N + n[None, :], mask=mask_TN, other=NO_MASS)
        s_N += tl.sum(tl.exp(lse_TN - m_N[None, :]), 0)
    e_N = tl.exp(z_N - m_N)
    # log(1 + s / e); where e underflows, log(s) + m - z
    logp_N = -tl.where(e_N > 1e-30, log1p(s_N / tl.where(e_N > 1e-30, e_N, 1.0)), tl.log(s_N) + (m_N - z_N))
    return m_N + tl.log(s_N + e_N), logp_N
