"""verl's linear_cross_entropy on our kernels: against fp64, on sharded vocabularies, and inside verl itself."""

import inspect
import sys
import types
from importlib import metadata

import pytest
import torch
import torch.distributed as dist
from test_linear_logp import assert_within_budget, inputs
from test_linear_logp_parallel import on_ranks, shard

from stepkto_fast.integrations.verl import SUPPORTED, linear_cross_entropy, patch

ROWS = (40, 27)  # of the two ranks' shards


@pytest.fixture
def verl():
    """The real package, or a skip that says why it cannot be used."""
    try:
        found = metadata.version("verl")
    except metadata.PackageNotFoundError:
        pytest.skip("verl is not installed: it wants another transformers than requirements.lock has")
    pytest.importorskip("verl", reason=f"verl {found} lacks a dependency", exc_type=ImportError)
    return pytest.importorskip("verl.utils.kernel.linear_cross_entropy")


def case(dtype=torch.float32, shape=(12, 16, 67), seed=0):
    hidden, weight, labels, _ = inputs(shape, dtype, seed=seed, bias=False)
    labels[labels == -100] = 0
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def plain(hidden, weight, labels, temperature):
    """(log-probs, entropies) as verl's own tests have them, in the dtype of the inputs."""
    logits = hidden @ weight.T / temperature
    logp = logits.log_softmax(-1)
    return logp.gather(-1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def coefficients(n):
    return torch.linspace(-1, 1, n), torch.linspace(0.5, -0.5, n)


def values_and_gradients(function, hidden, weight, labels, temperature=1.5):
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    logp, entropy = function(*leaves, labels, temperature)
    a, b = (x.to(logp.dtype) for x in coefficients(len(logp)))
    ((a * logp).sum() + (b * entropy).sum()).backward()
    return logp.detach(), entropy.detach(), *(x.grad for x in leaves)


def exact_and_plain(hidden, weight, labels, temperature=1.5):
    exact = values_and_gradients(plain, hidden.double(), weight.double(), labels, temperature)
    return exact, values_and_gradients(plain, hidden.float(), weight.float(), labels, temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_values_and_gradients_are_those_of_fp64(dtype, temperature):
    """16-bit gradients are rounded once, after up to filter_eps = 2^-9 of each token's mass was left out of them."""
    arguments = *case(dtype), temperature
    ours = values_and_gradients(linear_cross_entropy, *arguments)
    exact, theirs = exact_and_plain(*arguments)
    for n, triple in enumerate(zip(ours, exact, theirs, strict=True)):
        rounded = dtype if n > 1 and dtype != torch.float32 else None
        left_out = None if rounded is None else 2.0**-9 * 4 * triple[1].abs().max()
        assert triple[0].dtype == (dtype if n > 1 else torch.float32)
        assert_within_budget(*triple, largest_logit=8, rounded_to=rounded, summands=left_out)


@pytest.mark.parametrize("leading", [(1, 12), (3, 4), (12,)])
def test_the_batch_is_flattened_as_verl_does(leading):
    hidden, weight, labels = case()
    logp, entropy = linear_cross_entropy(hidden, weight, labels, 1.5)
    again, entropy_again = linear_cross_entropy(hidden.view(*leading, 16), weight, labels.view(leading), 1.5)
    assert again.shape == entropy_again.shape == (12,)
    assert torch.equal(again, logp)
    assert torch.equal(entropy_again, entropy)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "Mean"])
def test_reductions_are_of_the_log_probs_alone(reduction):
    hidden, weight, labels = case()
    exact, entropy = plain(hidden.double(), weight.double(), labels, 1.5)
    exact = {"none": exact, "sum": exact.sum(), "mean": exact.mean()}[reduction.lower()]
    ours, ours_entropy = linear_cross_entropy(hidden, weight, labels, 1.5, reduction)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours_entropy.double(), entropy, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(ours.sum(), (hidden, weight))
    for one, other in zip(found, torch.autograd.grad(exact.sum(), (hidden, weight)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_ignored_labels_give_zero_and_no_gradient():
    hidden, weight, labels = case()
    labels[::3] = -100
    logp, entropy = linear_cross_entropy(hidden, weight, labels)
    (logp + entropy).sum().backward()
    assert not logp[::3].any()
    assert not entropy[::3].any()
    assert not hidden.grad[::3].any()
    assert hidden.grad[1].any()
    assert logp[1] < 0


@pytest.mark.parametrize("vocabulary", [1, 127, 129, 1024, 1025, 1280])
def test_no_log_prob_is_above_zero_whatever_divides_the_vocabulary(vocabulary):
    """verl 2656 and 2899: vocabularies that do not fill the last tile had it counted as logits of 0. Peaked softmaxes
    with logits far below 0, where such entries would outweigh all others, show it."""
    hidden, weight, labels = case(shape=(9, 8, vocabulary))
    with torch.no_grad():
        hidden[:, 0], weight[:, 0] = 50, -2
    logp, entropy = linear_cross_entropy(hidden, weight, labels)
    exact_logp, exact_entropy = plain(hidden.double(), weight.double(), labels, 1.0)
    assert (logp <= 0).all()
    assert (entropy >= 0).all()
    # half an ulp of a logit of 100, in each of the two terms of a difference
    torch.testing.assert_close(logp.double(), exact_logp, rtol=0, atol=4e-5)
    torch.testing.assert_close(entropy.double(), exact_entropy, rtol=0, atol=4e-5)


def test_inputs_need_not_be_contiguous():
    hidden, weight, labels = case()
    logp, _ = linear_cross_entropy(hidden, weight, labels)
    strided = torch.stack([hidden, hidden], -1)[..., 0], torch.stack([weight, weight], -1)[..., 0]
    assert torch.equal(linear_cross_entropy(*strided, labels.int())[0], logp)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "max"}, "reduction is 'max'; expected one of 'none', 'sum', 'mean'"),
        ({"temperature": 0.0}, "temperature is 0.0; expected a finite number > 0"),
        (
            {"labels": torch.zeros(11, dtype=torch.int64)},
            r"labels has shape \(11,\); expected that of hidden \(12, 16\)",
        ),
        ({"weight": torch.zeros(67, 8)}, r"weight has shape \(67, 8\); expected \(V, D=16\).*dist_process_group"),
        ({"weight": torch.zeros(0)}, r"weight has shape \(0,\).*dist_process_group"),
        ({"labels": torch.full((12,), 67)}, r"holds 67 at position 0; expected values in \[0, V=67\)"),
    ],
)
def test_bad_input_is_a_value_error_that_names_it(change, message):
    arguments = dict(zip(("hidden", "weight", "labels"), case(), strict=True))
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments | change)


def sharded(rank):
    """What one of two ranks finds, with verl's conventions: it sums the gradients of hidden itself."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, labels = case(dtype)
        mine = shard(weight.detach(), rank, ROWS)

        def call(*arguments):
            return linear_cross_entropy(*arguments, "none", dist.group.WORLD)

        *values, dhidden, dweight = values_and_gradients(call, hidden, mine, labels)
        dist.all_reduce(dhidden)
        found[dtype] = *values, dhidden, dweight
    mesh = init_device_mesh("cpu", (2,))
    try:
        linear_cross_entropy(hidden.detach(), distribute_tensor(weight.detach(), mesh, [Shard(0)]), labels)
    except ValueError as error:
        found["dtensor"] = str(error)
    return found


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_a_sharded_vocabulary_gives_the_same_when_the_caller_sums_over_ranks():
    ranks = on_ranks(2, sharded)
    for dtype in (torch.float32, torch.bfloat16):
        arguments = case(dtype)
        exact, theirs = exact_and_plain(*arguments)
        ours = [list(ranks[0][dtype]), list(ranks[1][dtype])]
        for logp_or_other in range(3):
            assert torch.equal(ours[0][logp_or_other], ours[1][logp_or_other])
        whole = *ours[0][:3], torch.cat([ours[0][3], ours[1][3]])
        for n, triple in enumerate(zip(whole, exact, theirs, strict=True)):
            rounded = dtype if n > 1 and dtype != torch.float32 else None
            left_out = None if rounded is None else 2.0**-9 * 4 * triple[1].abs().max()
            assert_within_budget(*triple, largest_logit=8, rounded_to=rounded, summands=left_out)
    assert "weight is a DTensor" in ranks[0]["dtensor"]
    assert "dist_process_group" in ranks[0]["dtensor"]
    assert "full_tensor()" in ranks[0]["dtensor"]


def test_patch_refuses_other_versions(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "0.8.0")
    with pytest.raises(ImportError, match=f"verl{SUPPORTED}, found version 0.8.0"):
        patch()


def test_patch_reaches_modules_that_imported_the_name_before(monkeypatch):
    """On stand-ins of verl's modules with the names that its modules have."""

    def theirs():
        raise AssertionError("verl's own function was called")

    kernel = types.ModuleType("verl.utils.kernel.linear_cross_entropy")
    importer = types.ModuleType("verl.models.mcore.model_forward_fused")
    other = types.ModuleType("elsewhere")
    for module in (kernel, importer, other):
        module.linear_cross_entropy = theirs
        monkeypatch.setitem(sys.modules, module.__name__, module)
    package = types.ModuleType("verl.utils.kernel")
    package.linear_cross_entropy = kernel  # the submodule has the function's name
    for name, module in (("verl", types.ModuleType("verl")), ("verl.utils", types.ModuleType("verl.utils"))):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setattr(metadata, "version", lambda name: "0.9.1")
    for _ in range(2):
        patch()
        assert kernel.linear_cross_entropy is importer.linear_cross_entropy is linear_cross_entropy
        assert package.linear_cross_entropy is kernel
        assert other.linear_cross_entropy is theirs


def test_the_signature_is_verls(verl):
    theirs = list(inspect.signature(verl.LinearCrossEntropy.forward).parameters.values())[1:]
    ours = list(inspect.signature(linear_cross_entropy).parameters.values())
    assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]


def test_verls_fused_forward_runs_on_ours(verl, monkeypatch):
    """The forward that verl gives models for use_fused_kernels with impl_backend "triton", on a tiny Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from verl.models.transformers.monkey_patch import patch_forward_with_backends

    monkeypatch.setattr(verl, "linear_cross_entropy", verl.linear_cross_entropy)  # undone after the test
    monkeypatch.setattr(LlamaForCausalLM, "forward", LlamaForCausalLM.forward)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=67, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, return_dict=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    input_ids = torch.randint(0, 67, (1, 12))
    logits = model(input_ids).logits
    patch()
    patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="triton")
    output = model(input_ids=input_ids, temperature=1.5, return_dict=True)
    logp = (logits / 1.5).log_softmax(-1)
    expected = logp.gather(-1, input_ids.roll(-1, -1)[..., None])[0, :, 0]
    torch.testing.assert_close(output.log_probs, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.entropy, -(logp.exp() * logp).sum(-1)[0], rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(output.log_probs.sum(), model.lm_head.weight)
    torch.testing.assert_close(ours, torch.autograd.grad(expected.sum(), model.lm_head.weight), rtol=1e-4, atol=1e-5)
