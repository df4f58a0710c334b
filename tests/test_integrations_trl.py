"""Our log-probabilities in TRL's place: the same call, results nearer to the truth, and how they get there."""

import inspect
import math
from functools import partial
from importlib import metadata

import pytest
import torch

pytest.importorskip("trl", reason="needs trl")

import trl.kernels
import trl.kernels.chunked_logprob
import trl.trainer.utils

from stepkto_fast.integrations import trl as adapter
from stepkto_fast.integrations.trl import OPTIONAL_OUTPUTS, ChunkedLogProbFunction, patch, unpatch

THEIRS = trl.kernels.ChunkedLogProbFunction
THEIR_QUESTION = trl.trainer.utils._use_triton
CHUNK = 64
EVERYTHING = {"temperature": 0.7, "final_logit_softcapping": 8.0, "logit_scale": 0.5}
HEADS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"final_logit_softcapping": 5.0},
    "scale": {"logit_scale": 2.0},
    "everything": EVERYTHING,
}


@pytest.fixture(autouse=True)
def nothing_stays_patched():
    yield
    unpatch()
    assert in_place() == (THEIRS, THEIRS, THEIRS, THEIR_QUESTION)


def in_place():
    utils = trl.trainer.utils
    return (
        trl.kernels.ChunkedLogProbFunction,
        trl.kernels.chunked_logprob.ChunkedLogProbFunction,
        utils._ChunkedLogProbFunction,
        utils._use_triton,
    )


def inputs(dtype=torch.float32, rows=24, width=16, vocabulary=300, bias=True, requires_grad=True):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(rows, width, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype)
    bias_V = torch.randn(vocabulary, generator=generator).to(dtype) if bias else None
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    for x in (hidden, weight, bias_V):
        if x is not None:
            x.requires_grad_(requires_grad)
    return hidden, weight, bias_V, targets


def call(function, tensors, temperature=1.0, outputs=OPTIONAL_OUTPUTS, final_logit_softcapping=None, logit_scale=1.0):
    return function.apply(*tensors, temperature, CHUNK, final_logit_softcapping, logit_scale, outputs)


class Plain:
    """What both compute, from whole logits in fp64."""

    @staticmethod
    def apply(
        hidden, weight, bias, targets, temperature, chunk_size,
        final_logit_softcapping=None, logit_scale=1.0, outputs=OPTIONAL_OUTPUTS,
    ):  # fmt: skip
        z = hidden.double() @ weight.double().T
        z = logit_scale * (z if bias is None else z + bias.double())
        if final_logit_softcapping is not None:
            z = final_logit_softcapping * torch.tanh(z / final_logit_softcapping)
        z = z / temperature
        log_p = z.log_softmax(-1)
        all_of_them = {
            "entropy": -(log_p.exp() * log_p).sum(-1),
            "log_sum_sq_probs": (2 * log_p).logsumexp(-1).detach(),
            "mean_logits": z.mean(-1).detach(),
            "is_top1": z.argmax(-1) == targets,
        }
        logp = log_p.gather(1, targets[:, None])[:, 0]
        return logp, *(x if name in outputs else None for name, x in all_of_them.items())


def gradients(function, tensors, entropy=True, **options):
    """Of hidden, weight and bias, with a coefficient of its own for every token."""
    leaves = [None if x is None else x.detach().clone().requires_grad_(x.requires_grad) for x in tensors[:3]]
    logp, entropy_N, *_ = call(
        function, (*leaves, tensors[3]), outputs=("entropy",) if entropy else ("log_probs",), **options
    )
    coefficients = torch.linspace(-1, 2, len(logp), dtype=logp.dtype)
    loss = (coefficients * logp).sum() + (0 if entropy_N is None else (coefficients.flip(0) * entropy_N).sum())
    loss.backward()
    return [None if x is None else x.grad for x in leaves]


def largest_logit(tensors, head):
    hidden, weight, bias, _ = tensors
    with torch.no_grad():
        z = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    options = HEADS[head]
    return z.abs().max().item() * options.get("logit_scale", 1.0) / options.get("temperature", 1.0)


def error(x, exact):
    """Root mean square."""
    return (x.double() - exact.double()).square().mean().sqrt().item()


def assert_at_least_as_near(ours, theirs, exact, inputs_dtype, largest_logit):
    """In 16 bits TRL rounds every logit and we round none: ours must be nearer. Gradients are rounded to 16 bits in the
    end by both; where a softcap makes the rest small, that is all there is, and as large in ours, to a tenth. In fp32
    both add the same products in different orders and subtract numbers of a logit's size: errors of one size, within
    half an ulp of the largest logit of each other."""
    allowed = error(theirs, exact)
    if ours.dtype == torch.bfloat16:
        allowed *= 1.1
    elif inputs_dtype == torch.float32:
        allowed += torch.finfo(torch.float32).eps / 2 * largest_logit * max(1.0, exact.abs().max().item())
    assert error(ours, exact) <= allowed, f"error {error(ours, exact):.3g}, TRL's {error(theirs, exact):.3g}"


# --- the function -----------------------------------------------------------------------------------------------------


def test_it_is_called_as_trls_is():
    _ctx, *theirs = inspect.signature(THEIRS.forward).parameters.values()
    ours = inspect.signature(ChunkedLogProbFunction.apply).parameters.values()
    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs]
    assert trl.kernels.chunked_logprob.OPTIONAL_OUTPUTS == OPTIONAL_OUTPUTS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_every_output_is_at_least_as_near_to_the_truth_as_trls(head, dtype, bias):
    tensors = inputs(dtype, bias=bias)
    exact, ours, theirs = (call(f, tensors, **HEADS[head]) for f in (Plain, ChunkedLogProbFunction, THEIRS))
    for name, a, b, e in zip(("logprobs", *OPTIONAL_OUTPUTS[:-1]), ours, theirs, exact, strict=False):
        assert (a.shape, a.dtype, a.requires_grad) == (b.shape, torch.float32, b.requires_grad), name
        assert_at_least_as_near(a, b, e, dtype, largest_logit(tensors, head))
    assert ours[-1].dtype == torch.bool
    assert torch.equal(ours[-1], exact[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("entropy", [False, True], ids=["logp", "logp and entropy"])
def test_every_gradient_is_at_least_as_near_to_the_truth_as_trls(head, dtype, entropy):
    tensors = inputs(dtype)
    options = {"entropy": entropy, **HEADS[head]}
    exact = gradients(Plain, [*(x.detach().double().requires_grad_() for x in tensors[:3]), tensors[3]], **options)
    ours, theirs = gradients(ChunkedLogProbFunction, tensors, **options), gradients(THEIRS, tensors, **options)
    for a, b, e in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype == dtype
        assert_at_least_as_near(a, b, e, dtype, largest_logit(tensors, head))


def test_gradients_through_the_statistics_are_those_without():
    tensors = inputs()
    few, all_of_them = (
        gradients(Outputs(names), tensors, temperature=0.7) for names in (("entropy",), OPTIONAL_OUTPUTS)
    )
    for a, b in zip(few, all_of_them, strict=True):
        torch.testing.assert_close(a, b)


class Outputs:
    """Ours, asked for these outputs whatever the caller asks."""

    def __init__(self, names):
        self.names = names

    def apply(self, *arguments):
        return ChunkedLogProbFunction.apply(*arguments[:-1], self.names)


def test_only_what_is_asked_for_is_returned():
    tensors = inputs()
    for names in ((), ("log_probs",), ("entropy",), ("log_probs", "mean_logits"), ("is_top1", "entropy")):
        logp, *others = call(ChunkedLogProbFunction, tensors, outputs=names)
        assert logp.shape == (24,)
        assert [x is not None for x in others] == [name in names for name in OPTIONAL_OUTPUTS]


@pytest.mark.parametrize(
    ("names", "expected"),
    [(("log_probs",), "linear_logp"), (("entropy",), "linear_logp_entropy"), (("is_top1",), "linear_logp_stats")],
)
def test_the_cheapest_kernel_that_answers_is_called(names, expected, monkeypatch):
    for kernel in ("linear_logp", "linear_logp_entropy", "linear_logp_stats"):
        if kernel != expected:
            monkeypatch.delattr(adapter, kernel)
    assert call(ChunkedLogProbFunction, inputs(), outputs=names)[0].shape == (24,)


def test_an_unknown_output_is_refused():
    with pytest.raises(ValueError, match=r"outputs holds \['entropies'\]"):
        call(ChunkedLogProbFunction, inputs(), outputs=("entropies",))


def test_statistics_carry_no_gradient():
    _, entropy, *others = call(ChunkedLogProbFunction, inputs())
    assert entropy.requires_grad
    assert [x.requires_grad for x in others] == [False, False, False]


def test_is_top1_of_a_tie_is_the_first():
    hidden, weight, _, _ = inputs(bias=False, requires_grad=False)
    weight[150:] = weight[:150]
    first = (hidden @ weight.T).argmax(-1) % 150
    targets = torch.where(torch.arange(24) % 2 == 0, first, first + 150)
    is_top1 = call(ChunkedLogProbFunction, (hidden, weight, None, targets))[-1]
    assert torch.equal(is_top1, targets < 150)


@pytest.mark.parametrize("frozen", range(3), ids=["hidden", "weight", "bias"])
def test_frozen_inputs_get_no_gradient(frozen):
    tensors = inputs()
    whole = gradients(ChunkedLogProbFunction, tensors)
    tensors[frozen].requires_grad_(False)
    for n, (found, expected) in enumerate(zip(gradients(ChunkedLogProbFunction, tensors), whole, strict=True)):
        if n == frozen:
            assert found is None
        else:
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("names", [("log_probs",), ("entropy",), OPTIONAL_OUTPUTS], ids=str)
def test_no_token_at_all_still_hangs_on_the_model(names):
    """A micro-batch without a single label contributes a zero that can be differentiated."""
    tensors = inputs(rows=0)
    results = call(ChunkedLogProbFunction, tensors, outputs=names)
    assert all(x.shape == (0,) for x in results if x is not None)
    results[0].sum().backward()
    assert [x.grad.abs().max().item() for x in tensors[1:3]] == [0, 0]


@pytest.mark.parametrize(
    ("hidden_dtype", "weight_dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str
)
def test_the_head_is_cast_to_hidden(hidden_dtype, weight_dtype):
    hidden, weight, bias, targets = inputs()
    mixed = hidden.detach().to(hidden_dtype), weight.detach().to(weight_dtype), bias.detach().to(weight_dtype)
    cast = tuple(x.to(hidden_dtype) for x in mixed)
    mixed, cast = ([x.requires_grad_() for x in xs] for xs in (mixed, cast))
    assert torch.equal(
        call(ChunkedLogProbFunction, (*mixed, targets))[0], call(ChunkedLogProbFunction, (*cast, targets))[0]
    )
    found, expected = (gradients(ChunkedLogProbFunction, (*xs, targets)) for xs in (mixed, cast))
    for x, a, b in zip(mixed, found, expected, strict=True):
        assert a.dtype == x.dtype
        assert torch.equal(a, b.to(x.dtype))


def test_under_autocast_products_have_its_dtype():
    """Also the backward's: bits of hidden that the forward rounded away must not come back."""
    hidden, weight, bias, targets = inputs()
    rounded = hidden.detach().bfloat16().float().requires_grad_()
    found = []
    for h in (hidden, rounded):
        leaves = [x.detach().clone().requires_grad_() for x in (h, weight, bias)]
        with torch.autocast("cpu", torch.bfloat16):
            logp, entropy, *_ = call(ChunkedLogProbFunction, (*leaves, targets))
        (logp + entropy).sum().backward()
        assert {x.grad.dtype for x in leaves} == {torch.float32}
        found.append([logp, entropy, *(x.grad for x in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        theirs = call(THEIRS, (hidden, weight, bias, targets))
    exact = call(Plain, tuple(x.bfloat16() if x.is_floating_point() else x for x in (hidden, weight, bias, targets)))
    assert error(found[0][0], exact[0]) < error(theirs[0], exact[0])


def test_under_autocast_the_head_goes_to_its_dtype_at_once():
    """Not by way of hidden's, which may have no room for it."""
    hidden, weight, _, targets = inputs(bias=False, requires_grad=False)
    large = weight * 1e5
    with torch.autocast("cpu", torch.bfloat16):
        found = call(ChunkedLogProbFunction, (hidden.half(), large, None, targets), outputs=())[0]
    expected = call(ChunkedLogProbFunction, (hidden.half().bfloat16(), large.bfloat16(), None, targets), outputs=())[0]
    assert expected.isfinite().all()
    assert torch.equal(found, expected)


def test_inside_autocast_a_disabled_one_keeps_fp32():
    """As `cast_lm_head_to_fp32` runs the head."""
    hidden, weight, bias, targets = inputs(requires_grad=False)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        inside = call(ChunkedLogProbFunction, (hidden, weight.bfloat16(), bias.bfloat16(), targets))[0]
    outside = call(ChunkedLogProbFunction, (hidden, weight.bfloat16().float(), bias.bfloat16().float(), targets))[0]
    assert torch.equal(inside, outside)


def test_log_probs_are_never_above_zero():
    """A confident 16-bit head: rounding used to lift log-probabilities above 0 among users of TRL."""
    hidden, weight, _, _ = inputs(torch.bfloat16, rows=200, bias=False, requires_grad=False)
    targets = (hidden.float() @ weight.float().T).argmax(-1)
    for scale in (1, 3, 10, 100):
        logp, entropy, *_ = call(ChunkedLogProbFunction, (scale * hidden, weight, None, targets))
        assert logp.max() <= 0
        assert entropy.min() >= 0
    assert logp.max() == 0  # the largest scale is confident indeed


def test_a_nan_is_not_hidden():
    """Their losses take nanmean: what turned NaN must at least show in the log-probability, and there alone."""
    hidden, weight, bias, targets = inputs(requires_grad=False)
    hidden[5] = math.nan
    logp = call(ChunkedLogProbFunction, (hidden, weight, bias, targets), outputs=("log_probs",))[0]
    assert logp.isnan().nonzero().tolist() == [[5]]


def test_wrong_arguments_are_named():
    hidden, weight, bias, targets = inputs()
    for tensors, options, name in (
        ((hidden, weight[:, :-1], bias, targets), {}, "weight"),
        ((hidden, weight, bias[:-1], targets), {}, "bias"),
        ((hidden, weight, bias, targets + 300), {}, "target"),
        ((hidden, weight, bias, targets), {"temperature": 0.0}, "temperature"),
        ((hidden, weight, bias, targets), {"final_logit_softcapping": 0.0}, "softcap"),
    ):
        with pytest.raises(ValueError, match=name):
            call(ChunkedLogProbFunction, tensors, **options)


# --- ZeRO-3: the head's data are there in the gather context only ---------------------------------------------------


def partition(parameter):
    parameter.data = torch.empty(0, dtype=parameter.dtype)


def gather(parameter, whole, _gradient):
    parameter.data = whole.clone()


@pytest.mark.parametrize("names", [("log_probs",), ("entropy",), OPTIONAL_OUTPUTS], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_a_head_partitioned_before_the_backward_gives_the_right_gradients(names, autocast):
    tensors = inputs()

    def run(partitioned):
        hidden, weight, bias = (torch.nn.Parameter(x.detach().clone()) for x in tensors[:3])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logp = call(ChunkedLogProbFunction, (hidden, weight, bias, tensors[3]), outputs=names)[0]
        if partitioned:
            for parameter, whole in ((weight, tensors[1]), (bias, tensors[2])):
                partition(parameter)
                # as it does before a gradient is stored, which is after our backward
                parameter.register_hook(partial(gather, parameter, whole.detach()))
        logp.square().sum().backward()
        return hidden.grad, weight.grad, bias.grad

    for found, expected in zip(run(True), run(False), strict=True):
        assert expected.abs().max() > 0
        assert torch.equal(found, expected)


def test_a_head_that_was_not_gathered_is_refused():
    hidden, weight, bias, targets = inputs()
    weight = torch.nn.Parameter(weight.detach())
    partition(weight)
    with pytest.raises(ValueError, match=r"weight has shape \(0,\).*ZeRO-3.*maybe_gather_lm_head_ctx"):
        call(ChunkedLogProbFunction, (hidden, weight, bias, targets))


# --- patching ---------------------------------------------------------------------------------------------------------


def test_a_plain_call_stays_and_unpatch_restores():
    patch()
    ours = in_place()
    assert ours[:3] == (ChunkedLogProbFunction,) * 3
    patch()
    assert in_place() == ours
    unpatch()
    assert in_place() == (THEIRS, THEIRS, THEIRS, THEIR_QUESTION)
    unpatch()
    assert in_place() == (THEIRS, THEIRS, THEIRS, THEIR_QUESTION)


def test_contexts_restore_what_they_found():
    with patch():
        outer = in_place()
        with patch(filter_eps=0.0):
            assert in_place() != outer
            assert in_place()[0].filter_eps == 0
        assert in_place() == outer
        patch(filter_eps=0.125)
    assert in_place() == (THEIRS, THEIRS, THEIRS, THEIR_QUESTION)


def test_a_context_in_a_plain_patch_leaves_the_patch():
    patch(filter_eps=0.0)
    outer = in_place()
    with patch():
        assert in_place()[0] is ChunkedLogProbFunction
    assert in_place() == outer


def test_unpatch_leaves_what_others_do_after_a_context(monkeypatch):
    with patch():
        pass
    monkeypatch.setattr("trl.trainer.utils._use_triton", Plain)
    unpatch()
    assert in_place()[3] is Plain
    monkeypatch.undo()


def test_an_error_in_the_context_restores():
    with pytest.raises(KeyError), patch():
        raise KeyError
    assert in_place() == (THEIRS, THEIRS, THEIRS, THEIR_QUESTION)


@pytest.mark.parametrize("filter_eps", [-0.1, 1.0, math.nan, "none", True])
def test_a_wrong_filter_eps_is_refused(filter_eps):
    with pytest.raises(ValueError, match="filter_eps"):
        patch(filter_eps=filter_eps)
    assert in_place() == (THEIRS, THEIRS, THEIRS, THEIR_QUESTION)


def test_filter_eps_reaches_the_kernel(monkeypatch):
    seen = []

    def spy(*arguments, filter_eps, **options):
        seen.append(filter_eps)
        return arguments[0].sum(-1)

    monkeypatch.setattr(adapter, "linear_logp", spy)
    for filter_eps in ("auto", 0.0, 0.25):
        with patch(filter_eps=filter_eps):
            call(trl.kernels.ChunkedLogProbFunction, inputs(), outputs=())
    assert seen == ["auto", 0.0, 0.25]


@pytest.mark.parametrize("version", ["1.15.2", "1.17.0"])
def test_another_version_of_trl_is_refused(version, monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: version)
    with pytest.raises(ImportError, match=rf"trl==1\.16\.\*, found version {version}"):
        patch()
    assert in_place() == (THEIRS, THEIRS, THEIRS, THEIR_QUESTION)


class OtherSignature(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets):
        return hidden


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        ("trl.trainer.utils", "_ChunkedLogProbFunction", Plain),
        ("trl.trainer.utils", "_use_triton", lambda device: True),
        ("trl.kernels", "ChunkedLogProbFunction", OtherSignature),
        ("trl.kernels.chunked_logprob", "OPTIONAL_OUTPUTS", ("entropy",)),
    ],
)
def test_what_looks_otherwise_is_not_patched(module, name, value, monkeypatch):
    monkeypatch.setattr(f"{module}.{name}", value)
    before = in_place()
    with pytest.raises(ImportError, match=rf"{module}\.{name}".replace(".", r"\.").replace(r"\\", "\\")):
        patch()
    assert in_place() == before
    monkeypatch.undo()


def test_a_function_with_other_arguments_is_not_patched(monkeypatch):
    for module, name in adapter._FUNCTION_NAMES:
        monkeypatch.setattr(f"{module}.{name}", OtherSignature)
    with pytest.raises(ImportError, match="OtherSignature"):
        patch()
    assert in_place()[:3] == (OtherSignature,) * 3
    monkeypatch.undo()


def test_the_question_we_answer_otherwise_is_asked_once():
    """`_use_triton` in that module decides which positions are scored, and nothing else."""
    assert inspect.getsource(trl.trainer.utils).count("_use_triton(") == 1
    assert "compact = _use_triton(" in inspect.getsource(trl.trainer.utils.add_fused_lm_head)
