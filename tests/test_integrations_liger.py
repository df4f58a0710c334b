"""Liger's KTO loss on our kernels, against fp64 and against the real class."""

import inspect
import subprocess
import sys

import pytest
import stepkto_kernels
import torch
from torch import nn

from stepkto_fast.integrations import liger
from stepkto_fast.integrations.liger import LigerFusedLinearKTOLoss

B, T, D, V = 6, 9, 24, 61
METRICS = (
    "chosen_logps", "rejected_logps", "chosen_logits", "rejected_logits", "chosen_rewards", "rejected_rewards",
)  # fmt: skip


@pytest.fixture
def theirs():
    """The real class; it compiles by default, which would take longer than all of these tests."""
    module = pytest.importorskip("liger_kernel.chunked_loss", reason="compares with liger-kernel, which is missing")

    def build(**options):
        return module.LigerFusedLinearKTOLoss(compiled=False, **options)

    return build


def batch(seed=0, dtype=torch.float32, *, bias=True, ref_bias=True, labels=None, size=1.0):
    """Arguments of forward: completions with a prompt in front and padding behind, of both kinds."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return (torch.randn(*shape, generator=generator)).to(dtype)

    target = torch.randint(0, V, (B, T), generator=generator)
    for i in range(B):
        target[i, : 1 + i % 3] = -100
        target[i, T - i % 4 :] = -100
    hidden, weight = normal(B, T, D) * size, normal(V, D) / 2
    return {
        "_input": hidden.requires_grad_(),
        "lin_weight": weight.requires_grad_(),
        "target": target,
        "bias": normal(V).requires_grad_() if bias else None,
        "preference_labels": torch.arange(B) % 3 == 0 if labels is None else torch.tensor(labels),
        "ref_input": (hidden + normal(B, T, D) / 10).detach(),
        "ref_weight": (weight + normal(V, D) / 20).detach(),
        "ref_bias": normal(V) if ref_bias else None,
        "kl": torch.tensor(0.7, dtype=dtype),
    }


def leaves(arguments):
    return [arguments[k] for k in ("_input", "lin_weight", "bias") if arguments[k] is not None]


def truth(
    arguments, *, beta=0.1, use_ref_model=True, average_log_prob=False, desirable_weight=1.0, undesirable_weight=1.0
):
    """(loss, gradients, metrics) in fp64, from the logits of every position."""
    wide = {
        k: x.detach().double().requires_grad_(x.requires_grad) if torch.is_tensor(x) and x.is_floating_point() else x
        for k, x in arguments.items()
    }
    scored = wide["target"] != -100

    def per_completion(hidden, weight, bias):
        logits = hidden @ weight.T + (0 if bias is None else bias)
        logp = logits.log_softmax(-1).gather(-1, wide["target"].clamp(min=0)[..., None])[..., 0] * scored
        return logp.sum(1) / (scored.sum(1).clamp(min=1) if average_log_prob else 1), logits.sum((1, 2))

    logps, logits = per_completion(wide["_input"], wide["lin_weight"], wide["bias"])
    ratios = logps
    if use_ref_model:
        ratios = logps - per_completion(wide["ref_input"], wide["ref_weight"], wide["ref_bias"])[0]
    labels = wide["preference_labels"]
    signs = torch.where(labels, 1.0, -1.0).double()
    weights = torch.where(labels, desirable_weight, undesirable_weight).double()
    kl = 0.0 if wide["kl"] is None else wide["kl"]
    loss = (weights * (1 - torch.sigmoid(signs * beta * (ratios - kl)))).mean()
    metrics = [x[side].sum() for x in (logps, logits, beta * ratios) for side in (labels, ~labels)]
    return loss.detach(), torch.autograd.grad(loss, leaves(wide)), [x.detach() for x in metrics]


def run(loss_function, arguments):
    loss, metrics = loss_function(**arguments)
    return loss.detach(), torch.autograd.grad(loss, leaves(arguments)), list(metrics)


def error(found, expected):
    return (found.double() - expected).abs().max().item()


def assert_as_near_as_theirs(ours, theirs, exact, factor=2.0):
    """Our errors are at most `factor` times those of the real class, but for a rounding of the result itself."""
    for mine, other, right in zip(
        (ours[0], *ours[1], *ours[2]),
        (theirs[0], *theirs[1], *theirs[2]),
        (exact[0], *exact[1], *exact[2]),
        strict=True,
    ):
        rounding = torch.finfo(mine.dtype).eps * right.abs().max().item()
        assert error(mine, right) <= factor * error(other, right) + rounding


@pytest.mark.parametrize("average_log_prob", [False, True])
@pytest.mark.parametrize("use_ref_model", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_gradients_and_metrics_are_right_in_fp64(bias, use_ref_model, average_log_prob):
    options = {"beta": 0.3, "use_ref_model": use_ref_model, "average_log_prob": average_log_prob}
    arguments = batch(dtype=torch.float64, bias=bias, ref_bias=bias)
    loss, gradients, metrics = run(LigerFusedLinearKTOLoss(**options), arguments)
    right, right_gradients, right_metrics = truth(arguments, **options)
    assert loss.dtype == torch.float64
    torch.testing.assert_close([loss, *gradients, *metrics], [right, *right_gradients, *right_metrics])


@pytest.mark.parametrize("average_log_prob", [False, True])
@pytest.mark.parametrize("use_ref_model", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kl", ["none", "scalar", "one"])
def test_is_the_real_one_in_fp32(theirs, kl, bias, use_ref_model, average_log_prob):
    options = {"beta": 0.3, "use_ref_model": use_ref_model, "average_log_prob": average_log_prob}
    arguments = batch(bias=bias, ref_bias=bias)
    arguments["kl"] = {"none": None, "scalar": arguments["kl"], "one": arguments["kl"].reshape(1)}[kl]
    ours = run(LigerFusedLinearKTOLoss(**options, filter_eps=0.0), arguments)
    assert_as_near_as_theirs(ours, run(theirs(**options), arguments), truth(arguments, **options))
    assert ours[0].shape == ()
    assert all(x.shape == () and not x.requires_grad for x in ours[2])


@pytest.mark.parametrize("seed", range(4))
def test_log_probs_are_not_rounded_to_16_bits(theirs, seed):
    arguments = batch(seed, torch.bfloat16, size=2.0)
    options = {"use_ref_model": True}
    ours, exact = run(LigerFusedLinearKTOLoss(**options), arguments), truth(arguments, **options)
    real = run(theirs(**options), arguments)
    for n, name in enumerate(METRICS):
        assert error(ours[2][n], exact[2][n]) < error(real[2][n], exact[2][n]) / 4, name
    assert error(ours[0], exact[0]) < error(real[0], exact[0]) / 4
    for mine, other, right in zip(ours[1], real[1], exact[1], strict=True):
        # Both gradients are rounded to bf16 at the end; theirs before that too.
        assert (mine.double() - right).norm() < (other.double() - right).norm()


def test_class_weights_are_honoured(theirs):
    arguments = batch()
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.25}
    ours = run(LigerFusedLinearKTOLoss(use_ref_model=True, filter_eps=0.0, **weights), arguments)
    right, gradients, _ = truth(arguments, **weights)
    torch.testing.assert_close(ours[0].double(), right, rtol=1e-6, atol=0)
    for mine, exact in zip(ours[1], gradients, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-7)
    with pytest.raises(TypeError, match="desirable_weight"):
        theirs(**weights)


def test_a_reference_point_per_completion(theirs):
    arguments = batch()
    arguments["kl"] = torch.linspace(-1, 2, B)
    right = truth(arguments)[0]
    ours = LigerFusedLinearKTOLoss(use_ref_model=True)(**arguments)[0]
    torch.testing.assert_close(ours.double(), right, rtol=1e-6, atol=0)
    # The real one adds up B terms of each completion, one for every number in kl.
    assert theirs(use_ref_model=True)(**arguments)[0] > 3 * right


@pytest.mark.parametrize("kl", [60.0, -60.0])
def test_gradients_of_saturated_completions_keep_their_digits(theirs, kl):
    arguments = batch() | {"kl": torch.tensor(kl)}
    options = {"use_ref_model": True, "beta": 0.3}
    ours, real = (run(f(**options), arguments)[1] for f in (LigerFusedLinearKTOLoss, theirs))
    for mine, other, exact in zip(ours, real, truth(arguments, **options)[1], strict=True):
        assert error(mine, exact) < 1e-4 * exact.abs().max()
        assert error(other, exact) > 1e-2 * exact.abs().max()


def test_kl_is_a_constant_and_may_be_a_number():
    arguments = batch()
    kl = torch.tensor(0.7, requires_grad=True)
    loss = LigerFusedLinearKTOLoss(use_ref_model=True)(**arguments | {"kl": kl})[0]
    loss.backward()
    assert kl.grad is None
    assert torch.equal(loss, LigerFusedLinearKTOLoss(use_ref_model=True)(**arguments | {"kl": 0.7})[0])


def test_what_is_not_scored_changes_nothing():
    arguments = batch()
    function = LigerFusedLinearKTOLoss(use_ref_model=True)
    loss, gradients, metrics = run(function, arguments)
    ignored = arguments["target"] == -100
    with torch.no_grad():
        arguments["_input"][ignored] = float("nan")
        arguments["ref_input"][ignored] = float("inf")
    loss_after, gradients_after, metrics_after = run(function, arguments)
    assert torch.equal(loss, loss_after)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_after, strict=True))
    assert not gradients_after[0][ignored].any()
    logps_and_rewards = (0, 1, 4, 5)
    assert all(torch.equal(metrics[n], metrics_after[n]) for n in logps_and_rewards)


def test_longer_padding_changes_nothing():
    arguments = batch()
    function = LigerFusedLinearKTOLoss(use_ref_model=True, average_log_prob=True)
    longer = dict(arguments)
    for name, fill in (("_input", 0.0), ("ref_input", 0.0), ("target", -100)):
        pad = (0, 0, 0, 5) if name != "target" else (0, 5)
        longer[name] = nn.functional.pad(arguments[name].detach(), pad, value=fill)
    loss, longer_loss = function(**arguments)[0], function(**longer)[0]
    torch.testing.assert_close(longer_loss, loss, rtol=1e-6, atol=0)


def test_only_scored_positions_reach_the_head(monkeypatch):
    rows = []

    def recording(hidden, *args, filter_eps, **options):
        rows.append(len(hidden))
        assert filter_eps == 0.25
        return stepkto_kernels.linear_logp(hidden, *args, filter_eps=filter_eps, **options)

    monkeypatch.setattr(liger, "linear_logp", recording)
    arguments = batch()
    LigerFusedLinearKTOLoss(use_ref_model=True, filter_eps=0.25)(**arguments)
    assert rows == [(arguments["target"] != -100).sum()] * 2


@pytest.mark.parametrize("labels", [[True] * B, [False] * B], ids=["all chosen", "all rejected"])
def test_batches_of_one_kind(theirs, labels):
    arguments = batch(labels=labels)
    options = {"use_ref_model": True}
    ours, exact = run(LigerFusedLinearKTOLoss(**options, filter_eps=0.0), arguments), truth(arguments, **options)
    assert_as_near_as_theirs(ours, run(theirs(**options), arguments), exact)
    absent = slice(1, None, 2) if labels[0] else slice(0, None, 2)
    assert all(x == 0 for x in ours[2][absent])


def test_one_completion(theirs):
    arguments = {
        k: x.detach()[:1].requires_grad_(x.requires_grad) if torch.is_tensor(x) and x.shape[:1] == (B,) else x
        for k, x in batch().items()
    }
    options = {"use_ref_model": True}
    ours = run(LigerFusedLinearKTOLoss(**options, filter_eps=0.0), arguments)
    assert_as_near_as_theirs(ours, run(theirs(**options), arguments), truth(arguments, **options))


@pytest.mark.parametrize("average_log_prob", [False, True])
def test_nothing_scored(average_log_prob):
    arguments = batch(labels=[True] * 3 + [False] * 3)
    arguments["target"] = torch.full((B, T), -100)
    loss, gradients, metrics = run(LigerFusedLinearKTOLoss(average_log_prob=average_log_prob), arguments)
    # r is 0, so the chosen have 1 - sigmoid(-beta kl), the others 1 - sigmoid(beta kl): together 1 a pair.
    assert loss == pytest.approx(0.5)
    assert not any(x.any() for x in gradients)
    assert all(metrics[n] == 0 for n in (0, 1, 4, 5))


def test_a_completion_without_scored_positions_is_not_nan(theirs):
    arguments = batch()
    arguments["target"][2] = -100
    options = {"use_ref_model": True, "average_log_prob": True}
    ours = run(LigerFusedLinearKTOLoss(**options), arguments)
    right, gradients, _ = truth(arguments, **options)
    torch.testing.assert_close(ours[0].double(), right, rtol=1e-6, atol=0)
    for mine, exact in zip(ours[1], gradients, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-7)
    assert theirs(**options)(**arguments)[0].isnan()


def test_another_ignore_index():
    arguments = batch()
    arguments["target"] = torch.where(arguments["target"] == 42, 41, arguments["target"])
    loss = LigerFusedLinearKTOLoss()(**arguments)[0]
    arguments["target"] = arguments["target"].masked_fill(arguments["target"] == -100, 42)
    assert torch.equal(LigerFusedLinearKTOLoss(ignore_index=42)(**arguments)[0], loss)


def test_chunks_and_compilation_have_no_effect():
    arguments = batch()
    losses = {LigerFusedLinearKTOLoss(chunk_size=n, compiled=c)(**arguments)[0].item() for n in (1, 4) for c in (0, 1)}
    assert len(losses) == 1


def test_the_gradient_is_that_of_what_the_loss_goes_into():
    arguments = batch()
    function = LigerFusedLinearKTOLoss(use_ref_model=True)
    once, thrice = run(function, arguments)[1], torch.autograd.grad(3 * function(**arguments)[0], leaves(arguments))
    for a, b in zip(once, thrice, strict=True):
        # A sum of V terms of the size of the largest gradient, each rounded.
        torch.testing.assert_close(3 * a, b, rtol=0, atol=V * 6e-8 * b.abs().max().item())


@pytest.mark.parametrize("trained", ["_input", "lin_weight", "bias"])
def test_what_is_frozen_gets_no_gradient(trained):
    arguments = batch()
    every = dict(zip(("_input", "lin_weight", "bias"), run(LigerFusedLinearKTOLoss(), arguments)[1], strict=True))
    frozen = {k: x.detach() if k in every and k != trained else x for k, x in arguments.items()}
    (gradient,) = torch.autograd.grad(LigerFusedLinearKTOLoss()(**frozen)[0], frozen[trained])
    torch.testing.assert_close(gradient, every[trained], rtol=1e-6, atol=1e-8)


def test_the_reference_gets_no_gradient():
    arguments = batch()
    reference = [arguments[k].requires_grad_() for k in ("ref_input", "ref_weight", "ref_bias")]
    LigerFusedLinearKTOLoss(use_ref_model=True)(**arguments)[0].backward()
    assert all(x.grad is None for x in reference)


def test_under_autocast():
    arguments = batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = LigerFusedLinearKTOLoss(use_ref_model=True)(**arguments)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(x.grad.dtype == torch.float32 and x.grad.isfinite().all() for x in leaves(arguments))
    # Rounded inputs: relative errors of 2^-9 each in logits of size about 5.
    assert error(loss, truth(arguments)[0]) < 0.05


def test_has_the_interface_of_the_real_one(theirs):
    real = type(theirs())
    for method in ("__init__", "forward"):
        expected = list(inspect.signature(getattr(real, method)).parameters.values())
        found = list(inspect.signature(getattr(LigerFusedLinearKTOLoss, method)).parameters.values())
        assert [(p.name, p.default) for p in found[: len(expected)]] == [(p.name, p.default) for p in expected]
        assert all(p.kind is p.KEYWORD_ONLY for p in found[len(expected) :])
    assert set(vars(theirs())) <= set(vars(LigerFusedLinearKTOLoss()))


def test_does_not_need_liger_kernel():
    code = """
import sys
sys.modules["liger_kernel"] = None
from stepkto_fast.integrations.liger import LigerFusedLinearKTOLoss
LigerFusedLinearKTOLoss()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"preference_labels": None}, ValueError, "preference_labels is None"),
        ({"preference_labels": torch.ones(B, dtype=torch.int64)}, TypeError, "preference_labels has dtype torch.int64"),
        ({"preference_labels": torch.ones(B + 1, dtype=torch.bool)}, ValueError, "preference_labels has shape"),
        ({"ref_input": None}, ValueError, "ref_input is None"),
        ({"ref_weight": None}, ValueError, "ref_weight is None"),
        ({"ref_input": torch.zeros(B, T - 1, D)}, ValueError, "ref_input has shape"),
        ({"target": torch.zeros(B, T - 1, dtype=torch.int64)}, ValueError, "target has shape"),
        ({"_input": torch.zeros(B * T, D)}, ValueError, "_input has shape"),
        ({"kl": torch.zeros(2)}, ValueError, "kl has shape"),
        ({"lin_weight": torch.zeros(V, D + 1)}, ValueError, "weight has shape"),
    ],
)
def test_wrong_inputs_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        LigerFusedLinearKTOLoss(use_ref_model=True)(**batch() | change)


@pytest.mark.parametrize(
    "option", [{"beta": 0.0}, {"desirable_weight": -1.0}, {"undesirable_weight": float("inf")}, {"chunk_size": 0}]
)
def test_options_out_of_range_are_refused(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        LigerFusedLinearKTOLoss(**option)
