"""LLaMA-Factory's KTO trainer on our head: against fp64 logits, and with the real trainer where it is here."""

import sys
import types
from importlib import metadata

import pytest
import torch
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from stepkto_fast.integrations.llamafactory import SUPPORTED, forward, patch

B, L, V = 4, 9, 67
SIZES = dict(
    vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


@pytest.fixture
def trainer_module():
    """The module of LLaMA-Factory's KTO trainer, or a skip that says why it cannot be used."""
    try:
        found = metadata.version("llamafactory")
    except metadata.PackageNotFoundError:
        pytest.skip("llamafactory is not installed: it wants another transformers and trl than requirements.lock has")
    reason = f"llamafactory {found} lacks a dependency"
    return pytest.importorskip("llamafactory.train.kto.trainer", reason=reason, exc_type=ImportError)


def build(cls=LlamaForCausalLM, config=LlamaConfig, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = cls(config(**SIZES, **options)).to(dtype)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(10)
    return model


def batch():
    generator = torch.Generator().manual_seed(1)
    found = {"kto_tags": torch.tensor([True, False, True, False])}
    for prefix in ("", "kl_"):
        input_ids = torch.randint(3, V, (B, L), generator=generator)
        labels, mask = input_ids.clone(), torch.ones_like(input_ids)
        for n in range(B):
            labels[n, : 2 + n % 2] = labels[n, L - n :] = -100
            mask[n, L - n :] = 0
        found |= {f"{prefix}input_ids": input_ids, f"{prefix}labels": labels, f"{prefix}attention_mask": mask}
    return found


def from_logits(model, given, prefix=""):
    """(logits, sum of log-probs, their mean) as the trainer has them, in the model's dtype."""
    logits = model(input_ids=given[f"{prefix}input_ids"], attention_mask=given[f"{prefix}attention_mask"]).logits
    labels = given[f"{prefix}labels"][:, 1:]
    scored = labels != -100
    logp = logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * scored
    return logits, logp.sum(1), logp.sum(1) / scored.sum(1)


@pytest.mark.parametrize("prefix", ["", "kl_"])
@pytest.mark.parametrize(
    "family", [(LlamaForCausalLM, LlamaConfig, {}), (CohereForCausalLM, CohereConfig, {"logit_scale": 0.5})]
)
def test_sums_means_gradients_and_the_metric_are_those_of_fp64_logits(family, prefix):
    cls, config, options = family
    model, exact = build(cls, config, **options), build(cls, config, torch.float64, **options)
    given, weights = batch(), torch.linspace(-1, 1, B)
    logits_sum, logps, means = forward(object(), model, given, prefix)
    logits, exact_logps, exact_means = from_logits(exact, given, prefix)
    torch.testing.assert_close(logps.double(), exact_logps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(means.double(), exact_means, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits_sum.double(), logits.sum(-1), rtol=1e-4, atol=1e-3)
    assert not logits_sum.requires_grad
    (logps * weights).sum().backward()
    (exact_logps * weights).sum().backward()
    for ours, theirs in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-5)


def test_a_softcap_is_applied_and_leaves_no_logits_metric():
    options = {"final_logit_softcapping": 2.0, "head_dim": 8}
    model = build(Gemma2ForCausalLM, Gemma2Config, **options)
    logits_sum, logps, _ = forward(object(), model, batch())
    torch.testing.assert_close(logps, from_logits(model, batch())[1], rtol=1e-4, atol=1e-4)
    assert logits_sum.isnan().all()


def test_wrapped_models_and_autocast(one_rank):
    model = build()
    expected = from_logits(model, batch())[1]
    wrapped = nn.parallel.DistributedDataParallel(model)
    _, logps, _ = forward(object(), wrapped, batch())
    logps.sum().backward()
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, rounded, _ = forward(object(), wrapped, batch())
    # some eight tokens, each logit of size 4 rounded to 8 bits
    torch.testing.assert_close(rounded, expected, rtol=0, atol=8 * 4 * 2**-8)
    assert rounded.dtype == torch.float32


def test_bad_input_is_a_value_error_that_names_it(one_rank):
    from torch.distributed.tensor import Shard, distribute_tensor

    model, given = build(), batch()
    with pytest.raises(ValueError, match=r"kl_labels has shape \(4, 8\); expected \(4, 9\)"):
        forward(object(), model, given | {"kl_labels": given["kl_labels"][:, 1:]}, "kl_")
    model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), one_rank, [Shard(0)]))
    with pytest.raises(ValueError, match=r"weight is a DTensor.*full_tensor\(\)"):
        forward(object(), model, given)
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=L, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="model_type 'gpt2'; expected one whose logits are tested"):
        forward(object(), gpt, given)


def test_patch_refuses_other_versions(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "0.9.2")
    with pytest.raises(ImportError, match=f"llamafactory{SUPPORTED}, found version 0.9.2"):
        patch()


def test_patch_replaces_the_trainers_forward(monkeypatch):
    """On a stand-in of the trainer's module."""
    names = ("llamafactory", "llamafactory.train", "llamafactory.train.kto", "llamafactory.train.kto.trainer")
    modules = [types.ModuleType(name) for name in names]
    modules[-1].CustomKTOTrainer = type("CustomKTOTrainer", (), {"forward": None})
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(metadata, "version", lambda name: "0.9.5")
    patch()
    _, logps, _ = modules[-1].CustomKTOTrainer().forward(build(), batch(), prefix="kl_")
    torch.testing.assert_close(logps, from_logits(build(), batch(), "kl_")[1], rtol=1e-5, atol=1e-5)


def test_the_real_trainer_computes_the_same_loss_and_metrics(trainer_module, tmp_path, monkeypatch):
    from transformers import TrainingArguments

    options = types.SimpleNamespace(
        pref_beta=0.1, kto_chosen_weight=1.0, kto_rejected_weight=1.3, pref_ftx=0.2, use_badam=False,
        disable_shuffling=False,
    )  # fmt: skip
    monkeypatch.setattr(trainer_module.CustomKTOTrainer, "forward", trainer_module.CustomKTOTrainer.forward)
    found = []
    for ours in (False, True):
        if ours:
            patch()
        model, reference = build(), build()
        nn.init.normal_(reference.lm_head.weight)
        arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, remove_unused_columns=False)
        trainer = trainer_module.CustomKTOTrainer(
            model=model, ref_model=reference, args=arguments, finetuning_args=options, processor=None, tokenizer=None,
            data_collator=lambda x: x,
        )  # fmt: skip
        loss, metrics = trainer.get_batch_loss_metrics(model, batch())
        loss.backward()
        found.append((loss.detach(), metrics, [p.grad for p in model.parameters()]))
    (loss, metrics, grads), (our_loss, our_metrics, our_grads) = found
    torch.testing.assert_close(our_loss, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_grads, grads, rtol=1e-3, atol=1e-6)
    assert our_metrics.keys() == metrics.keys()
    for name, value in metrics.items():
        assert our_metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-3), name
