"""linear_logp_stats against the fp64 truth."""

import pytest
import stepkto_kernels
import torch
from on_backends import NaNMemory, fixture_over, moved, where_it_runs
from stepkto_kernels import backend
from stepkto_kernels.linear_logp_stats import reference as truth
from stepkto_kernels.linear_logp_stats.op import linear_logp_stats_forward
from test_linear_logp import DTYPES, EVERYTHING, HEADS, NATIVE_SHAPES, SHAPES, TRITON_SHAPES, inputs

linear_logp_stats = moved(stepkto_kernels.linear_logp_stats)
linear_logp_entropy, linear_logp = moved(stepkto_kernels.linear_logp_entropy), moved(stepkto_kernels.linear_logp)
on_backend = fixture_over("linear_logp_stats", "reference", "native", "triton")
EPS = torch.finfo(torch.float32).eps


def cases():
    for name, shapes in (("reference", SHAPES), ("native", NATIVE_SHAPES), ("triton", TRITON_SHAPES)):
        for shape in shapes:
            for head in HEADS if name == "reference" else ("plain", "everything"):
                yield pytest.param(name, shape, head, marks=where_it_runs("linear_logp_stats", name).marks)


@pytest.mark.parametrize(("name", "shape", "head_name"), cases())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_match_the_truth(dtype, name, shape, head_name):
    """The mean of V logits and log sum p^2 = log sum e^(2z) - 2 lse: each logit is off by what a sum of D fp32
    products is, log-sum-exps by that and by half an ulp of the largest logit; a mean sums tiles in fp32."""
    head = HEADS[head_name]
    hidden, weight, target, bias = inputs(shape, dtype, bias=head_name != "plain")
    with backend(name), NaNMemory():
        logp, entropy, log_sum_sq, mean, top1 = linear_logp_stats(hidden, weight, target, bias=bias, **head)
    wide = [x if x is None else x.double() for x in (hidden, weight, bias)]
    exact = truth.linear_logp_stats(wide[0], wide[1], target, bias=wide[2], **head)
    size = (wide[0].abs() @ wide[1].abs().T).max() + (0 if bias is None else wide[2].abs().max())
    slope = abs(head.get("logit_scale", 1)) / head.get("temperature", 1)
    budget = 8 * EPS * (1 + slope * size * max(1, shape[1] ** 0.5 / 4))
    for found, wanted in zip((logp, entropy, log_sum_sq, mean), exact, strict=False):
        assert found.dtype == torch.float32
        assert ((found.double() - wanted).abs() <= budget * (1 + wanted.abs())).all()
    assert (log_sum_sq <= 4 * EPS).all()
    assert top1.dtype == torch.bool
    assert torch.equal(top1, exact[4])  # random logits: the two largest are never within rounding of each other


def test_values_are_those_of_linear_logp_entropy(on_backend):
    hidden, weight, target, bias = inputs((64, 33, 1000), torch.bfloat16)
    found = linear_logp_stats(hidden, weight, target, bias=bias, **EVERYTHING)
    logp, entropy = linear_logp_entropy(hidden, weight, target, bias=bias, **EVERYTHING)
    assert torch.equal(found.logp, logp)
    assert torch.equal(found.entropy, entropy)


def test_the_first_of_equal_logits_is_the_top(on_backend):
    """As argmax: of ties within a tile, across tiles, before and behind the target."""
    v = 300
    rows = []
    for highest in ([3, 7], [7, 3], [5, 200], [200, 5], [120, 131], [131, 120], [299, 298], [0], [299]):
        logits = torch.zeros(v)
        logits[highest] = 2.0
        rows.append((logits, highest[0]))
    rows.append((torch.zeros(v), 0))
    rows.append((torch.zeros(v), 1))
    weight = torch.stack([logits for logits, _ in rows], 1)  # (V, rows): row n of the identity picks its logits
    target = torch.tensor([highest for _, highest in rows])
    top1 = linear_logp_stats(torch.eye(len(rows)), weight, target).is_top1
    assert top1.tolist() == (weight.argmax(0) == target).tolist()
    assert top1.tolist() == [True, False, True, False, True, False, False, True, True, True, False]


def test_ignored_rows_are_zero_and_false(on_backend):
    hidden, weight, target, _ = inputs((9, 6, 21), torch.float32, bias=False)
    hidden[target == -100] = float("nan")
    for values in linear_logp_stats(hidden, weight, target):
        assert (values[target == -100] == 0).all()
        assert torch.isfinite(values.float()).all()


@pytest.mark.parametrize("rows", [0, 4], ids=["no rows", "all ignored"])
def test_nothing_to_score(rows, on_backend):
    found = linear_logp_stats(torch.randn(rows, 5), torch.randn(7, 5), torch.full((rows,), -100))
    assert [x.tolist() for x in found[:4]] == [[0.0] * rows] * 4
    assert found.is_top1.tolist() == [False] * rows


def test_a_confident_token(on_backend):
    """log sum p^2 of a p of 1 - 4e-9 is 0 and not above; the target is the top."""
    found = linear_logp_stats(torch.ones(1, 1), torch.tensor([[0.5], [20.0], [-0.25]]), torch.tensor([1]))
    assert -1e-5 < float(found.log_sum_sq_probs) <= 4 * EPS
    assert found.is_top1.item()


def test_gradients_are_those_of_linear_logp_entropy(on_backend):
    operands = inputs((64, 33, 1000), torch.float32)
    target = operands[2]

    def gradients(function):
        leaves = [operands[i].clone().requires_grad_() for i in (0, 1, 3)]
        logp, entropy = function(leaves[0], leaves[1], target, bias=leaves[2])[:2]
        return torch.autograd.grad(logp.sum() + 0.3 * entropy.square().sum(), leaves)

    for ours, theirs in zip(gradients(linear_logp_stats), gradients(linear_logp_entropy), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("function", [linear_logp_stats, linear_logp_entropy], ids=["stats", "entropy"])
def test_an_entropy_that_is_only_looked_at_costs_the_backward_nothing(function, on_backend):
    """Its gradient would weigh tiles more, and more of them be visited: gradients are bitwise those without it."""
    operands = inputs((64, 33, 1000), torch.bfloat16)
    target = operands[2]

    def gradients(select):
        leaves = [operands[i].clone().requires_grad_() for i in (0, 1, 3)]
        logp = select(leaves[0], leaves[1], target, bias=leaves[2])
        return torch.autograd.grad(logp.sum(), leaves)

    for ours, alone in zip(gradients(lambda *a, **k: function(*a, **k)[0]), gradients(linear_logp), strict=True):
        assert torch.equal(ours, alone)


def test_an_entropy_alone_is_differentiated(on_backend):
    hidden, weight, target, _ = inputs((9, 6, 21), torch.float32, bias=False)
    leaf, wide = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    linear_logp_stats(leaf, weight, target).entropy.sum().backward()
    truth.linear_logp_stats(wide, weight.double(), target)[1].sum().backward()
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=1e-5, atol=1e-6)


def test_only_logp_and_entropy_have_a_gradient():
    hidden, weight, target, _ = inputs((9, 6, 21), torch.float32, bias=False)
    found = linear_logp_stats(hidden.requires_grad_(), weight, target)
    assert [x.requires_grad for x in found] == [True, True, False, False, False]


def test_opcheck_and_compile():
    hidden, weight, target, bias = inputs((9, 6, 21), torch.float32)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    options = 1.0, 5.0, 0.7, -100, 0.0, True
    torch.library.opcheck(linear_logp_stats_forward, (leaves[0], leaves[1], target, leaves[2], *options))

    def loss(h):
        found = stepkto_kernels.linear_logp_stats(h, weight, target, bias=bias)
        return found.logp.sum() + found.mean_logits.sum(), found.is_top1

    eager, compiled = loss(hidden), torch.compile(loss, fullgraph=True)(hidden)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled[0], hidden), torch.autograd.grad(eager[0], hidden))


def test_bad_input_names_the_argument():
    hidden, weight, target, _ = inputs((9, 6, 21), torch.float32, bias=False)
    with pytest.raises(ValueError, match=r"target of shape .* holds 21"):
        linear_logp_stats(hidden, weight, target.clamp(min=21))
    with pytest.raises(ValueError, match="temperature is 0"):
        linear_logp_stats(hidden, weight, target, temperature=0)
