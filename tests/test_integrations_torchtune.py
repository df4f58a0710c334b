"""Cross-entropy for torchtune's recipes: against fp64, and with torchtune's own model and loss where it is here."""

from importlib import metadata

import pytest
import torch
from test_linear_logp import assert_within_budget
from torch import nn
from torch.nn.functional import cross_entropy, linear

from stepkto_fast.integrations.torchtune import SUPPORTED, LinearCrossEntropyLoss, linear_cross_entropy_loss

B, L, D, V = 3, 7, 16, 67


class Model(nn.Module):
    """What a recipe's model has that matters here."""

    def __init__(self, dtype=torch.float32, bias=False):
        super().__init__()
        self.skip_output_layer = False
        self.output = nn.Linear(D, V, bias=bias, dtype=dtype)
        nn.init.normal_(self.output.weight, std=0.5)


class Tied:
    """torchtune's TiedLinear: no module, but it has one, which it calls with the embedding's weight."""

    class Linear(nn.Module):
        def forward(self, x, weight):
            return linear(x, weight)

    def __init__(self, embedding):
        self.tied_module, self.linear = embedding, self.Linear()

    def __call__(self, x):
        return self.linear(x, self.tied_module.weight)


@pytest.fixture
def torchtune():
    """The real package, or a skip that says why it cannot be used."""
    try:
        found = metadata.version("torchtune")
    except metadata.PackageNotFoundError:
        pytest.skip("torchtune is not installed: linear losses are in its main branch, 0.7, which PyPI does not have")
    return pytest.importorskip("torchtune", reason=f"torchtune {found} lacks a dependency", exc_type=ImportError)


def batch(dtype=torch.float32, ignore_index=-100):
    generator = torch.Generator().manual_seed(3)
    outputs = torch.randn(B, L, D, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (B, L), generator=generator)
    targets[0, :4] = targets[2, 5:] = ignore_index
    return outputs, targets


def loss_and_gradients(outputs, weight, bias, targets, dtype, ignore_index=-100):
    leaves = [None if x is None else x.detach().to(dtype).requires_grad_() for x in (outputs, weight, bias)]
    logits = linear(*leaves)
    loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=ignore_index)
    loss.backward()
    return [loss.detach(), *(x.grad for x in leaves if x is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, 5])
def test_loss_and_gradients_are_those_of_fp64(dtype, bias, ignore_index):
    torch.manual_seed(0)
    model, (outputs, targets) = Model(dtype, bias), batch(dtype, ignore_index)
    loss_fn = LinearCrossEntropyLoss(ignore_index, filter_eps=0.0)
    loss_fn.set_model_output(model)
    loss = loss_fn(outputs, targets)
    loss.backward()
    ours = [loss.detach(), outputs.grad, model.output.weight.grad] + ([model.output.bias.grad] if bias else [])
    arguments = outputs, model.output.weight, model.output.bias, targets
    exact = loss_and_gradients(*arguments, torch.float64, ignore_index)
    plain = loss_and_gradients(*arguments, torch.float32, ignore_index)
    for n, triple in enumerate(zip(ours, exact, plain, strict=True)):
        # the reference and native backends round a gradient's factors to the inputs' 16 bits, and its sum once more
        sixteen = n > 0 and dtype != torch.float32
        summands = torch.finfo(dtype).eps * triple[1].abs().max() if sixteen else None
        assert_within_budget(*triple, largest_logit=8, rounded_to=dtype if sixteen else None, summands=summands)


def test_the_model_returns_hidden_states_and_keeps_its_head():
    model, loss_fn = Model(), LinearCrossEntropyLoss()
    loss_fn.set_model_output(model)
    assert model.skip_output_layer
    assert not list(loss_fn.parameters())
    outputs, targets = batch()
    loss_fn(outputs, targets)
    assert model.output(outputs).shape == (B, L, V)


def test_hooks_around_the_head_run():
    """FSDP gathers the weight in such hooks, and ties its gathering for the backward to what they return."""
    model, loss_fn, seen = Model(), LinearCrossEntropyLoss(), []
    loss_fn.set_model_output(model)
    model.output.register_forward_pre_hook(lambda module, args: seen.append("before"))
    model.output.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    loss_fn(*batch())
    assert seen == ["before", True]


def test_a_tied_head_is_found():
    torch.manual_seed(0)
    model, loss_fn = Model(), LinearCrossEntropyLoss()
    embedding = nn.Embedding(V, D)
    model.__dict__["output"] = Tied(embedding)
    loss_fn.set_model_output(model)
    outputs, targets = batch()
    loss_fn(outputs, targets).backward()
    exact = loss_and_gradients(outputs, embedding.weight, None, targets, torch.float64)
    torch.testing.assert_close(embedding.weight.grad.double(), exact[2], rtol=1e-4, atol=1e-6)


def test_without_a_counted_target_the_loss_is_zero_and_so_is_the_gradient():
    model, loss_fn = Model(), LinearCrossEntropyLoss()
    loss_fn.set_model_output(model)
    outputs, targets = batch()
    loss = loss_fn(outputs, torch.full_like(targets, -100))
    loss.backward()
    assert loss == 0
    assert not outputs.grad.any()
    assert not model.output.weight.grad.any()


def test_wrong_calls_name_what_is_wrong():
    loss_fn, model, (outputs, targets) = LinearCrossEntropyLoss(), Model(), batch()
    with pytest.raises(RuntimeError, match="set_model_output"):
        loss_fn(outputs, targets)
    loss_fn.set_model_output(model)
    with pytest.raises(ValueError, match=r"targets has shape \(3, 6\); expected \(3, 7\)"):
        loss_fn(outputs, targets[:, 1:])
    with pytest.raises(ValueError, match=r"weight has shape \(67, 16\); expected \(V, D=8\).*full_tensor\(\)"):
        loss_fn(outputs[..., :8], targets)
    with pytest.raises(ValueError, match=r"the tensor-parallel plan \['output'\].*tensor_parallel_dim=1"):
        loss_fn.patch_tp_plan({"output": None})
    model.output = nn.Sequential(nn.Linear(D, V))
    loss_fn.set_model_output(model)
    with pytest.raises(ValueError, match=r"model.output is a Sequential; expected a torch.nn.Linear"):
        loss_fn(outputs, targets)


def test_a_sharded_head_is_a_value_error(one_rank):
    from torch.distributed.tensor import Shard, distribute_tensor

    model, loss_fn = Model(), LinearCrossEntropyLoss()
    loss_fn.set_model_output(model)
    model.output.weight = nn.Parameter(distribute_tensor(model.output.weight.detach(), one_rank, [Shard(0)]))
    with pytest.raises(ValueError, match=r"weight is a DTensor.*tensor_parallel_dim=1.*full_tensor\(\)"):
        loss_fn(*batch())


def test_fsdp_gathers_the_head_for_the_loss(one_rank):
    from torch.distributed.fsdp import fully_shard

    model, loss_fn = Model(), LinearCrossEntropyLoss()
    exact = loss_and_gradients(batch()[0], model.output.weight, None, batch()[1], torch.float64)
    fully_shard(model.output, mesh=one_rank)
    loss_fn.set_model_output(model)
    outputs, targets = batch()
    loss_fn(outputs, targets).backward()
    torch.testing.assert_close(outputs.grad.double(), exact[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.output.weight.grad.full_tensor().double(), exact[2], rtol=1e-4, atol=1e-6)


def test_other_versions_are_refused(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "0.6.1")
    with pytest.raises(ImportError, match=f"torchtune{SUPPORTED}, found version 0.6.1"):
        linear_cross_entropy_loss()


def test_torchtunes_recipes_know_it(torchtune):
    from torchtune import config
    from torchtune.modules.loss import SFTLoss
    from torchtune.training import compile_loss

    name = "stepkto_fast.integrations.torchtune.linear_cross_entropy_loss"
    loss_fn = config.instantiate({"_component_": name, "ignore_index": 7})
    assert isinstance(loss_fn, SFTLoss)
    assert loss_fn.options["ignore_index"] == 7
    assert compile_loss(loss_fn) is loss_fn


@pytest.mark.parametrize("tied", [False, True])
def test_torchtunes_model_trains_on_it_as_on_its_own_loss(torchtune, tied):
    from torchtune.models.llama3_2 import llama3_2
    from torchtune.models.qwen2 import qwen2
    from torchtune.modules.loss import LinearCrossEntropyLoss as Theirs

    sizes = dict(vocab_size=V, num_layers=1, num_heads=2, num_kv_heads=2, embed_dim=D, max_seq_len=L)
    tokens, targets = torch.randint(0, V, (B, L)), batch()[1]
    found = []
    for loss_fn in (Theirs(), linear_cross_entropy_loss()):
        torch.manual_seed(0)
        build = llama3_2 if tied else qwen2
        model = build(**sizes, intermediate_dim=32)
        loss_fn.set_model_output(model)
        loss = loss_fn(model(tokens), targets)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
