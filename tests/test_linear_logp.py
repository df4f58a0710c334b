"""linear_logp and linear_logp_entropy against the fp64 truth."""

import functools
import math

import pytest
import stepkto_kernels
import torch
from on_backends import INTERPRETING, NaNMemory, fixture_over, moved, where_it_runs
from stepkto_kernels import backend, backends
from stepkto_kernels.linear_logp import eager
from stepkto_kernels.linear_logp import reference as truth
from stepkto_kernels.linear_logp.op import (
    linear_logp_backward,
    linear_logp_entropy_forward,
    linear_logp_forward,
)
from torch.utils._python_dispatch import TorchDispatchMode

linear_logp, linear_logp_entropy = moved(stepkto_kernels.linear_logp), moved(stepkto_kernels.linear_logp_entropy)
on_backend = fixture_over("linear_logp", "reference", "native", "triton")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (5, 3, 1), (1, 8, 7), (13, 16, 50), (64, 33, 1000), (9, 5, 8200)]  # (N, D, V)
EVERYTHING = {"logit_scale": 0.7, "softcap": 5.0, "temperature": 1.3}
HEADS = {
    "plain": {},
    "scale": {"logit_scale": 2.5},
    "softcap": {"softcap": 3.0},
    "temperature": {"temperature": 0.6},
    "everything": EVERYTHING,
}


def inputs(shape, dtype, seed=0, bias=True):
    n, d, v = shape
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator).to(dtype)
    weight = torch.randn(v, d, generator=generator).mul(2 / d**0.5).to(dtype)
    bias_V = torch.randn(v, generator=generator).to(dtype) if bias else None
    target = torch.randint(0, v, (n,), generator=generator)
    if n > 3:
        target[[0, n // 2]] = -100
    return hidden, weight, target, bias_V


def assert_within_budget(ours, exact, plain, largest_logit=1.0, rounded_to=None, summands=None):
    """|ours - fp64 truth| <= 4 * (largest error of plain fp32 torch) + floor (+ one rounding to 16 bits).

    `summands`: for backends that round the factors of a gradient's sum, too, what that may amount to.

    Ours sums the same fp32 products in another order, so its errors are of the same size but not the same
    numbers: the maximum of a few thousand of them varies by less than 4. The floor: the backward rebuilds
    p = exp(z - lse) from a saved fp32 lse, whose rounding (half an ulp of the largest logit) moves every p of
    a row by that share; plain torch keeps z - max, which is exact where it matters.
    """
    error = (ours.double() - exact).abs()
    largest = exact.abs().max().clamp(min=1) if exact.numel() else torch.tensor(1.0)
    allowed = 2 * torch.finfo(torch.float32).eps * (1 + largest_logit) * largest
    if exact.numel():
        allowed = allowed + 4 * (plain.double() - exact).abs().max()
    if summands is not None:
        allowed = allowed + summands
    if rounded_to is not None:
        allowed = allowed + exact.abs() * torch.finfo(rounded_to).eps + torch.finfo(rounded_to).smallest_normal
    assert (error <= allowed).all(), f"error {error.max():.3g}, allowed {torch.as_tensor(allowed).max():.3g}"


@pytest.fixture(autouse=True)
def one_thread():
    """A thousand tiny matrices: on a busy machine, threads that wait for each other cost ten times the
    work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["one tile", "many tiles"])
def tiles(request, monkeypatch):
    """Whether the work is cut as finely as it can be."""
    if request.param == "many tiles":
        monkeypatch.setattr(eager, "TILE_V", eager.VOCAB_TILE)
        monkeypatch.setattr(eager, "TILE_ELEMENTS", 512)  # blocks of 4 rows
        if backends.why_not("linear_logp", "triton") is None:
            from stepkto_kernels.linear_logp import triton_backward

            monkeypatch.setattr(triton_backward, "WORKSPACE_BYTES", 1)
    return request.param


# 3 blocks of rows and 5 tiles are enough to go wrong
MANY_TILES_SHAPES = list(dict.fromkeys((min(n, 11), d, min(v, 600)) for n, d, v in SHAPES))
# ragged; several blocks of tokens, of the vocabulary, of hidden sizes; rows of 80 bytes are copied by another engine
TRITON_SHAPES = [(1, 1, 1), (5, 3, 130), (47, 40, 1009), (300, 24, 260), (20, 300, 140)]
# sums over D in several parts, slices of it, ragged in every direction; ranges of tokens
NATIVE_SHAPES = [*SHAPES, (5, 3, 130), (47, 40, 1009), (300, 25, 260), (20, 301, 140), (1100, 9, 130)]


def cases():
    for name, shapes in (("reference", SHAPES), ("native", NATIVE_SHAPES), ("triton", TRITON_SHAPES)):
        for cut in ("one tile", "many tiles") if name != "native" else ("one tile",):  # it chooses: test_native.py
            for shape in MANY_TILES_SHAPES if (name, cut) == ("reference", "many tiles") else shapes:
                for head in HEADS if name != "triton" else ("plain", "everything"):
                    yield pytest.param(name, cut, shape, head, marks=where_it_runs("linear_logp", name).marks)


def logit_gradients(operands, target, cotangents, head):
    """dL/d(hidden @ weight.T + bias), (N, V) in fp64, 0 in ignored rows."""
    hidden, weight, *bias = (x.double() for x in operands)
    kept = target != -100
    leaf = (bias[0] if bias else torch.zeros(len(weight), dtype=torch.float64)).expand(int(kept.sum()), -1)
    leaf = leaf.clone().requires_grad_()
    logp, entropy = truth.linear_logp_entropy(hidden[kept], weight, target[kept], bias=leaf, **head)
    total = (logp * cotangents[0][kept].double()).sum() + (entropy * cotangents[1][kept].double()).sum()
    full = torch.zeros(len(target), len(weight), dtype=torch.float64)
    full[kept] = torch.autograd.grad(total, leaf)[0]
    return full


# What triton and native may round dL/dz by: twice to bf16 (the probability that triton keeps, then the product's
# factor); for fp16, once to it and once to tf32.
UNIT = {torch.float32: 0, torch.bfloat16: 2 * 2**-8, torch.float16: 2 * 2**-10}


def rounding_of_summands(operands, target, cotangents, head, dtype):
    """The most that rounding each dL/dz can move (dhidden, dweight, dbias).

    A probability that was kept in 16 bits also moves log p, by one rounding, and with it an entropy's gradient.
    """
    hidden, weight, *bias = (x.double() for x in operands)
    p = truth.logits(hidden, weight, *bias, **head).softmax(-1)
    slope = abs(head.get("logit_scale", 1)) / head.get("temperature", 1)
    dz = logit_gradients(operands, target, cotangents, head).abs()
    dz = UNIT[dtype] * (dz + slope * (target != -100)[:, None] * cotangents[1].double().abs()[:, None] * p)
    return dz @ weight.abs(), dz.T @ hidden.abs(), dz.sum(0)


@pytest.mark.parametrize(("name", "tiles", "shape", "head_name"), cases(), indirect=["tiles"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_match_the_truth(dtype, name, tiles, shape, head_name):
    head = HEADS[head_name]
    *operands, target, bias = inputs(shape, dtype, bias=head is not HEADS["plain"])
    operands = [x for x in (*operands, bias) if x is not None]
    cotangents = torch.randn(2, shape[0], generator=torch.Generator().manual_seed(1))
    cotangents[:, -1] = 0 if shape[0] > 1 else 1  # a row that nothing flows into

    def run(function, as_dtype):
        leaves = [x.to(as_dtype).requires_grad_() for x in operands]
        keywords = dict(head, bias=leaves[2]) if bias is not None else head
        logp, entropy = function(leaves[0], leaves[1], target, **keywords)
        total = (logp * cotangents[0].to(logp)).sum() + (entropy * cotangents[1].to(logp)).sum()
        return logp.detach(), entropy.detach(), *torch.autograd.grad(total, leaves)

    with backend(name):
        ours = run(functools.partial(linear_logp_entropy, filter_eps=0), dtype)
    exact, plain = (
        run(truth.linear_logp_entropy, torch.float64),
        run(truth.linear_logp_entropy, torch.float32),
    )
    logits = truth.logits(operands[0].double(), operands[1].double(), bias, **head)
    largest_logit = logits.abs().max().item()
    assert ours[0].dtype == ours[1].dtype == torch.float32
    assert (ours[0] <= 0).all()
    assert (ours[1] >= 0).all()
    summands = [None, None, *rounding_of_summands(operands, target, cotangents, head, dtype)]
    for i, values in enumerate(zip(ours, exact, plain, strict=True)):
        rounded_to = dtype if i >= 2 and dtype != torch.float32 else None
        assert_within_budget(*values, largest_logit, rounded_to, summands[i] if name != "reference" else None)
    for leaf, gradient in zip(operands, ours[2:], strict=True):
        assert gradient.dtype == dtype
        assert gradient.shape == leaf.shape

    with backend(name):
        logp_only = linear_logp(operands[0], operands[1], target, **head, bias=bias)
    assert_within_budget(logp_only, exact[0], plain[0], largest_logit)


def test_fp64_in_fp64_out():
    hidden, weight, target, bias = inputs((13, 16, 50), torch.float64)
    logp, entropy = linear_logp_entropy(hidden, weight, target, bias=bias, **EVERYTHING)
    exact = truth.linear_logp_entropy(hidden, weight, target, bias=bias, **EVERYTHING)
    assert logp.dtype == torch.float64
    torch.testing.assert_close((logp, entropy), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_gradcheck(head, tiles):
    hidden, weight, target, bias = inputs((5, 3, 19), torch.float64)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(lambda h, w, b: linear_logp(h, w, target, bias=b, **head), leaves)
    assert torch.autograd.gradcheck(lambda h, w, b: linear_logp_entropy(h, w, target, bias=b, **head), leaves)


def test_confident_tokens_never_exceed_probability_one_and_huge_logits_stay_finite(on_backend):
    hidden = torch.full((50, 1), 100.0)
    weight = torch.linspace(-90, 90, 200)[:, None]
    target = torch.full((50,), 199)
    logp, entropy = linear_logp_entropy(hidden.requires_grad_(), weight, target)
    assert ((logp > -1e-30) & (logp <= 0)).all()
    assert torch.isfinite(entropy).all()
    (logp.sum() + entropy.sum()).backward()
    assert torch.isfinite(hidden.grad).all()
    assert linear_logp(hidden, weight, torch.zeros_like(target)).eq(-18000).all()


def test_the_log_probability_and_gradient_of_a_confident_token_keep_their_digits(on_backend):
    """1 - p of 4e-9: a difference of logit and log-sum-exp, both near 20 in fp32, could not tell it from 0."""
    hidden, weight = torch.ones(1, 1, requires_grad=True), torch.tensor([[0.5], [20.0], [-0.25]])
    logp, entropy = linear_logp_entropy(hidden, weight, torch.tensor([1]))
    logp.backward()
    rest = torch.tensor([0.5 - 20, -0.25 - 20], dtype=torch.float64).exp()
    torch.testing.assert_close(logp.double(), -rest.sum().log1p()[None], rtol=1e-5, atol=0)
    exact = (rest * (20 - weight[[0, 2], 0].double())).sum() / (1 + rest.sum())
    torch.testing.assert_close(hidden.grad.double(), exact[None, None], rtol=1e-5, atol=0)
    assert entropy > rest.sum()


def test_ignored_rows_are_exactly_zero_and_leak_nothing(on_backend):
    hidden, weight, target, _ = inputs((9, 6, 21), torch.float32, bias=False)
    ignored = target == -100
    poisoned = hidden.clone()
    poisoned[ignored] = torch.tensor([float("nan"), float("inf"), -float("inf")]).repeat(2)
    results = []
    for h in (hidden, poisoned):
        h, w = h.clone().requires_grad_(), weight.clone().requires_grad_()
        logp, entropy = linear_logp_entropy(h, w, target)
        (logp.sum() + 0.3 * entropy.sum()).backward()
        results.append((logp.detach(), entropy.detach(), h.grad, w.grad))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)
    assert results[0][0][ignored].eq(0).all()
    assert results[0][1][ignored].eq(0).all()
    assert results[0][2][ignored].eq(0).all()


@pytest.mark.parametrize("rows", [0, 4], ids=["no rows", "all ignored"])
def test_nothing_to_score_still_has_a_graph(rows, on_backend):
    hidden, weight = torch.randn(rows, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    logp, entropy = linear_logp_entropy(hidden, weight, torch.full((rows,), -100))
    assert logp.tolist() == entropy.tolist() == [0.0] * rows
    (logp.sum() + entropy.sum()).backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("shape", [(3, 4, 300_000), (70_000, 2, 5)], ids=["huge vocabulary", "many tokens"])
def test_shapes_that_overflow_grids_elsewhere(shape, on_backend):
    if on_backend == "triton" and INTERPRETING:
        shape = tuple(min(x, 10_000) for x in shape)  # minutes otherwise
    hidden, weight, target, _ = inputs(shape, torch.float32, bias=False)
    hidden.requires_grad_()
    logp = linear_logp(hidden, weight, target)
    logp.sum().backward()
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = truth.linear_logp(exact_hidden, weight.double(), target)
    exact.sum().backward()
    torch.testing.assert_close(logp.double(), exact, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), exact_hidden.grad, rtol=1e-5, atol=1e-5)


def test_a_head_of_no_columns_but_a_bias(on_backend):
    hidden, weight = torch.zeros(3, 0, requires_grad=True), torch.zeros(5, 0, requires_grad=True)
    bias, target = torch.randn(5).requires_grad_(), torch.tensor([1, 4, 0])
    logp = linear_logp(hidden, weight, target, bias=bias)
    expected = bias.log_softmax(-1)[target]
    torch.testing.assert_close(logp, expected)
    found, wanted = (torch.autograd.grad(x.sum(), bias)[0] for x in (logp, expected))
    torch.testing.assert_close(found, wanted)
    assert torch.autograd.grad(linear_logp(hidden, weight, target).sum(), (hidden, weight))[1].shape == (5, 0)


def test_the_new_setting_of_fp32_products_is_understood(on_backend):
    hidden, weight, target, _ = inputs((3, 4, 9), torch.float32, bias=False)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # torch then refuses to say allow_tf32
    try:
        linear_logp(hidden, weight, target)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_a_target_of_another_shard_has_no_entry_here(on_backend):
    """linear_logp_parallel's forward and backward on a rank: all entries are summed; p of the target is 0 here."""
    hidden, weight, _, bias = inputs((9, 6, 200), torch.float32)
    elsewhere = torch.full((9,), eager.vocab_tiles(200) * eager.VOCAB_TILE)
    options = 0.7, 5.0, 1.3, -1, 0.0, False
    head = {"bias": bias.double(), "logit_scale": 0.7, "softcap": 5.0, "temperature": 1.3}
    z = truth.logits(hidden.double().requires_grad_(), weight.double(), **head)
    logp, lse, tile_lse, probs, entropy = moved(linear_logp_entropy_forward)(hidden, weight, elsewhere, bias, *options)
    assert (logp == -torch.inf).all()
    torch.testing.assert_close(lse.double(), z.logsumexp(-1).detach(), rtol=1e-6, atol=1e-6)
    exact = torch.distributions.Categorical(logits=z.detach()).entropy()
    torch.testing.assert_close(entropy.double(), exact, rtol=1e-5, atol=1e-5)
    # the other ranks hold as much mass again: p halves
    everywhere, g = lse + math.log(2), torch.linspace(-1, 1, 9)
    leaves = [x.double().requires_grad_() for x in (hidden, weight)]
    z = truth.logits(*leaves, **head)
    (-(z - everywhere.double()[:, None]).exp().detach() * g.double()[:, None] * z).sum().backward()
    saved = torch.full((9,), -2.0), everywhere, tile_lse, probs
    found = moved(linear_logp_backward)(g, hidden, weight, elsewhere, *saved, bias, *options[:-1], True, True, True, "")
    for ours, leaf in zip(found, leaves, strict=False):
        torch.testing.assert_close(ours.double(), leaf.grad, rtol=1e-5, atol=1e-5)


def test_entries_of_probability_zero_have_no_part_in_entropy_and_gradients(on_backend):
    """A bias of -inf rules entries out of the vocabulary: a whole tile, single ones."""
    hidden, weight, target, bias = inputs((9, 6, 300), torch.float32)
    allowed = torch.ones(300, dtype=torch.bool)
    allowed[[5, 131, 299]] = allowed[128:256] = False
    target = torch.where(target == -100, target, torch.arange(9))  # allowed all, once 5 is not a target
    target[5] = 6
    results = []
    for keep in (allowed, slice(None)):
        ruled_out = bias.masked_fill(~allowed, -torch.inf)[keep]
        h, w = hidden.clone().requires_grad_(), weight[keep].clone().requires_grad_()
        logp, entropy = linear_logp_entropy(h, w, target - (target > 5).long() * (keep is allowed), bias=ruled_out)
        (logp.sum() + 0.3 * entropy.sum()).backward()
        dweight = torch.zeros_like(weight).index_add(0, torch.arange(300)[keep], w.grad)
        results.append((logp.detach(), entropy.detach(), h.grad, dweight))
    for without, with_them in zip(*results, strict=True):
        torch.testing.assert_close(with_them, without, rtol=1e-5, atol=1e-6)


def test_a_weight_that_is_elsewhere_is_named():
    weight = torch.nn.Parameter(torch.zeros(0))
    weight.ds_id = 0  # as DeepSpeed marks what it has partitioned
    with pytest.raises(ValueError, match=r"weight is empty.*ZeRO-3.*GatheredParameters"):
        linear_logp(torch.zeros(2, 4), weight, torch.zeros(2, dtype=torch.long))


def test_another_ignore_index(on_backend):
    hidden, weight, target, _ = inputs((9, 6, 21), torch.float32, bias=False)
    everywhere = linear_logp(hidden, weight, target.clamp(min=0))
    target = target.clamp(min=0)
    logp = linear_logp(hidden, weight, target, ignore_index=int(target[1]))
    assert torch.equal(logp, torch.where(target == target[1], 0, everywhere))


def test_non_contiguous_inputs(on_backend):
    hidden, weight, target, _ = inputs((9, 6, 21), torch.float32, bias=False)
    strided = (
        hidden.T.contiguous().T,
        torch.stack([weight, -weight], 1)[:, 0],
        torch.stack([target, target], 1)[:, 1],
    )
    assert not any(x.is_contiguous() for x in strided)
    h, w = (x.detach().requires_grad_() for x in strided[:2])
    linear_logp(h, w, strided[2]).sum().backward()
    hidden.requires_grad_()
    weight.requires_grad_()
    linear_logp(hidden, weight, target).sum().backward()
    torch.testing.assert_close((h.grad, w.grad), (hidden.grad, weight.grad))


def test_bitwise_reproducible(on_backend):
    torch.set_num_threads(2)
    hidden, weight, target, bias = inputs((300, 40, 900 if INTERPRETING else 9000), torch.bfloat16)
    results = []
    for _ in range(3):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        logp, entropy = linear_logp_entropy(leaves[0], leaves[1], target, bias=leaves[2])
        results.append((logp, entropy, *torch.autograd.grad(logp.sum() + entropy.sum(), leaves)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (0, 0, 0)], ids=str)
def test_gradients_that_nobody_needs_cost_no_gemm(needs):
    operands = inputs((8, 4, 12), torch.float32)
    target = operands[2]
    leaves = [x.requires_grad_(bool(n)) for x, n in zip((operands[0], operands[1], operands[3]), needs, strict=True)]

    def gemms(function):
        with backend("reference"), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            result = function()
        counted = [e for e in profile.events() if e.name in ("aten::mm", "aten::addmm_", "aten::addmm", "aten::bmm")]
        return result, len(counted)

    logp, forward = gemms(lambda: linear_logp(leaves[0], leaves[1], target, bias=leaves[2]))
    assert forward == 1
    assert logp.requires_grad == any(needs)
    if any(needs):
        _, backward = gemms(lambda: logp.sum().backward())
        assert backward == 1 + needs[0] + needs[1]  # the logits again, then one for each large gradient
    for leaf, need in zip(leaves, needs, strict=True):
        assert (leaf.grad is not None) == bool(need)


class LargestResult(TorchDispatchMode):
    """The number of elements of the largest tensor that any call produced."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


def test_logits_are_held_in_bounded_blocks_only(monkeypatch):
    monkeypatch.setattr(eager, "TILE_V", eager.VOCAB_TILE)
    monkeypatch.setattr(eager, "TILE_ELEMENTS", 2048)
    hidden, weight, target, _ = inputs((100, 3, 700), torch.bfloat16, bias=False)
    bound = max(2048, hidden.numel(), weight.numel())
    head = (None, 1.0, None, 1.0, -100)
    with LargestResult() as forward:
        results = eager.linear_logp_forward(hidden, weight, target, *head, False)
    with LargestResult() as backward:
        eager.linear_logp_backward(torch.ones(100), hidden, weight, target, *results, *head, 0.0, True, True, False)
    assert 0 < forward.elements <= bound
    assert 0 < backward.elements <= bound


@pytest.mark.parametrize("shape", [(13, 16, 50), (140, 16, 200)], ids=str)
def test_no_uninitialised_memory_is_read(shape, on_backend, tiles):
    hidden, weight, target, bias = inputs(shape, torch.bfloat16)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    with NaNMemory():
        logp, entropy = linear_logp_entropy(leaves[0], leaves[1], target, bias=leaves[2])
        gradients = torch.autograd.grad(logp.sum() + entropy.sum(), leaves)
    assert all(torch.isfinite(x).all() for x in (logp, entropy, *gradients))


def test_under_autocast_operands_are_cast_as_linear_does_and_nothing_else_is_rounded():
    hidden, weight, target, bias = inputs((13, 16, 50), torch.float32)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp = linear_logp(leaves[0], leaves[1].bfloat16(), target, bias=leaves[2])
        logp.sum().backward()
    cast = [x.detach().bfloat16().requires_grad_() for x in leaves]
    expected = linear_logp(cast[0], cast[1], target, bias=cast[2])
    expected.sum().backward()
    assert logp.dtype == torch.float32
    assert torch.equal(logp, expected)
    for leaf, reference in zip(leaves, cast, strict=True):
        assert leaf.grad.dtype == torch.float32
        assert torch.equal(leaf.grad, reference.grad.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        double = linear_logp(hidden.double(), weight.double(), target)
    assert double.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    hidden, weight, target, bias = inputs((6, 4, 9), dtype)
    hidden, weight, bias = (x.requires_grad_() for x in (hidden, weight, bias))
    options = (0.7, 5.0, 1.3, -100, 0.0)
    for op in (linear_logp_forward, linear_logp_entropy_forward):
        torch.library.opcheck(op, (hidden, weight, target, bias, *options, True))
        torch.library.opcheck(op, (hidden, weight, target, None, 1.0, None, *options[2:], False))
    results = [x.detach() for x in linear_logp_forward(hidden, weight, target, bias, *options, False)]
    detached = hidden.detach(), weight.detach(), target, *results, bias.detach()
    torch.library.opcheck(linear_logp_backward, (results[0], *detached, *options, True, False, True, ""))


def test_compiles_without_graph_breaks_and_checks_values_when_it_runs():
    def function(hidden, weight, target, bias, temperature):
        logp, entropy = linear_logp_entropy(
            hidden, weight, target, bias=bias, softcap=4.0, temperature=temperature, validate=True
        )
        return logp.sum() + linear_logp(hidden, weight, target).square().sum() + entropy.sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for n, temperature in ((6, 1.0), (9, 0.7), (11, 1.9)):
        hidden, weight, target, bias = inputs((n, 4, 20), torch.float32)
        leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
        eager_loss = function(leaves[0], leaves[1], target, leaves[2], temperature)
        loss = compiled(leaves[0], leaves[1], target, leaves[2], temperature)
        assert torch.equal(loss, eager_loss)
        expected, found = torch.autograd.grad(eager_loss, leaves), torch.autograd.grad(loss, leaves)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    with pytest.raises(ValueError, match=r"target of shape .* holds 20 at position 2"):
        compiled(hidden, weight, target.index_fill(0, torch.tensor([2]), 20), bias, 1.9)


def test_compiles_under_autocast():
    hidden, weight, target, _ = inputs((6, 4, 20), torch.float32, bias=False)
    hidden.requires_grad_()

    def function(hidden, weight, target):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return linear_logp(hidden, weight, target).sum()

    expected = function(hidden, weight, target)
    found = torch.compile(function, fullgraph=True, backend="aot_eager")(hidden, weight, target)
    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(x, hidden)[0] for x in (found, expected)))


def test_shapes_and_dtypes_on_the_meta_device():
    hidden, weight, target, bias = (x.to("meta") for x in inputs((6, 4, 20), torch.bfloat16))
    logp, entropy = linear_logp_entropy(hidden.requires_grad_(), weight, target, bias=bias)
    (logp.sum() + entropy.sum()).backward()
    assert (logp.shape, logp.dtype, logp.device.type) == ((6,), torch.float32, "meta")
    assert hidden.grad.shape == (6, 4)


def test_second_derivatives_are_refused():
    hidden, weight, target, _ = inputs((5, 4, 9), torch.float64, bias=False)
    (gradient,) = torch.autograd.grad(
        linear_logp(hidden.requires_grad_(), weight, target).sum(), hidden, create_graph=True
    )
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


@pytest.mark.parametrize("filter_eps", ["auto", 0, 0.25])
def test_the_reference_backend_drops_nothing(filter_eps):
    hidden, weight, target, _ = inputs((9, 6, 21), torch.bfloat16, bias=False)
    gradients = []
    for eps in (0.0, filter_eps):
        w = weight.clone().requires_grad_()
        with backend("reference"):
            linear_logp(hidden, w, target, filter_eps=eps).sum().backward()
        gradients.append(w.grad)
    assert torch.equal(*gradients)


HIDDEN, WEIGHT, TARGET = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64)
BAD = {
    "hidden is a list": (TypeError, "hidden is a list", {"hidden": [1.0]}),
    "hidden 1-d": (ValueError, r"hidden has shape \(3,\)", {"hidden": torch.zeros(3)}),
    "hidden int": (TypeError, "hidden has dtype torch.int64", {"hidden": torch.zeros(3, 4).long()}),
    "weight D": (ValueError, r"weight has shape \(5, 3\).*D=4", {"weight": torch.zeros(5, 3)}),
    "weight empty": (ValueError, r"weight has shape \(0, 4\)", {"weight": torch.zeros(0, 4)}),
    "weight dtype": (TypeError, "weight has dtype torch.bfloat16.*float32", {"weight": WEIGHT.bfloat16()}),
    "weight device": (ValueError, "weight .* is on meta", {"weight": WEIGHT.to("meta")}),
    "bias V": (ValueError, r"bias has shape \(4,\).*V=5", {"bias": torch.zeros(4)}),
    "bias dtype": (TypeError, "bias has dtype torch.float64", {"bias": torch.zeros(5).double()}),
    "target N": (ValueError, r"target has shape \(2,\).*N=3", {"target": TARGET[:2]}),
    "target dtype": (TypeError, "target has dtype torch.int32", {"target": TARGET.int()}),
    "target high": (ValueError, "target .* holds 5 at position 1.*V=5", {"target": torch.tensor([0, 5, 0])}),
    "target low": (ValueError, "target .* holds -1 at position 2", {"target": torch.tensor([0, -100, -1])}),
    "temperature 0": (ValueError, "temperature is 0.*> 0", {"temperature": 0}),
    "temperature nan": (ValueError, "temperature is nan", {"temperature": float("nan")}),
    "temperature str": (TypeError, "temperature is '1'", {"temperature": "1"}),
    "softcap": (ValueError, "softcap is -1", {"softcap": -1.0}),
    "logit_scale": (ValueError, "logit_scale is inf", {"logit_scale": float("inf")}),
    "logit_scale bool": (TypeError, "logit_scale is True", {"logit_scale": True}),
    "ignore_index": (TypeError, "ignore_index is 1.5", {"ignore_index": 1.5}),
    "filter_eps 1": (ValueError, "filter_eps is 1", {"filter_eps": 1.0}),
    "filter_eps negative": (ValueError, "filter_eps is -0.1", {"filter_eps": -0.1}),
    "filter_eps word": (ValueError, "filter_eps is 'none'.*'auto'", {"filter_eps": "none"}),
    "filter_eps None": (TypeError, "filter_eps is None", {"filter_eps": None}),
    "validate": (TypeError, "validate is 1", {"validate": 1}),
}


@pytest.mark.parametrize("function", [linear_logp, linear_logp_entropy])
@pytest.mark.parametrize(("error", "message", "change"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_before_any_compute(error, message, change, function, monkeypatch):
    def fail(*_):
        raise AssertionError("computed")

    for name, kernels in backends._KERNELS.items():
        monkeypatch.setitem(backends._KERNELS, name, dict.fromkeys(kernels, backends.Kernel(fail, fail)))
    with pytest.raises(error, match=message):
        function(**{"hidden": HIDDEN, "weight": WEIGHT, "target": TARGET} | change)


def test_value_checks_can_be_left_out():
    with pytest.raises(ValueError, match="target"):
        linear_logp(HIDDEN, WEIGHT, TARGET + 5, validate=True)
    linear_logp(HIDDEN, WEIGHT, TARGET + 5, validate=False)  # garbage in, garbage out, but not checked
