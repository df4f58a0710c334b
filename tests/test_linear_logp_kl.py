"""linear_logp_kl against the fp64 truth."""

import functools

import pytest
import stepkto_kernels
import torch
from on_backends import NaNMemory, fixture_over, moved
from stepkto_kernels import LogpKL
from stepkto_kernels.linear_logp import eager as head_eager
from stepkto_kernels.linear_logp_kl import reference as truth
from stepkto_kernels.linear_logp_kl.op import linear_logp_kl_forward
from test_linear_logp import (
    DTYPES,
    EVERYTHING,
    HEADS,
    assert_within_budget,
    linear_logp,
    one_thread,  # noqa: F401
    rounding_of_summands,
)
from test_linear_logp import inputs as head_inputs

linear_logp_kl = moved(stepkto_kernels.linear_logp_kl)
on_backend = fixture_over("linear_logp_kl", "reference", "native", "triton")
# (N, D, D of the reference, V); rows of 16 and 80 bytes are copied by another engine than those of 14
SHAPES = [(1, 1, 1, 1), (5, 3, 3, 1), (13, 16, 7, 50), (11, 8, 8, 333), (70, 40, 24, 130), (9, 24, 150, 140)]
SHAPES += [(300, 8, 8, 140)]  # several blocks of tokens on every backend


def inputs(shape, dtype, drift=0.3):
    n, d, e, v = shape
    hidden, weight, target, bias = head_inputs((n, d, v), dtype)
    ref_hidden, ref_weight, _, ref_bias = head_inputs((n, e, v), dtype, seed=5)
    if d == e:  # a reference that the policy has drifted away from, as in training
        ref_hidden = (hidden + drift * ref_hidden).to(dtype)
        ref_weight = (weight + drift * ref_weight).to(dtype)
    return hidden, weight, ref_hidden, ref_weight, target, bias, ref_bias


@pytest.fixture(params=["one tile", "many tiles"])
def tiles(request, monkeypatch):
    if request.param == "many tiles":
        monkeypatch.setattr(head_eager, "TILE_V", head_eager.VOCAB_TILE)
        monkeypatch.setattr(head_eager, "TILE_ELEMENTS", 512)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_match_the_truth(dtype, shape, head, tiles, on_backend):
    *operands, target, bias, ref_bias = inputs(shape, dtype)
    cotangent = torch.randn(shape[0], generator=torch.Generator().manual_seed(1))

    def run(function, as_dtype):
        h, w, b = (x.to(as_dtype).requires_grad_() for x in (*operands[:2], bias))
        ref_h, ref_w, ref_b = (x.to(as_dtype) for x in (*operands[2:], ref_bias))
        logp, ref_logp, kl = function(h, w, ref_h, ref_w, target, bias=b, ref_bias=ref_b, **head)
        gradients = torch.autograd.grad((logp * cotangent.to(logp)).sum(), (h, w, b))
        return logp.detach(), ref_logp, kl, *gradients

    ours, exact, plain = (
        run(functools.partial(linear_logp_kl, filter_eps=0), dtype),
        run(truth.linear_logp_kl, torch.float64),
        run(truth.linear_logp_kl, torch.float32),
    )
    logits = [x.double() @ y.double().T for x, y in (operands[:2], operands[2:])]
    largest_logit = max(z.abs().max().item() for z in logits) * head.get("logit_scale", 1) + 3
    largest_logit /= head.get("temperature", 1)
    cotangents = torch.stack([cotangent, torch.zeros_like(cotangent)])
    rounding = rounding_of_summands([*operands[:2], bias], target, cotangents, head, dtype)
    summands = [None] * 3 + [None if on_backend == "reference" else x for x in rounding]
    for i, values in enumerate(zip(ours, exact, plain, strict=True)):
        rounded_to = dtype if i >= 3 and dtype != torch.float32 else None
        assert_within_budget(*values, largest_logit, rounded_to, summands[i])
    assert all((x <= 0).all() for x in ours[:2])
    assert (ours[2] >= 0).all()
    assert all(x.dtype == torch.float32 for x in ours[:3])


def test_its_log_probs_are_those_of_linear_logp(tiles, on_backend):
    hidden, weight, ref_hidden, ref_weight, target, bias, ref_bias = inputs((13, 16, 7, 50), torch.bfloat16)
    result = linear_logp_kl(hidden, weight, ref_hidden, ref_weight, target, bias=bias, ref_bias=ref_bias, **EVERYTHING)
    assert isinstance(result, LogpKL)
    logp = linear_logp(hidden, weight, target, bias=bias, **EVERYTHING)
    ref_logp = linear_logp(ref_hidden, ref_weight, target, bias=ref_bias, **EVERYTHING)
    if on_backend == "reference":
        assert torch.equal(result.logp, logp)
        assert torch.equal(result.ref_logp, ref_logp)
    else:  # another kernel, which may add in another order
        torch.testing.assert_close((result.logp, result.ref_logp), (logp, ref_logp), rtol=1e-6, atol=2e-6)


def test_kl_of_a_model_with_itself_is_zero(tiles, on_backend):
    hidden, weight, _, _, target, bias, _ = inputs((13, 16, 16, 50), torch.float32)
    result = linear_logp_kl(hidden, weight, hidden, weight, target, bias=bias, ref_bias=bias)
    assert result.kl.max() <= 1e-6
    assert torch.equal(result.logp, result.ref_logp)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_head_of_both_models_is_as_good_as_two(dtype, on_backend):
    hidden, weight, ref_hidden, _, target, bias, ref_bias = inputs((70, 24, 24, 200), dtype)
    biases = {"bias": bias, "ref_bias": ref_bias}
    one = linear_logp_kl(hidden, weight, ref_hidden, weight, target, **biases)
    two = linear_logp_kl(hidden, weight, ref_hidden, weight.clone(), target, **biases)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_no_uninitialised_memory_is_read(on_backend):
    hidden, weight, ref_hidden, ref_weight, target, _, _ = inputs((140, 16, 7, 200), torch.bfloat16)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    with NaNMemory():
        result = linear_logp_kl(*leaves, ref_hidden, ref_weight, target)
        gradients = torch.autograd.grad(result.logp.sum(), leaves)
    assert all(torch.isfinite(x).all() for x in (*result, *gradients))


def test_rounding_never_makes_a_kl_negative(on_backend):
    """A reference one rounding away: the true KL is about 1e-14, below what fp32 can tell from 0."""
    hidden, weight, _, _, target, _, _ = inputs((60, 16, 16, 300), torch.float32)
    kl = linear_logp_kl(hidden, weight, hidden * (1 + 2**-22), weight, target).kl
    assert (kl >= 0).all()
    assert (kl == 0).any()  # else nothing was clamped, and this test shows nothing
    assert kl.max() < 1e-5


def test_a_policy_far_from_its_reference_has_a_finite_kl(on_backend):
    hidden, weight = torch.full((2, 1), 300.0), torch.tensor([[1.0], [-1.0], [0.0]])
    kl = linear_logp_kl(hidden, weight, -hidden, weight, torch.tensor([0, 1])).kl
    torch.testing.assert_close(kl, torch.full((2,), 600.0))


def test_only_logp_carries_a_gradient_and_none_reaches_the_reference(on_backend):
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in inputs((6, 4, 4, 9), torch.float32)]
    hidden, weight, ref_hidden, ref_weight, target, bias, ref_bias = leaves
    result = linear_logp_kl(hidden, weight, ref_hidden, ref_weight, target, bias=bias, ref_bias=ref_bias)
    assert [x.requires_grad for x in result] == [True, False, False]
    result.logp.sum().backward()
    assert all(x.grad is None for x in (ref_hidden, ref_weight, ref_bias))
    assert all(x.grad is not None for x in (hidden, weight, bias))


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_gradcheck(head, tiles):
    hidden, weight, ref_hidden, ref_weight, target, bias, _ = inputs((5, 3, 2, 19), torch.float64)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logp_kl(h, w, ref_hidden, ref_weight, target, bias=b, **head).logp, leaves
    )


def test_ignored_rows_are_exactly_zero_and_leak_nothing(on_backend):
    hidden, weight, ref_hidden, ref_weight, target, _, _ = inputs((9, 6, 4, 21), torch.float32)
    ignored = target == -100
    clean = linear_logp_kl(hidden, weight, ref_hidden, ref_weight, target)
    hidden[ignored], ref_hidden[ignored] = float("nan"), float("inf")
    weight.requires_grad_()
    poisoned = linear_logp_kl(hidden, weight, ref_hidden, ref_weight, target)
    for a, b in zip(clean, poisoned, strict=True):
        assert torch.equal(a, b)
        assert b[ignored].eq(0).all()
    poisoned.logp.sum().backward()
    assert torch.isfinite(weight.grad).all()


@pytest.mark.parametrize("rows", [0, 3], ids=["no rows", "all ignored"])
def test_nothing_to_score_still_has_a_graph(rows, on_backend):
    hidden, weight = torch.randn(rows, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    ignored = torch.full((rows,), -100)
    result = linear_logp_kl(hidden, weight, hidden.detach(), weight.detach(), ignored)
    assert all(x.tolist() == [0.0] * rows for x in result)
    result.logp.sum().backward()
    assert hidden.grad.eq(0).all()
    assert weight.grad.eq(0).all()


def test_policy_and_reference_may_differ_in_dtype(on_backend):
    hidden, weight, ref_hidden, ref_weight, target, _, _ = inputs((6, 4, 3, 9), torch.float32)
    mixed = linear_logp_kl(hidden, weight, ref_hidden.bfloat16(), ref_weight.bfloat16(), target)
    rounded = ref_hidden.bfloat16().float(), ref_weight.bfloat16().float()
    same = linear_logp_kl(hidden, weight, *rounded, target)
    for a, b in zip(mixed, same, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0 if on_backend == "reference" else 2e-6)


def test_a_reference_in_double_precision(on_backend):
    hidden, weight, ref_hidden, ref_weight, target, bias, ref_bias = inputs((6, 4, 3, 9), torch.float32)
    models = hidden, weight, ref_hidden.double(), ref_weight.double(), target
    found = linear_logp_kl(*models, bias=bias, ref_bias=ref_bias.double())
    single = linear_logp_kl(hidden, weight, ref_hidden, ref_weight, target, bias=bias, ref_bias=ref_bias)
    for a, b in zip(found, single, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("which", ["bias", "ref_bias"])
def test_a_bias_of_one_model_alone(which, on_backend):
    hidden, weight, ref_hidden, ref_weight, target, bias, _ = inputs((6, 4, 3, 9), torch.float32)
    models = hidden, weight, ref_hidden, ref_weight
    found = linear_logp_kl(*models, target, **{which: bias})
    exact = truth.linear_logp_kl(*(x.double() for x in models), target, **{which: bias.double()})
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_views_of_one_storage_are_not_one_head(on_backend):
    """The same first element, but other columns or other strides."""
    generator = torch.Generator().manual_seed(0)
    square, target = torch.randn(12, 12, generator=generator), torch.arange(5)
    hidden, wide = torch.randn(5, 12, generator=generator), torch.randn(5, 20, generator=generator)
    for weight, ref_hidden, ref_weight in (
        (square, hidden + 1, square.T),
        (square, hidden[:, :7], square[:, :7]),
        (square, wide[:, ::2][:, :10].T.contiguous().T, square[:, :10]),
        (square, wide[:, 3:15], square),  # one head, rows of the reference's states farther apart
    ):
        found = linear_logp_kl(hidden, weight, ref_hidden, ref_weight, target)
        exact = truth.linear_logp_kl(*(x.double() for x in (hidden, weight, ref_hidden, ref_weight)), target)
        for a, b in zip(found, exact, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_targets_at_the_borders_of_tiles_and_an_ignore_index_inside_the_vocabulary(on_backend):
    models = inputs((7, 8, 8, 300), torch.float32)[:4]
    target = torch.tensor([0, 127, 128, 255, 256, 299, 129])
    exact = truth.linear_logp_kl(*(x.double() for x in models), target)
    for ignored in (-100, 129):
        found = linear_logp_kl(*models, target, ignore_index=ignored)
        for a, b in zip(found, exact, strict=True):
            b = torch.where(target == ignored, 0, b)
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_a_broken_reference_does_not_pass_for_a_kl_of_zero(on_backend):
    hidden, weight, ref_hidden, ref_weight, _, _, _ = inputs((3, 4, 4, 300), torch.float32)
    target = torch.tensor([1, 2, 3])
    ref_hidden[1] = float("nan")
    kl = linear_logp_kl(hidden, weight, ref_hidden, ref_weight, target).kl
    assert kl.isnan().tolist() == [False, True, False]
    nowhere = torch.zeros(300)
    nowhere[128:256] = -float("inf")  # a whole tile that the reference rules out
    assert linear_logp_kl(hidden, weight, hidden, weight, target, ref_bias=nowhere).kl.eq(float("inf")).all()


def test_autocast_casts_both_models():
    hidden, weight, ref_hidden, ref_weight, target, _, _ = inputs((6, 4, 3, 9), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_logp_kl(hidden, weight, ref_hidden, ref_weight, target)
    cast = (x.bfloat16() for x in (hidden, weight, ref_hidden, ref_weight))
    assert all(torch.equal(a, b) for a, b in zip(found, linear_logp_kl(*cast, target), strict=True))


def test_opcheck():
    hidden, weight, ref_hidden, ref_weight, target, bias, ref_bias = inputs((6, 4, 3, 9), torch.float32)
    hidden, weight, bias = (x.requires_grad_() for x in (hidden, weight, bias))
    arguments = hidden, weight, ref_hidden, ref_weight, target
    torch.library.opcheck(linear_logp_kl_forward, (*arguments, bias, ref_bias, 0.7, 5.0, 1.3, -100, 0.0, True))
    torch.library.opcheck(linear_logp_kl_forward, (*arguments, None, None, 1.0, None, 1.0, -100, 0.0, False))


def test_compiles_without_graph_breaks_and_checks_values_when_it_runs():
    def function(hidden, weight, ref_hidden, ref_weight, target):
        result = linear_logp_kl(hidden, weight, ref_hidden, ref_weight, target, validate=True)
        return (result.logp * (1 + result.kl)).sum() + result.ref_logp.sum()

    hidden, weight, ref_hidden, ref_weight, target, _, _ = inputs((6, 4, 3, 9), torch.float32)
    hidden.requires_grad_()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    arguments = hidden, weight, ref_hidden, ref_weight
    expected, found = function(*arguments, target), compiled(*arguments, target)
    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(x, hidden)[0] for x in (expected, found)))
    with pytest.raises(ValueError, match=r"target of shape \(6,\) holds 9"):
        compiled(*arguments, torch.full_like(target, 9))


X, W, T = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64)
BAD = {
    "ref_hidden N": (ValueError, r"target has shape \(3,\).*N=2|ref_hidden", {"ref_hidden": X[:2]}),
    "ref_hidden D": (ValueError, r"ref_weight has shape \(5, 4\).*D=3", {"ref_hidden": X[:, :3]}),
    "ref_weight V": (ValueError, r"ref_weight has shape \(4, 4\).*V=5", {"ref_weight": W[:4]}),
    "ref_weight dtype": (TypeError, "ref_weight has dtype torch.float16", {"ref_weight": W.half()}),
    "ref_hidden None": (TypeError, "ref_hidden is a NoneType", {"ref_hidden": None}),
    "ref_hidden device": (
        ValueError,
        "ref_.* is on",
        {"ref_hidden": X.to("meta"), "ref_weight": W.to("meta")},
    ),
    "ref_bias": (ValueError, r"ref_bias has shape \(3,\)", {"ref_bias": torch.zeros(3)}),
    "bias": (ValueError, r"bias has shape \(3,\)", {"bias": torch.zeros(3)}),
    "target": (ValueError, "target .* holds 7", {"target": torch.tensor([0, 7, 0])}),
    "temperature": (ValueError, "temperature is -1", {"temperature": -1}),
}


@pytest.mark.parametrize(("error", "message", "change"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_before_any_compute(error, message, change, monkeypatch):
    def fail(*_):
        raise AssertionError("computed")

    monkeypatch.setattr(head_eager.Head, "logits", fail)
    good = {"hidden": X, "weight": W, "ref_hidden": X, "ref_weight": W, "target": T}
    with pytest.raises(error, match=message):
        linear_logp_kl(**good | change)
