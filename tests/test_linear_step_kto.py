"""linear_step_kto and linear_step_kto_exact against the truth and against the ops they are made of."""

import pytest
import stepkto_kernels
import torch
from on_backends import fixture_over, moved
from stepkto_kernels import StepKTOOutput, backend, triton_backend
from stepkto_kernels.linear_logp import eager as head_eager
from stepkto_kernels.linear_step_kto import reference as truth
from stepkto_kernels.linear_step_kto.op import linear_step_kto_exact_forward, linear_step_kto_forward
from stepkto_kernels.step_kto import reference as step_kto_truth
from test_linear_logp import EVERYTHING, assert_within_budget, one_thread, rounding_of_summands  # noqa: F401
from test_step_kto import random_batch, select

linear_logp, linear_logp_kl, linear_step_kto, linear_step_kto_exact, step_kto = (
    moved(getattr(stepkto_kernels, name))
    for name in ("linear_logp", "linear_logp_kl", "linear_step_kto", "linear_step_kto_exact", "step_kto")
)
reference_points = stepkto_kernels.reference_points
on_backend = fixture_over("linear_step_kto_exact", "reference", "native", "triton")

D, V = 16, 50
OBJECTIVE = {
    "beta": 0.5,
    "step_beta": 0.8,
    "step_weight": 1.6,
    "after_first_error": "mask",
    "undesirable_weight": 0.7,
}


def inputs(seed=0, completions=5, dtype=torch.float32, d=D):
    """(head inputs, packed batch); some rows are ignored, and the policy has drifted a little from its
    reference."""
    batch = random_batch(seed, completions, steps=4, tokens=5)
    del batch["logp"], batch["ref_logp"]
    n = int(batch["cu_steps"][-1])
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    hidden, weight, bias = normal(n, d), normal(V, d) * 2 / d**0.5, normal(V)
    target = torch.randint(0, V, (n,), generator=generator)
    target[torch.rand(n, generator=generator) < 0.15] = -100
    head = {"hidden": hidden, "weight": weight, "bias": bias}
    reference = {
        "ref_hidden": hidden + 0.2 * normal(n, d),
        "ref_weight": weight + 0.1 * normal(V, d),
        "ref_bias": bias,
    }
    head, reference = ({k: v.to(dtype) for k, v in group.items()} for group in (head, reference))
    return head, reference, batch | {"target": target}


def leaves_of(head, dtype=None):
    return {k: v.detach().to(dtype or v.dtype).requires_grad_() for k, v in head.items()}


def fp64(tensors):
    return {k: v.double() for k, v in tensors.items()}


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain head", "every head option"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("exact_points", [False, True], ids=["given points", "exact points"])
def test_matches_the_truth(exact_points, dtype, options, on_backend):
    if on_backend != "reference" and dtype == torch.float64:
        pytest.skip("only the reference backend computes in float64")
    head, reference, batch = inputs(dtype=dtype)
    ref_logp = linear_logp(
        reference["ref_hidden"],
        reference["ref_weight"],
        batch["target"],
        bias=reference["ref_bias"],
        **options,
    )

    def run(kind, as_dtype):
        leaves = leaves_of(head, as_dtype)
        ref = {k: v.to(as_dtype) for k, v in reference.items()}
        if kind == "ours" and exact_points:
            result = linear_step_kto_exact(**leaves, **ref, **batch, **options, **OBJECTIVE)._asdict()
        elif kind == "ours":
            points = {"kl": 0.3, "step_kl": 0.1}
            result = linear_step_kto(**leaves, **batch, ref_logp=ref_logp, **options, **OBJECTIVE, **points)
            result = result._asdict()
        elif exact_points:
            keywords = options | {"bias": leaves.pop("bias"), "ref_bias": ref.pop("ref_bias")}
            result = truth.linear_step_kto_exact(**leaves, **ref, **batch, head=keywords, objective=OBJECTIVE)
            leaves["bias"] = keywords["bias"]
        else:
            keywords = options | {"bias": leaves.pop("bias")}
            objective = OBJECTIVE | {"kl": 0.3, "step_kl": 0.1}
            result = truth.linear_step_kto(
                **leaves, **batch, ref_logp=ref_logp.to(as_dtype), head=keywords, objective=objective
            )
            leaves["bias"] = keywords["bias"]
        gradients = torch.autograd.grad(result["loss"], [leaves[k] for k in ("hidden", "weight", "bias")])
        return {k: v.detach() for k, v in result.items()}, gradients

    plain_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    (ours, gradients), (exact, exact_gradients), (plain, plain_gradients) = (
        run("ours", dtype),
        run("truth", torch.float64),
        run("truth", plain_dtype),
    )
    for name, value in exact.items():
        assert ours[name].dtype == plain_dtype
        # sums over a completion carry the errors of up to 20 tokens with logits up to about 20
        assert_within_budget(ours[name], value, plain[name], largest_logit=20.0)
    rounded = dtype if dtype in (torch.bfloat16, torch.float16) else None
    summands = [None] * 3
    if on_backend != "reference":
        logp = exact["logp"].requires_grad_()
        points = {"kl": exact["kl"], "step_kl": exact["step_kl"]} if exact_points else {"kl": 0.3, "step_kl": 0.1}
        ratio = {name: x for name, x in batch.items() if name != "target"} | {"ref_logp": ref_logp.double()}
        loss = step_kto_truth.step_kto(logp, **ratio, **OBJECTIVE, **points)["loss"]
        (coefficient,) = torch.autograd.grad(loss, logp)
        cotangents = torch.stack([coefficient, torch.zeros_like(coefficient)])
        summands = rounding_of_summands([*head.values()], batch["target"], cotangents, options, dtype)
    for *values, rounding in zip(gradients, exact_gradients, plain_gradients, summands, strict=True):
        assert values[0].dtype == dtype
        assert_within_budget(*values, largest_logit=20.0, rounded_to=rounded, summands=rounding)


def test_is_step_kto_of_linear_logp(on_backend):
    head, _reference, batch = inputs()
    target = batch.pop("target")
    ref_logp = torch.randn(len(target))
    one, two = leaves_of(head), leaves_of(head)
    found = linear_step_kto(**one, target=target, ref_logp=ref_logp, **batch, kl=0.2, **EVERYTHING)
    logp = linear_logp(**two, target=target, **EVERYTHING)
    expected = step_kto(logp, ref_logp.masked_fill(target == -100, 0), **batch, kl=0.2)
    assert isinstance(found, StepKTOOutput)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    found.loss.backward()
    expected.loss.backward()
    assert all(torch.equal(one[k].grad, two[k].grad) for k in head)


def test_exact_is_its_three_parts(on_backend):
    head, reference, batch = inputs()
    target = batch.pop("target")
    one, two = leaves_of(head), leaves_of(head)
    found = linear_step_kto_exact(**one, **reference, target=target, **batch, **OBJECTIVE)
    pair = linear_logp_kl(**two, **reference, target=target)
    z, z_s = reference_points(pair.kl, batch["cu_seqlens"], batch["cu_steps"]).points()
    expected = step_kto(pair.logp, pair.ref_logp, **batch, kl=z, step_kl=z_s, **OBJECTIVE)
    assert z > 0
    assert z_s > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    found.loss.backward()
    expected.loss.backward()
    assert all(torch.equal(one[k].grad, two[k].grad) for k in head)


def test_only_the_loss_has_a_gradient_and_none_reaches_the_reference(on_backend):
    head, reference, batch = inputs()
    head, reference = leaves_of(head), leaves_of(reference)
    result = linear_step_kto_exact(**head, **reference, **batch)
    assert result.loss.requires_grad
    assert not any(x.requires_grad for x in result[1:])
    result.loss.backward()
    assert all(x.grad is None for x in reference.values())


@pytest.mark.parametrize("frozen", [["weight", "bias"], ["hidden"], ["hidden", "weight", "bias"]], ids=str)
def test_frozen_parts(frozen, on_backend):
    head, _, batch = inputs()
    ref_logp = torch.zeros(len(batch["target"]))
    trained, partly = leaves_of(head), leaves_of(head)
    for name in frozen:
        partly[name].requires_grad_(False)
    linear_step_kto(**trained, **batch, ref_logp=ref_logp).loss.backward()
    loss = linear_step_kto(**partly, **batch, ref_logp=ref_logp).loss
    assert loss.requires_grad == (len(frozen) < 3)
    if loss.requires_grad:
        loss.backward()
    for name, leaf in partly.items():
        assert (leaf.grad is None) if name in frozen else torch.equal(leaf.grad, trained[name].grad)


def test_gradcheck():
    head, _reference, batch = inputs(completions=2, dtype=torch.float64, d=3)
    leaves = {k: v[:, :3] if v.dim() == 2 else v for k, v in leaves_of(head).items()}
    leaves = [x.detach().requires_grad_() for x in leaves.values()]
    ref_logp = -torch.rand(len(batch["target"]), dtype=torch.float64)

    def given(hidden, weight, bias):
        return linear_step_kto(hidden, weight, bias=bias, **batch, ref_logp=ref_logp, kl=0.2, **EVERYTHING).loss

    assert torch.autograd.gradcheck(given, leaves)


def test_ignored_rows_leak_nothing(on_backend):
    head, reference, batch = inputs()
    ignored = batch["target"] == -100
    assert ignored.any()
    ref_logp = -torch.rand(len(ignored))
    results = []
    for poison in (False, True):
        head_, reference_ = leaves_of(head), {k: v.clone() for k, v in reference.items()}
        if poison:
            with torch.no_grad():
                head_["hidden"][ignored] = float("nan")
            reference_["ref_hidden"][ignored] = float("inf")
            ref_logp = ref_logp.masked_fill(ignored, float("nan"))
        one = linear_step_kto(**head_, **batch, ref_logp=ref_logp)
        two = linear_step_kto_exact(**head_, **reference_, **batch)
        (one.loss + two.loss).backward()
        results.append((*one, *two, *(x.grad for x in head_.values())))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[1][-3][ignored].eq(0).all()


def test_empty_batch_is_zero_with_a_graph(on_backend):
    zero, none = torch.zeros(1, dtype=torch.int32), torch.zeros(0)
    hidden, weight = torch.zeros(0, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    batch = {"cu_seqlens": zero, "cu_steps": zero, "labels": none.bool(), "step_labels": none.to(torch.int8)}
    given = linear_step_kto(hidden, weight, none.long(), none, **batch, num_completions=3)
    exact = linear_step_kto_exact(hidden, weight, hidden, weight, none.long(), **batch)
    assert given.loss.item() == exact.loss.item() == 0
    (given.loss + exact.loss).backward()
    assert hidden.grad.shape == (0, D)
    assert weight.grad.eq(0).all()


def test_everything_ignored_is_a_policy_equal_to_its_reference(on_backend):
    head, _, batch = inputs()
    batch["target"] = torch.full_like(batch["target"], -100)
    leaves = leaves_of(head)
    result = linear_step_kto(**leaves, **batch, ref_logp=torch.randn(len(batch["target"])))
    assert result.outcome_loss.item() == 0.5
    result.loss.backward()
    assert leaves["weight"].grad.eq(0).all()


def test_micro_batches_with_global_counts_add_up_to_one_gradient():
    head, _, batch = inputs(completions=6, dtype=torch.float64)
    n = len(batch["target"])
    packed = batch | {"logp": torch.arange(n), "ref_logp": -torch.rand(n, dtype=torch.float64)}
    whole = leaves_of(head)
    keywords = {"after_first_error": "mask", "kl": 0.1}
    total = linear_step_kto(**whole, **batch, ref_logp=packed["ref_logp"], **keywords).loss
    total.backward()
    supervised = sum((select(packed, [i])[0]["step_labels"] != -1).any().item() for i in range(6))
    parts, losses = leaves_of(head), []
    for chosen in ([5, 0], [3], [1, 2, 4]):
        part, tokens = select(packed, chosen)
        del part["logp"]
        rows = parts | {"hidden": parts["hidden"][tokens]}
        counts = {"num_completions": 6, "num_supervised": supervised}
        loss = linear_step_kto(**rows, **part, target=batch["target"][tokens], **counts, **keywords).loss
        loss.backward()
        losses.append(loss.item())
    assert sum(losses) == pytest.approx(total.item(), rel=1e-13)
    for name in head:
        torch.testing.assert_close(parts[name].grad, whole[name].grad, rtol=1e-11, atol=1e-14)


def test_bitwise_reproducible():
    head, reference, batch = inputs(completions=40, dtype=torch.bfloat16)
    results = []
    for _ in range(2):
        leaves = leaves_of(head)
        result = linear_step_kto_exact(**leaves, **reference, **batch)
        results.append((*result, *torch.autograd.grad(result.loss, list(leaves.values()))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast():
    head, reference, batch = inputs()
    leaves, cast = leaves_of(head), leaves_of(head, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_step_kto_exact(**leaves, **reference, **batch)
        found.loss.backward()
    expected = linear_step_kto_exact(**cast, **{k: v.bfloat16() for k, v in reference.items()}, **batch)
    expected.loss.backward()
    assert torch.equal(found.loss, expected.loss)
    assert all(torch.equal(leaves[k].grad, cast[k].grad.float()) for k in head)


def test_opcheck():
    head, reference, batch = inputs(completions=2)
    hidden, weight, bias = leaves_of(head).values()
    ref_hidden, ref_weight, ref_bias = reference.values()
    packed = batch["cu_seqlens"], batch["cu_steps"], batch["labels"], batch["step_labels"]
    options = (0.7, 5.0, 1.3, -100, 0.0)
    objective = (0.1, 0.1, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, "mean", "keep")
    counts = torch.tensor(5.0, dtype=torch.float64), None
    points = torch.tensor(0.1), torch.tensor(0.2)
    ref_logp = -torch.rand(len(hidden))
    torch.library.opcheck(
        linear_step_kto_forward,
        (
            hidden,
            weight,
            batch["target"],
            bias,
            ref_logp,
            *packed,
            *points,
            *counts,
            *options,
            *objective,
            "kto",
            True,
        ),
    )
    torch.library.opcheck(
        linear_step_kto_exact_forward,
        (
            hidden,
            weight,
            batch["target"],
            bias,
            ref_hidden,
            ref_weight,
            ref_bias,
            *packed,
            *counts,
            *options,
            *objective,
            True,
        ),
    )


@pytest.mark.usefixtures("compiler")
def test_compiles_with_inductor_without_graph_breaks_and_checks_values_when_it_runs():
    head, reference, batch = inputs()
    ref_logp = -torch.rand(len(batch["target"]))

    def function(head, batch, kl):
        given = linear_step_kto(**head, **batch, ref_logp=ref_logp, kl=kl, validate=True)
        exact = linear_step_kto_exact(**head, **reference, **batch, validate=True)
        return given.loss * 2 + exact.loss, exact.kl

    compiled = torch.compile(function, fullgraph=True)
    leaves = leaves_of(head)
    expected, found = (f(leaves, batch, torch.tensor(0.4)) for f in (function, compiled))
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(x[0], list(leaves.values())) for x in (expected, found)]
    torch.testing.assert_close(gradients[1], gradients[0])
    with pytest.raises(ValueError, match=r"target of shape .* holds 50"):
        compiled(leaves, batch | {"target": torch.full_like(batch["target"], V)}, torch.tensor(0.4))


@pytest.mark.parametrize("function", [linear_step_kto, linear_step_kto_exact])
@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "hidden has dtype torch.int64", {"hidden": torch.zeros(5, D).long()}),
        (ValueError, "target .* holds 50", {"target": V}),
        (ValueError, "cu_steps .* ends at", {"cu_steps": slice(0, -1), "step_labels": slice(0, -1)}),
        (ValueError, "step_labels .* holds 2 at position 0", {"step_labels": 2}),
        (TypeError, "labels has dtype torch.int8", {"labels": torch.zeros(5, dtype=torch.int8)}),
        (ValueError, "temperature is 0", {"temperature": 0}),
        (ValueError, "beta is -1", {"beta": -1.0}),
        (ValueError, "step_reduction is 'max'", {"step_reduction": "max"}),
        (ValueError, "num_completions is 0", {"num_completions": 0}),
    ],
)
def test_bad_input_is_refused_before_any_compute(function, error, message, change, monkeypatch):
    def fail(*_):
        raise AssertionError("computed")

    monkeypatch.setattr(head_eager.Head, "logits", fail)
    head, reference, batch = inputs()
    arguments = head | batch
    if function is linear_step_kto:
        arguments["ref_logp"] = torch.zeros(len(batch["target"]))
    else:
        arguments |= reference
    for name, value in change.items():
        if isinstance(value, slice):
            value = arguments[name][value]
        elif isinstance(value, int) and name in batch:
            value = torch.full_like(arguments[name], value)
        arguments[name] = value
    with pytest.raises(error, match=message):
        function(**arguments)


def test_bad_input_of_the_one_or_the_other_only():
    head, reference, batch = inputs()
    n = len(batch["target"])
    with pytest.raises(ValueError, match=r"ref_logp has shape \(3,\)"):
        linear_step_kto(**head, **batch, ref_logp=torch.zeros(3))
    with pytest.raises(ValueError, match=r"kl is 0.1.*apo_zero_unpaired"):
        linear_step_kto(**head, **batch, ref_logp=torch.zeros(n), kl=torch.tensor(0.1), loss_type="apo_zero_unpaired")
    with pytest.raises(ValueError, match="loss_type is 'apo_zero_unpaired'; expected one of 'kto'"):
        linear_step_kto_exact(**head, **reference, **batch, loss_type="apo_zero_unpaired")
    with pytest.raises(ValueError, match="ref_weight has shape"):
        linear_step_kto_exact(**head, **batch, ref_hidden=head["hidden"], ref_weight=torch.zeros(3, D))


def test_a_backend_that_lacks_a_part_is_refused_before_any_compute(monkeypatch):
    monkeypatch.setattr(triton_backend, "missing", lambda: "no such chip")
    head, reference, batch = inputs()
    with backend("triton"), pytest.raises(RuntimeError, match="backend 'triton' lacks linear_logp"):
        stepkto_kernels.linear_step_kto(**head, **batch, ref_logp=torch.zeros(len(batch["target"])))
    with backend("triton"), pytest.raises(RuntimeError, match="backend 'triton' lacks linear_logp_kl"):
        stepkto_kernels.linear_step_kto_exact(**head, **reference, **batch)
