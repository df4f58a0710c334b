"""LoRA in an update: what is trained, what stays, and what is left when it is merged."""

import importlib.util

import pytest
import torch

from stepkto_fast.adapters import add_adapters, require_adapters
from stepkto_fast.errors import RunError
from stepkto_fast.objective import accumulate_gradients, class_weights, log_probs
from stepkto_fast.recipe import Recipe

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
LORA = Recipe(lora_rank=4, lora_alpha=8)


def flat(logps):
    return torch.cat(list(logps))


@needs_peft
def test_fresh_adapters_change_nothing_and_a_merge_leaves_the_trained_model(model, rollouts):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = flat(log_probs(model, rollouts, LORA))
    merge = add_adapters(model, LORA, seed=3)
    assert torch.equal(flat(log_probs(model, rollouts, LORA)), plain), "M_t with adapters is the reference M_t"
    trained = [p for p in model.parameters() if p.requires_grad]
    accumulate_gradients(model, rollouts, LORA, class_weights(rollouts, LORA), (0.0, 0.0))
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad), "a frozen weight costs no gradient"
    assert any(p.grad.abs().max() > 0 for p in trained)
    with torch.no_grad():
        for p in trained:
            p.add_(p.grad, alpha=-1.0)
        for name, p in model.named_parameters():
            if "lora_A" in name:  # B's gradient alone moves the model in the first step; now A's counts, too
                p.add_(0.1 * torch.randn_like(p))
    moved = flat(log_probs(model, rollouts, LORA))
    assert (moved - plain).abs().max() > 1e-3
    merge()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert all(p.requires_grad for p in model.parameters())
    # Two products of fp32 weights instead of one: some units in the last place of sums of log-probs.
    assert (flat(log_probs(model, rollouts, LORA)) - moved).abs().max() < 2e-4


@needs_peft
def test_adapters_depend_on_their_seed_alone(model):
    import copy

    def drawn(seed):
        other = copy.deepcopy(model)
        add_adapters(other, LORA, seed)
        return flat(p.detach().flatten() for name, p in other.named_parameters() if "lora_A" in name)

    state = torch.get_rng_state()
    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    assert torch.equal(torch.get_rng_state(), state)


@needs_peft
def test_a_target_that_names_nothing_is_an_error(model):
    with pytest.raises(RunError, match="lora_target 'no_such_module'"):
        add_adapters(model, Recipe(lora_rank=2, lora_target="no_such_module"), seed=0)


@needs_peft
def test_the_lm_head_is_no_target(model):
    with pytest.raises(RunError, match="takes in the LM head, which stays frozen"):
        add_adapters(model, Recipe(lora_rank=2, lora_target=".*(q_proj|lm_head)"), seed=0)


@needs_peft
def test_a_checkpoint_of_a_tied_model_holds_the_adapters_alone(tokenizer, tmp_path):
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from stepkto_fast.run_directory import Progress, RunDirectory

    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    tied = LlamaForCausalLM(config)
    add_adapters(tied, LORA, seed=0)
    run = RunDirectory(Recipe(output_dir=str(tmp_path / "run")))
    optimizer = torch.optim.AdamW([p for p in tied.parameters() if p.requires_grad])
    run.save_step(tied, optimizer, Progress(step=1))
    saved = load_file(tmp_path / "run" / "checkpoints" / "iteration_0_step_1" / "model.safetensors")
    assert saved
    assert all("lora_" in name for name in saved)


def test_rank_0_trains_all_weights(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add_adapters(model, Recipe(), seed=0)()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(p.requires_grad for p in model.parameters())


def test_without_peft_the_remedy_is_named_before_the_run_starts(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else real(name, *rest))
    require_adapters(Recipe())
    with pytest.raises(RunError, match="lora_rank 4 needs peft: pip install"):
        require_adapters(LORA)
