"""LoRA: what is trained, what stays, what is left when it is merged, and what the policy is without it."""

import copy
import importlib.util
import json
import weakref
from dataclasses import replace

import pytest
import torch
from on_ranks import on_ranks

from stepkto_fast import ranks
from stepkto_fast.adapters import (
    WithoutAdapters,
    add_adapters,
    attach_adapters,
    load_adapters,
    merged_state,
    require_adapters,
    save_adapters,
    without_adapters,
)
from stepkto_fast.errors import RunError
from stepkto_fast.objective import LaggedPoints, accumulate_gradients, class_weights, estimate_points, log_probs
from stepkto_fast.policy import head, load_policy
from stepkto_fast.policy_views import frozen
from stepkto_fast.prm_files import checksum
from stepkto_fast.recipe import Recipe
from stepkto_fast.run_directory import save_pretrained
from stepkto_fast.sharding import shard

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


HEADS = pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="frozen"),
        pytest.param({"lora_target": ".*(q_proj|down_proj|lm_head)"}, id="adapted"),
        pytest.param({"lora_train_head": True}, id="trained"),
    ],
)


def recipe_of(settings, **others):
    return Recipe(**{"lora_rank": 4, "lora_alpha": 8, "lora_merge": "end", "filter_eps": 0.0} | settings | others)


def move(model, seed=0):
    """Puts numbers into everything that is trained, as an update would."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.fixture
def exact(rollouts):
    """Some of the rollouts; fp64 makes of rounding no more than 1e-12."""
    return rollouts[:8]


@needs_peft
@HEADS
def test_gradients_are_those_of_the_merged_model(model, exact, settings):
    recipe = recipe_of(settings)
    model.double()
    plain = copy.deepcopy(model)
    attach_adapters(model, recipe, seed=3)
    move(model)
    plain.load_state_dict(dict(merged_state(model)))
    weights = class_weights(exact, recipe)
    for m in (model, plain):
        accumulate_gradients(m, exact, recipe, weights, (0.1, 0.2))
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad), "a frozen weight costs no gradient"
    scale, seen = recipe.lora_alpha / recipe.lora_rank, set()
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            dw = plain.get_submodule(name).weight.grad
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            torch.testing.assert_close(b.grad, scale * dw @ a.detach().T, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(a.grad, scale * b.detach().T @ dw, rtol=1e-9, atol=1e-12)
            seen |= {a, b}
    if recipe.lora_train_head:
        trained = model.get_output_embeddings().weight
        torch.testing.assert_close(trained.grad, plain.lm_head.weight.grad, rtol=1e-9, atol=1e-12)
        seen.add(trained)
    assert seen == {p for p in model.parameters() if p.requires_grad}
    assert all(p.grad.abs().max() > 0 for p in seen)


@needs_peft
@HEADS
def test_the_merged_state_is_pefts_own_to_the_bit_and_changes_nothing(model, rollouts, settings, tmp_path):
    recipe = recipe_of(settings)
    names = list(model.state_dict())
    other = copy.deepcopy(model)
    attach_adapters(model, recipe, seed=3)
    merge = add_adapters(other, replace(recipe, lora_merge="iteration"), seed=3)
    move(model)
    move(other)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own, fresh = {p.data_ptr() for p in model.parameters()}, []
    for _, tensor in merged_state(model):
        if tensor.data_ptr() not in own:
            fresh.append(weakref.ref(tensor))
        del tensor
        assert sum(ref() is not None for ref in fresh) <= 1, "merged weights are made one at a time"
    assert fresh
    state = dict(merged_state(model))
    merge()
    assert list(state) == names == list(other.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in other.state_dict().items())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="stepkto_packed")
    assert torch.equal(flat(log_probs(loaded, rollouts, recipe)), flat(log_probs(other, rollouts, recipe)))


def test_the_merged_state_of_a_plain_model_is_its_own(model):
    assert {n: t.data_ptr() for n, t in merged_state(model)} == {n: t.data_ptr() for n, t in model.state_dict().items()}


@needs_peft
@HEADS
def test_without_its_adapters_the_policy_is_the_initial_model_to_the_bit(model, rollouts, settings, tmp_path):
    recipe = recipe_of(settings)
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain, weight = flat(log_probs(model, rollouts, recipe)), model.lm_head.weight.detach().clone()
    attach_adapters(model, recipe, seed=3)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert torch.equal(flat(log_probs(model, rollouts, recipe)), plain), "fresh adapters change nothing"
    move(model)
    moved = flat(log_probs(model, rollouts, recipe))
    assert (moved - plain).abs().max() > 1e-3
    with without_adapters(model):
        assert torch.equal(flat(log_probs(model, rollouts, recipe)), plain)
        assert torch.equal(head(model)["weight"], weight)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    with pytest.raises(KeyError), without_adapters(model):
        raise KeyError
    view = WithoutAdapters(model)
    assert torch.equal(flat(log_probs(view, rollouts, recipe)), plain)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    assert torch.equal(flat(log_probs(model, rollouts, recipe)), moved)
    assert view.state_dict().keys() == initial.keys()
    assert all(torch.equal(initial[name], tensor) for name, tensor in view.state_dict().items())
    own = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in view.state_dict().values()} <= own, "no second model in memory"
    view.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="stepkto_packed")
    assert torch.equal(flat(log_probs(loaded, rollouts, recipe)), plain)
    assert checksum(view) == checksum(loaded)


@needs_peft
@HEADS
@pytest.mark.parametrize("estimator", ["exact", "mismatched"])
def test_reference_points_need_no_copy_of_the_model(model, exact, settings, estimator):
    """Of an iteration's M_t with fresh adapters, and of an M_t that has trained ones already."""
    recipe = recipe_of(settings, reference_points=estimator, train_batch_size=64)
    copied = copy.deepcopy(model)
    attach_adapters(model, recipe, seed=3)

    def points(reference):
        return estimate_points(model, reference, exact, recipe, LaggedPoints(), 0)

    move(model)
    assert points(WithoutAdapters(model)) == points(copied)
    assert points(copied)[0] != 0
    copied, view = copy.deepcopy(model), frozen(model)
    assert points(view) == points(copied)
    move(model, seed=1)
    now = flat(log_probs(model, exact, recipe))
    assert points(view) == points(copied)
    assert points(copied)[0] != 0
    assert torch.equal(flat(log_probs(view, exact, recipe)), flat(log_probs(copied, exact, recipe)))
    assert torch.equal(flat(log_probs(model, exact, recipe)), now)
    kept = sum(t.numel() for _, t in vars(view)["_kept"])
    assert kept == sum(p.numel() for p in model.parameters() if p.requires_grad)


@needs_peft
def test_a_view_is_read_with_its_own_weights_under_autocast(model, exact):
    """Autocast keeps casts by parameter, and a view lends the policy's parameters other memory."""
    recipe = recipe_of({}, reference_points="exact", bf16=True)
    attach_adapters(model, recipe, seed=3)
    move(model)
    copied, view = copy.deepcopy(model), frozen(model)
    move(model, seed=1)
    found, right = (estimate_points(model, reference, exact, recipe, LaggedPoints(), 0) for reference in (view, copied))
    assert right[0] > 0.01
    assert found == right


def test_a_model_that_is_trained_in_full_is_copied(model, exact):
    reference = frozen(model)
    before = flat(log_probs(model, exact, Recipe()))
    move(model)
    assert torch.equal(flat(log_probs(reference, exact, Recipe())), before)
    assert not any(p.requires_grad for p in reference.parameters())


@needs_peft
@HEADS
def test_adapters_on_the_disk_are_pefts(model, exact, settings, tmp_path):
    from peft import PeftModel

    recipe = recipe_of(settings)
    plain, again = copy.deepcopy(model), copy.deepcopy(model)
    attach_adapters(model, recipe, seed=3)
    move(model)
    save_adapters(model, tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (settings["base_model_name_or_path"], settings["inference_mode"]) == (None, True), "no path of this machine"
    attach_adapters(again, recipe, seed=8)
    load_adapters(again, tmp_path / "adapter")
    moved = flat(log_probs(model, exact, recipe))
    assert torch.equal(flat(log_probs(again, exact, recipe)), moved)
    PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert torch.equal(flat(log_probs(plain, exact, recipe)), moved)


def sharded(rank, rollouts, recipes, folder):
    """What two ranks make of policies with adapters that they hold together."""
    return [_sharded(rank, rollouts, recipe, folder, folder / f"adapter_{k}") for k, recipe in enumerate(recipes)]


def _sharded(rank, rollouts, recipe, folder, saved):
    model, _ = load_policy(str(folder))
    attach_adapters(model, recipe, seed=3)
    move(model)
    again = copy.deepcopy(model)
    move(again, seed=1)
    shard(model, bf16=False)
    shard(again, bf16=False)
    save_adapters(model, saved if rank == 0 else None)
    ranks.barrier()
    load_adapters(again, saved)
    view = frozen(model)
    before = flat(log_probs(model, rollouts, recipe))
    found = {
        "merged": dict(merged_state(model)),
        "loaded": dict(merged_state(again)),
        "initial": flat(log_probs(WithoutAdapters(model), rollouts, recipe)),
    }
    move(model, seed=2)
    assert (flat(log_probs(model, rollouts, recipe)) - before).abs().max() > 1e-3
    assert torch.equal(flat(log_probs(view, rollouts, recipe)), before)
    return found


@needs_peft
def test_a_policy_that_ranks_share_is_merged_saved_and_loaded_whole(model, tokenizer, exact, tmp_path):
    save_pretrained(model, tokenizer, tmp_path)
    recipes = [recipe_of(*kind.values) for kind in HEADS.args[1]]
    of_ranks = on_ranks(2, sharded, exact, recipes, tmp_path)
    for k, recipe in enumerate(recipes):
        policy = copy.deepcopy(model)
        attach_adapters(policy, recipe, seed=3)
        move(policy)
        expected = dict(merged_state(policy))
        for found in (of_rank[k] for of_rank in of_ranks):
            for state in (found["merged"], found["loaded"]):
                assert list(state) == list(expected)
                assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
            # The ranks pack other rollouts together than one process does.
            assert (found["initial"] - flat(log_probs(model, exact, recipe))).abs().max() < 1e-5
        save_adapters(policy, tmp_path / "alone")
        for path in (tmp_path / "alone").iterdir():
            assert (tmp_path / f"adapter_{k}" / path.name).read_bytes() == path.read_bytes()


@needs_peft
def test_other_or_damaged_adapters_are_refused(model, tmp_path):
    attach_adapters(model, LORA, seed=0)
    other = copy.deepcopy(model)
    with pytest.raises(RunError, match="cannot be read"):
        load_adapters(model, tmp_path)
    save_adapters(model, None)
    assert not list(tmp_path.iterdir())
    save_adapters(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RunError, match=r"adapter_model.safetensors cannot be read"):
        load_adapters(model, tmp_path)
    for p in other.parameters():
        p.data = p.data[:1].clone()
    save_adapters(other, tmp_path)
    with pytest.raises(RunError, match="holds other adapters than the policy has, first at base_model"):
        load_adapters(model, tmp_path)


@needs_peft
@pytest.mark.parametrize(
    ("tied", "settings", "message"),
    [
        (True, {"lora_train_head": True}, "would untie them"),
        (True, {"lora_target": ".*(q_proj|lm_head)"}, "would change the other"),
        (True, {"lora_target": ".*(q_proj|embed_tokens)"}, "would change the other"),
        (False, {"lora_target": ".*(q_proj|lm_head)", "lora_train_head": True}, "drop one"),
    ],
)
def test_heads_that_cannot_be_trained_so_are_refused(tied, settings, message):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    before = model.state_dict().keys()
    with pytest.raises(RunError, match=message):
        attach_adapters(model, recipe_of(settings), seed=0)
    assert model.state_dict().keys() == before


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


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(lora_rank=4, lora_merge="end")])
def test_an_iteration_without_adapters_of_its_own_adds_none(model, recipe):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add_adapters(model, recipe, seed=0)()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(p.requires_grad for p in model.parameters())


def test_without_peft_the_remedy_is_named_before_the_run_starts(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else real(name, *rest))
    require_adapters(Recipe())
    with pytest.raises(RunError, match="lora_rank 4 needs peft: pip install"):
        require_adapters(LORA)
