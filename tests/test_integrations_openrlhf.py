"""OpenRLHF's actor on our head and Step-KTO as its loss module: against fp64, and with OpenRLHF's own Actor."""

import copy
import functools
import warnings
from importlib import metadata

import pytest
import torch
from stepkto_kernels.step_kto import reference as truth
from torch import nn
from transformers import CohereConfig, CohereForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from stepkto_fast.integrations.openrlhf import SUPPORTED, StepKTOLoss, use_linear_logp

B, L, A, V = 3, 9, 5, 67
SIZES = dict(
    vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


class StandIn(nn.Module):
    """An actor with the attributes and the call of `openrlhf.models.Actor`, and its results from logits."""

    def __init__(self, model, temperature=1.0):
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(
        self, sequences, action_mask=None, attention_mask=None, return_output=False, allgather_logits=False,
        return_logprobs=False, ring_attn_group=None, packed_seq_lens=None, return_entropy=False,
    ):  # fmt: skip
        position_ids = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
        output = self.model(sequences, attention_mask=attention_mask, position_ids=position_ids)
        logp = (output["logits"] / self.temperature).log_softmax(-1)
        if return_entropy:
            output.entropy = -(logp.exp() * logp).sum(-1)[:, :-1]
        if action_mask is None and not return_logprobs:
            return output
        logp = logp.gather(-1, sequences.roll(-1, 1)[..., None])[..., 0][:, :-1]
        if action_mask is not None:
            logp = logp[:, -action_mask.shape[1] :] * action_mask.float()
        return (logp, output) if return_output else logp


def found_version(name):
    return "0.11.2"


@pytest.fixture(params=["a stand-in", "OpenRLHF's actor"])
def build_actor(request, monkeypatch):
    """Builds actors; the real ones where OpenRLHF is installed."""
    if request.param == "a stand-in":
        monkeypatch.setattr(metadata, "version", found_version)
        return StandIn
    try:
        found = metadata.version("openrlhf")
    except metadata.PackageNotFoundError:
        pytest.skip("openrlhf is not installed: it wants deepspeed and flash-attn, which need an NVIDIA GPU")
    reason = f"openrlhf {found} lacks a dependency"
    module = pytest.importorskip("openrlhf.models.actor", reason=reason, exc_type=ImportError)
    return functools.partial(real, module.Actor)


def real(cls, model, temperature=1.0):
    actor = cls(model, temperature=temperature)
    actor.packing_samples = False  # set only where it loads the model itself
    return actor


@pytest.fixture
def real_actor():
    """OpenRLHF's own actor of a tiny Llama."""
    pytest.importorskip("flash_attn.bert_padding", reason="packing uses flash-attn, which needs an NVIDIA GPU")
    module = pytest.importorskip("openrlhf.models.actor", exc_type=ImportError, reason="openrlhf cannot be imported")
    return real(module.Actor, llama())


def llama(dtype=torch.float32, cls=LlamaForCausalLM, config=LlamaConfig, **options):
    torch.manual_seed(0)
    model = cls(config(**SIZES, **options)).to(dtype)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


def batch():
    generator = torch.Generator().manual_seed(1)
    sequences = torch.randint(3, V, (B, L), generator=generator)
    attention_mask = torch.ones(B, L, dtype=torch.long)
    attention_mask[0, :2] = attention_mask[1, 7:] = 0
    action_mask = torch.ones(B, A, dtype=torch.bool)
    action_mask[1, 3:] = False
    return sequences, action_mask, attention_mask


def wide(actor):
    """The same actor in fp64, scoring from logits."""
    model = copy.deepcopy(actor.model).double()
    return StandIn(model, actor.temperature)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize(
    "family", [(LlamaForCausalLM, LlamaConfig, {}), (CohereForCausalLM, CohereConfig, {"logit_scale": 0.5})]
)
def test_an_actor_gives_the_same_log_probs_entropies_and_gradients(build_actor, temperature, family):
    cls, config, options = family
    actor = build_actor(llama(cls=cls, config=config, **options), temperature=temperature)
    actor.temperature = temperature
    exact = wide(actor)
    use_linear_logp(actor)
    sequences, action_mask, attention_mask = batch()
    weights = torch.linspace(-1, 1, A)
    results = []
    for which in (actor, exact):
        logp, output = which(sequences, action_mask, attention_mask, return_output=True, return_entropy=True)
        (logp * weights).sum().backward()
        results.append((logp, output.entropy, *(p.grad for p in which.model.parameters())))
        logits = output["logits"]
        assert logits is None or which is exact
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=2e-5)
    assert results[0][0].shape == (B, A)
    assert results[0][1].shape == (B, L - 1)


def test_the_other_calls_of_an_actor(build_actor):
    actor = build_actor(llama(), temperature=1.0)
    sequences, action_mask, attention_mask = batch()
    before = actor(sequences, None, attention_mask, return_logprobs=True), actor(sequences, action_mask, attention_mask)
    use_linear_logp(actor)
    after = actor(sequences, None, attention_mask, return_logprobs=True), actor(sequences, action_mask, attention_mask)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    logits = actor(sequences, None, attention_mask, return_output=True)["logits"]
    assert logits.shape == (B, L, V)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(actor(sequences, action_mask, attention_mask), before[1], rtol=0, atol=0.2)


def test_a_wrapped_model_is_found_inside(build_actor, one_rank):
    """strategy.prepare puts an engine around the model, which has it as `.module`."""
    actor = build_actor(llama(), temperature=1.0)
    before = actor(*batch())
    use_linear_logp(actor)
    actor.model = nn.parallel.DistributedDataParallel(actor.model)
    logp = actor(*batch())
    logp.sum().backward()
    torch.testing.assert_close(logp, before, rtol=1e-5, atol=1e-5)
    assert actor.model.module.lm_head.weight.grad.any()


def test_packed_samples_give_the_same(real_actor):
    sequences, action_mask, attention_mask = batch()
    real_actor.packing_samples = True
    before = real_actor(sequences, action_mask, attention_mask, return_output=True, return_entropy=True)
    use_linear_logp(real_actor)
    after = real_actor(sequences, action_mask, attention_mask, return_output=True, return_entropy=True)
    torch.testing.assert_close(after[0], before[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after[1].entropy, before[1].entropy, rtol=1e-5, atol=1e-5)


def test_actors_that_cannot_be_served_are_refused(monkeypatch, one_rank):
    from torch.distributed.tensor import Shard, distribute_tensor

    monkeypatch.setattr(metadata, "version", found_version)
    sequences, action_mask, attention_mask = batch()
    actor = StandIn(llama())
    actor.is_vlm = True
    with pytest.raises(ValueError, match="vision-language"):
        use_linear_logp(actor)
    actor.is_vlm = False
    use_linear_logp(actor)
    with pytest.raises(ValueError, match="attention_mask is None"):
        actor(sequences, action_mask)
    actor.model.lm_head = nn.Sequential(actor.model.lm_head)
    with pytest.raises(ValueError, match="the LM head of LlamaForCausalLM is a Sequential"):
        actor(sequences, action_mask, attention_mask)
    actor.model.lm_head = actor.model.lm_head[0]
    actor.model.lm_head.weight = nn.Parameter(
        distribute_tensor(actor.model.lm_head.weight.detach(), one_rank, [Shard(0)])
    )
    with pytest.raises(ValueError, match=r"weight is a DTensor.*full_tensor\(\)"):
        actor(sequences, action_mask, attention_mask)
    actor.model = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=L, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="model_type 'gpt2'; expected one whose logits are tested"):
        actor(sequences, action_mask, attention_mask)
    assert "forward" not in vars(actor.model.lm_head)


def test_other_versions_are_refused(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "0.9.0")
    with pytest.raises(ImportError, match=f"openrlhf{SUPPORTED}, found version 0.9.0"):
        use_linear_logp(StandIn(llama()))


def completions():
    """Log-probs of three completions over (B, T), of lengths 4, 5 and 3, with steps of 2+2, 3+2 and 3 tokens."""
    generator = torch.Generator().manual_seed(2)
    logp, reference = -3 * torch.rand(2, B, 6, generator=generator)
    mask = torch.zeros(B, 6, dtype=torch.bool)
    mask[0, 1:5] = mask[1, :5] = mask[2, 3:] = True
    step_labels = torch.full((B, 6), -100)
    step_labels[0, 2], step_labels[0, 4], step_labels[1, 2], step_labels[2, 5] = 1, 0, 1, -1
    return {
        "log_probs": logp.requires_grad_(),
        "reference_log_probs": reference,
        "action_mask": mask,
        "labels": torch.tensor([True, False, True]),
        "step_labels": step_labels,
    }


def packed(arguments, dtype):
    """The same completions as step_kto's truth has them."""
    mask = arguments["action_mask"]
    return (
        arguments["log_probs"].to(dtype)[mask], arguments["reference_log_probs"].to(dtype)[mask],
        torch.tensor([0, 4, 9, 12], dtype=torch.int32), torch.tensor([0, 2, 4, 7, 9, 12], dtype=torch.int32),
        arguments["labels"], torch.tensor([1, 0, 1, -1, -1], dtype=torch.int8),
    )  # fmt: skip


@pytest.mark.parametrize(
    "options", [{}, {"beta": 0.3, "step_beta": 0.7, "step_reduction": "sum", "after_first_error": "mask"}]
)
def test_the_loss_is_step_kto_of_the_masked_tokens(options):
    arguments = completions()
    output = StepKTOLoss(**options)(**arguments, kl=0.2, step_kl=0.1)
    exact = truth.step_kto(*packed(arguments, torch.float64), kl=0.2, step_kl=0.1, **options)
    torch.testing.assert_close(output.loss.double(), exact["loss"].double(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(output.step_log_ratios.double(), exact["step_log_ratios"].double(), rtol=1e-5, atol=1e-6)
    ours, theirs = (torch.autograd.grad(x, arguments["log_probs"])[0] for x in (output.loss, exact["loss"]))
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=1e-7)
    assert not ours[~arguments["action_mask"]].any()


def test_micro_batches_add_up_to_the_batch():
    arguments = completions()
    whole = StepKTOLoss()(**arguments).loss
    parts = [
        StepKTOLoss()(**{k: v[i : i + 1] for k, v in arguments.items()}, num_completions=3, num_supervised=2).loss
        for i in range(B)
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-6, atol=1e-7)


def test_labels_that_are_all_ignored_or_all_true_do_not_pass_silently():
    """OpenRLHF 683: step labels that were lost on the way trained on nothing, or on everything being right."""
    arguments = completions()
    lost = arguments | {"step_labels": torch.full((B, 6), -100)}
    with pytest.raises(ValueError, match="step_labels holds no label: all are -100 or -1"):
        StepKTOLoss()(**lost)
    assert StepKTOLoss(step_weight=0.0)(**lost).step_loss == 0
    assert StepKTOLoss()(**lost, num_supervised=4).step_loss == 0
    true = arguments | {"step_labels": torch.where(arguments["step_labels"] >= 0, 1, -100)}
    with pytest.warns(UserWarning, match="all 3 labels are 1"):
        StepKTOLoss()(**true)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StepKTOLoss()(**arguments)
    booleans = arguments | {"step_labels": arguments["step_labels"] != 0}  # -100 becomes true
    with pytest.raises(ValueError, match=r"step_labels\[0, 0\] is 1, but action_mask is 0 there"):
        StepKTOLoss()(**booleans)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step_labels": torch.full((B, 5), -100)}, r"step_labels has shape \(3, 5\); expected \(3, 6\)"),
        ({"reference_log_probs": torch.zeros(B)}, r"reference_log_probs has shape \(3,\)"),
        ({"action_mask": torch.zeros(B, 6, dtype=torch.bool)}, r"step_labels\[0, 2\] is 1, but action_mask is 0"),
        ({"labels": torch.ones(2, dtype=torch.bool)}, "labels has shape"),
    ],
)
def test_bad_input_is_a_value_error_that_names_it(change, message):
    with pytest.raises(ValueError, match=message):
        StepKTOLoss()(**completions() | change)


def test_reward_tokens_and_empty_completions_are_named():
    arguments = completions()
    arguments["step_labels"][0, 2] = 488
    with pytest.raises(ValueError, match="step_labels holds 488; expected 1, 0, -1"):
        StepKTOLoss()(**arguments)
    arguments = completions()
    arguments["action_mask"][2], arguments["step_labels"][2] = False, -100
    with pytest.raises(ValueError, match=r"action_mask\[2\] is 0 throughout"):
        StepKTOLoss()(**arguments)
