"""Cross-entropy for torchtitan's trainer: against fp64, and with torchtitan's own loss and model where it is here."""

from importlib import metadata

import pytest
import torch
from test_linear_logp import assert_within_budget
from torch import nn
from torch.nn.functional import cross_entropy, linear

from stepkto_fast.integrations.torchtitan import SUPPORTED, LinearCrossEntropyLoss, loss_config

B, L, D, V = 2, 8, 16, 67


@pytest.fixture
def titan():
    """torchtitan's losses, or a skip that says why they cannot be used."""
    try:
        found = metadata.version("torchtitan")
    except metadata.PackageNotFoundError:
        pytest.skip("torchtitan is not installed: it wants another datasets than requirements.lock has")
    reason = f"torchtitan {found} lacks a dependency"
    return pytest.importorskip("torchtitan.components.loss", reason=reason, exc_type=ImportError)


def head(dtype=torch.float32, bias=False):
    torch.manual_seed(0)
    made = nn.Linear(D, V, bias=bias, dtype=dtype)
    nn.init.normal_(made.weight, std=0.5)
    return made


def batch(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(B, L, D, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (B, L), generator=generator)
    labels[0, :3] = -100
    return hidden, labels


def loss_of(lm_head):
    loss_fn = LinearCrossEntropyLoss()
    loss_fn.set_lm_head(lm_head)
    return loss_fn


def loss_and_gradients(hidden, lm_head, labels, dtype, count):
    leaves = [
        None if x is None else x.detach().to(dtype).requires_grad_() for x in (hidden, lm_head.weight, lm_head.bias)
    ]
    loss = cross_entropy(linear(*leaves).flatten(0, 1), labels.flatten(), reduction="sum") / count
    loss.backward()
    return [loss.detach(), *(x.grad for x in leaves if x is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [None, 13])
def test_loss_and_gradients_are_those_of_fp64(dtype, bias, count):
    lm_head, (hidden, labels) = head(dtype, bias), batch(dtype)
    loss, metrics = loss_of(lm_head)(hidden, labels, None if count is None else torch.tensor(count), ignored_input=1)
    loss.backward()
    ours = [loss.detach(), hidden.grad, lm_head.weight.grad] + ([lm_head.bias.grad] if bias else [])
    exact = loss_and_gradients(hidden, lm_head, labels, torch.float64, count or 1)
    plain = loss_and_gradients(hidden, lm_head, labels, torch.float32, count or 1)
    assert metrics == {}
    for n, triple in enumerate(zip(ours, exact, plain, strict=True)):
        # 16 bits: factors and sums are rounded once each, and filter_eps = 2^-9 of each token's mass may be left out
        sixteen = n > 0 and dtype != torch.float32
        summands = 2 * torch.finfo(dtype).eps * triple[1].abs().max() if sixteen else None
        assert_within_budget(*triple, largest_logit=8, rounded_to=dtype if sixteen else None, summands=summands)


def test_packed_tokens_are_taken_as_they_are():
    lm_head, (hidden, labels) = head(), batch()
    flat, _ = loss_of(lm_head)(hidden.flatten(0, 1), labels.flatten())
    assert torch.equal(flat, loss_of(lm_head)(hidden, labels)[0])


def test_validation_makes_no_graph_and_the_head_stays_as_it_was():
    lm_head, (hidden, labels) = head(), batch()
    with torch.no_grad():
        loss, _ = loss_of(lm_head)(hidden, labels)
    assert not loss.requires_grad
    assert lm_head(hidden).shape == (B, L, V)


def test_wrong_calls_name_what_is_wrong():
    hidden, labels = batch()
    with pytest.raises(RuntimeError, match="set_lm_head"):
        LinearCrossEntropyLoss()(hidden, labels)
    with pytest.raises(ValueError, match=r"labels has shape \(2, 7\); expected \(2, 8\)"):
        loss_of(head())(hidden, labels[:, 1:])
    with pytest.raises(ValueError, match=r"weight has shape \(67, 16\); expected \(V, D=8\).*full_tensor\(\)"):
        loss_of(head())(hidden[..., :8], labels)
    with pytest.raises(ValueError, match=r"lm_head is a Sequential; expected a torch\.nn\.Linear"):
        loss_of(nn.Sequential(head()))(hidden, labels)


def test_a_sharded_head_is_a_value_error(one_rank):
    from torch.distributed.tensor import Shard, distribute_tensor

    lm_head = head()
    lm_head.weight = nn.Parameter(distribute_tensor(lm_head.weight.detach(), one_rank, [Shard(0)]))
    with pytest.raises(ValueError, match=r"weight is a DTensor.*tensor_parallel_degree=1.*full_tensor\(\)"):
        loss_of(lm_head)(*batch())


def test_fsdp_gathers_the_head_for_the_loss(one_rank):
    from torch.distributed.fsdp import fully_shard

    lm_head, (hidden, labels) = head(), batch()
    exact = loss_and_gradients(hidden, lm_head, labels, torch.float64, 1)
    fully_shard(lm_head, mesh=one_rank)
    loss_of(lm_head)(hidden, labels)[0].backward()
    torch.testing.assert_close(hidden.grad.double(), exact[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lm_head.weight.grad.full_tensor().double(), exact[2], rtol=1e-4, atol=1e-5)


def test_other_versions_are_refused(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "0.2.2")
    with pytest.raises(ImportError, match=f"torchtitan{SUPPORTED}, found version 0.2.2"):
        loss_config()


def test_torchtitans_trainer_takes_it_for_a_chunked_loss(titan):
    from torchtitan.config import CompileConfig

    loss_fn = loss_config().build(compile_config=CompileConfig())
    assert isinstance(loss_fn, titan.ChunkedLossWrapper)
    assert isinstance(loss_fn, LinearCrossEntropyLoss)
    assert isinstance(loss_config(), titan.BaseLoss.Config)
    assert loss_config().to_dict() == {}


def test_torchtitans_chunked_loss_gives_the_same(titan):
    from torchtitan.models.common.linear import Linear

    found = []
    for loss_fn in (titan.ChunkedLossWrapper.Config(num_chunks=4).build(compile_config=None), loss_config().build()):
        lm_head, (hidden, labels) = Linear.Config(in_features=D, out_features=V).build(), batch()
        lm_head.load_state_dict(head().state_dict())
        loss_fn.set_lm_head(lm_head)
        loss, _ = loss_fn(hidden, labels, torch.tensor(13))
        loss.backward()
        found.append([loss.detach(), hidden.grad, lm_head.weight.grad])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
