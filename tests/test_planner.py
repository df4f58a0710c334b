"""The planner's formulas against models of transformers, and what it says of a recipe that does not fit."""

import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
)

from stepkto_fast import planner
from stepkto_fast.adapters import add_adapters
from stepkto_fast.attention import NAME
from stepkto_fast.errors import RunError
from stepkto_fast.hardware import DEVICES, GIB, Rates
from stepkto_fast.model_shape import KNOWN, LLAMA_8B, QWEN_1_5B, ModelShape, shape_of, shape_of_config
from stepkto_fast.monte_carlo import CHUNK
from stepkto_fast.packing import pack
from stepkto_fast.plan_memory import PASSES, PHASES, UPDATE, cache, memory, peak
from stepkto_fast.plan_time import times, traffic
from stepkto_fast.planner import advice, plan, summary
from stepkto_fast.policy import hidden_states
from stepkto_fast.recipe import Recipe
from stepkto_fast.rollout import Rollout
from stepkto_fast.scaling_page import table

SMALL = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96,
}  # fmt: skip
LLAMA = Recipe(
    task="math", model="meta-llama/Llama-3.1-8B-Instruct", bf16=True, context_length=2560, max_completion_length=2048,
    max_tokens_per_micro_batch=4096, prm_labels="monte_carlo", vllm_memory=0.2,
)  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL),
        LlamaConfig(**SMALL, tie_word_embeddings=True, head_dim=32),
        LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
        MistralConfig(**SMALL),
        Qwen2Config(**SMALL),
        Qwen2Config(**SMALL, tie_word_embeddings=True),
    ],
    ids=lambda c: f"{c.model_type}-{c.tie_word_embeddings}-{c.head_dim if hasattr(c, 'head_dim') else ''}",
)
def test_parameters_are_counted_exactly(config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert shape_of_config(config, "small").parameters == sum(p.numel() for p in model.parameters())


def test_shapes_in_the_table_are_the_public_ones():
    # The counts that the models' cards state.
    assert (LLAMA_8B.parameters, QWEN_1_5B.parameters) == (8_030_261_248, 1_543_714_304)
    assert all(shape_of(Recipe(model=name)) == shape for name, shape in KNOWN.items())


def test_adapters_are_counted_exactly():
    config = LlamaConfig(**SMALL)
    model = LlamaForCausalLM(config)
    pytest.importorskip("peft", reason="peft is not installed")
    add_adapters(model, Recipe(lora_rank=4), seed=0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert shape_of_config(config, "small").adapter_parameters(4) == trained


def saved_bytes(model, batch, bf16: bool) -> tuple[int, int]:
    """What autograd keeps of a forward: activations, and bf16 copies of weights. Each storage counts once."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = {(p.numel(), tuple(sorted(p.shape))) for p in model.parameters() if p.ndim == 2}
    kept, activations, copies = [], {}, {}

    def keep(tensor):
        kept.append(tensor)  # alive, so that no other tensor takes its place in memory
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            copied = (tensor.numel(), tuple(sorted(tensor.shape))) in sizes
            (copies if copied else activations)[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16),
    ):
        hidden_states(model, batch)
    return sum(activations.values()), sum(copies.values())


@pytest.mark.parametrize("lora_rank", [0, 8])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("config", "kind"), [(LlamaConfig(**SMALL), LlamaForCausalLM), (Qwen2Config(**SMALL), Qwen2ForCausalLM)]
)
def test_activations_of_a_packed_micro_batch(config, kind, bf16, lora_rank):
    """The formula against what autograd keeps of a real forward on a CPU."""
    torch.manual_seed(0)
    model = kind(config)
    model.set_attn_implementation(NAME)
    if lora_rank:
        pytest.importorskip("peft", reason="peft is not installed")
    add_adapters(model, Recipe(lora_rank=lora_rank), seed=0)
    lengths = (50, 70, 90)
    batch = pack([Rollout(n, 0, "", [3] * 20, "", [4] * c, [], True, [""], [c]) for n, c in enumerate(lengths)])
    measured, copies = saved_bytes(model, batch, bf16)
    shape = shape_of_config(config, "small")
    recipe = Recipe(
        bf16=bf16, lora_rank=lora_rank, max_tokens_per_micro_batch=len(batch.input_ids[0]), context_length=1
    )
    items = {(i.name, i.phases): i.amount for i in memory(recipe, shape, Rates(gpu="cpu"))}
    assert items["activations", ("forward", "LM head")] == pytest.approx(measured, rel=0.08)
    if bf16 and not lora_rank:
        assert items["bf16 copies", ("PRM head", "log-probs", *PASSES)] == copies
    assert bool(copies) == bf16


@pytest.mark.parametrize("lora_rank", [0, 8])
def test_operations_of_the_trunk(lora_rank):
    """Products that torch counts in a forward and a backward: 2 a weight and token, and twice that (LoRA: once)."""
    config = LlamaConfig(**SMALL)
    model = LlamaForCausalLM(config)
    model.set_attn_implementation(NAME)
    if lora_rank:
        pytest.importorskip("peft", reason="peft is not installed")
    add_adapters(model, Recipe(lora_rank=lora_rank), seed=0)
    batch = pack([Rollout(0, 0, "", [3] * 30, "", [4] * 70, [], True, [""], [70])])
    shape, tokens = shape_of_config(config, "small"), 100
    counts = []
    for backward in (False, True):
        with FlopCounterMode(display=False) as counter:
            states = hidden_states(model, batch)
            if backward:
                states.sum().backward()
        products = counter.get_flop_counts()["Global"]
        counts.append(sum(n for op, n in products.items() if "scaled_dot_product" not in str(op)))
    adapters = shape.adapter_parameters(lora_rank) if lora_rank else 0
    assert counts[0] == 2 * tokens * (shape.linear_parameters + adapters)
    # With LoRA the first layer's q, k and v have no input gradient: nothing below them is trained.
    expected = tokens * ((4 if lora_rank else 6) * shape.linear_parameters + 6 * adapters)
    assert counts[1] == pytest.approx(expected, rel=0.06 if lora_rank else 0)
    assert shape.forward_flops(0) == 2 * shape.linear_parameters


def test_operations_of_causal_attention():
    # Half of all pairs of 1000 positions, 2 products of 2 d operations for each head.
    attention = 1000 * (LLAMA_8B.forward_flops(1000) - LLAMA_8B.forward_flops(0))
    assert attention == 32 * 32 * (1000 * 1000 / 2) * 2 * 2 * 128


def test_varlen_attention_repeats_grouped_keys_and_values():
    # q, k, v and the output in bf16 at full width, against k and v at their own and a second copy of the output.
    one, other = (LLAMA_8B.activation_bytes(bf16=True, varlen=varlen) for varlen in (True, False))
    assert one - other == 2 * 2 * (4096 - 1024) - 2 * 4096


def test_kv_cache_and_what_fits_into_it():
    held = cache(LLAMA, LLAMA_8B, Rates(gpu="h200", engine_reserve_gib=0))
    assert held.token_bytes == 32 * 2 * 8 * 128 * 2
    assert held.weight_bytes == 2 * LLAMA_8B.parameters
    room = 0.2 * 139.8 * GIB - 2 * LLAMA_8B.parameters
    assert held.sequences(2560) == int(room / held.token_bytes / 2560) == 41
    assert cache(replace(LLAMA, bf16=False), LLAMA_8B, Rates()).token_bytes == 2 * held.token_bytes


def amounts(recipe, shape=LLAMA_8B, gpu="h200"):
    return {(i.name, i.phases): i.amount for i in memory(recipe, shape, Rates(gpu=gpu))}


def test_full_training_holds_five_copies_of_the_weights():
    found = amounts(LLAMA)
    held = sum(v for (name, _), v in found.items() if name in ("policy", "M_0", "gradients", "AdamW moments"))
    assert held == 20 * LLAMA_8B.parameters
    assert found["AdamW temporary", ("optimizer",)] == 4 * LLAMA_8B.parameters
    assert ("AdamW temporary", ("optimizer",)) not in amounts(LLAMA, gpu="cpu")


@pytest.mark.parametrize(
    ("change", "copies"),
    [
        ({"reference_points": "zero"}, 0), ({"reference_points": "lagged"}, 0), ({"reference_points": "exact"}, 4),
        ({"reference_points": "mismatched", "train_batch_size": 128}, 4),
        ({"reference_points": "exact", "reference": "initial"}, 0), ({"prm": "somewhere"}, 4),
        ({"prm_trunk": "trained"}, 4), ({"prm_trunk": "policy"}, 0),
    ],
)  # fmt: skip
def test_further_copies_of_the_model(change, copies):
    """Bytes a parameter at the backward, beyond the plain recipe's."""
    plain, changed = (peak(memory(r, LLAMA_8B, Rates()))["backward"] for r in (LLAMA, replace(LLAMA, **change)))
    assert changed - plain == pytest.approx(copies * LLAMA_8B.parameters, abs=1)


def test_lora_trains_adapters_alone():
    recipe = replace(LLAMA, lora_rank=16)
    found, adapters = amounts(recipe), LLAMA_8B.adapter_parameters(16)
    assert found["gradients", UPDATE] == 4 * adapters
    assert found["AdamW moments", UPDATE] == 8 * adapters
    # No gradient of the head's weight.
    assert found["LM head", ("LM head",)] < amounts(LLAMA)["LM head", ("LM head",)] - 6 * LLAMA_8B.head_parameters + 1


def test_offline_training_has_no_engine_and_no_second_model():
    recipe = replace(LLAMA, label_source="dataset", labelled_dataset="rows.jsonl")
    found = plan(recipe, Rates())
    assert not {"vLLM", "M_0", "PRM features"} & {i.name for i in found.items}
    assert [p.name for p in found.parts] == ["log-probs", "update", "checkpoints", "models saved"]
    assert found.parts[1].note.startswith(f"{0.9 * 10_000 * (200 + 0.3 * 2048) / 1e6:.1f} M tokens")


@pytest.mark.parametrize("lora_rank", [0, 16])
def test_update_time_is_flops_over_the_stated_rate(lora_rank):
    rates = Rates(utilisation=0.5, kept_pairs=0.0, kept_blocks=0.0, launch_ms=0.0)
    recipe = replace(LLAMA, num_prompts=10, num_generations=10, train_batch_size=100, lora_rank=lora_rank)
    part = {p.name: p for p in plan(recipe, rates).parts}["update"]
    c = 0.3 * 2048
    adapters = LLAMA_8B.adapter_parameters(16) if lora_rank else 0
    forwards = 2 if lora_rank else 3  # frozen weights need no gradient
    trunk = forwards * (2 * LLAMA_8B.linear_parameters + 32 * 2 * 4096 * (200 + c)) + 6 * adapters
    head = c * 2 * 4096 * 128256  # with nothing to visit, the backward of the head is free
    adam = 80 * (adapters or LLAMA_8B.parameters) / (4.8e12 * 0.6)
    assert part.seconds == pytest.approx(100 * ((200 + c) * trunk + head) / (0.5 * 989e12) + adam)
    assert part.times == 3


def test_the_exact_head_costs_four_products():
    rates = Rates(kept_pairs=0.0, kept_blocks=0.0)
    recipe = replace(LLAMA, train_batch_size=8)
    routed, exact = (
        {p.name: p for p in plan(replace(recipe, filter_eps=e), rates).parts}["update"].seconds for e in (None, 0.0)
    )
    tokens = 500 * 8 * 0.3 * 2048
    assert exact - routed == pytest.approx(3 * 2 * tokens * LLAMA_8B.head_parameters / (0.3 * 989e12))


def test_decoding_reads_weights_and_cache():
    """Without launches or a compute limit a decoding step takes what the memory traffic takes."""
    rates = Rates(launch_ms=0.0, bf16_tflops=1e9, bandwidth_efficiency=1.0)
    found = plan(replace(LLAMA, num_prompts=41, num_generations=1), rates)
    together = min(41, found.held.sequences(200 + 0.3 * 2048))
    assert together == 41
    c = 0.3 * 2048
    step = (found.held.weight_bytes + 41 * (200 + c / 2) * found.held.token_bytes) / 4.8e12
    alone = (found.held.weight_bytes + (200 + c) * found.held.token_bytes) / 4.8e12
    rollouts = {p.name: p for p in found.parts}["rollouts"]
    assert rollouts.seconds == pytest.approx(c * step + (2048 - c) * alone, rel=1e-3)


def test_parts_follow_the_label_source():
    def names(**change):
        recipe = replace(LLAMA, **change)
        return {p.name for p in times(recipe, LLAMA_8B, Rates(), cache(recipe, LLAMA_8B, Rates()))}

    head = {"seed set", "seed labels", "PRM head", "head's labels"}
    assert head <= names()
    assert "seed labels" not in names(prm_labels="checker")
    assert names(label_source="monte_carlo") & {*head, "Monte-Carlo labels"} == {"Monte-Carlo labels"}
    assert {*head, "Monte-Carlo labels"} <= names(label_source="consensus")
    assert names(prm="a/head") & head == {"head's labels"}
    assert names(prm_dataset="math-shepherd") & head == {"PRM head", "head's labels"}
    audited = {"task": "arithmetic", "label_source": "checker"}
    assert names(**audited, prm_labels="checker") & head == {"seed set", "PRM head", "head's labels"}
    assert not names(**audited, prm_audit=False) & head
    assert not names(label_source="monte_carlo", prm_dataset="math-shepherd", prm_audit=False) & head


def test_how_often_and_how_much():
    rates = Rates(launch_ms=1000.0, max_sequences=8)  # every decoding step takes 32 s, whatever it does
    recipe = replace(LLAMA, label_source="monte_carlo", iterations=5)
    found = {p.name: p for p in plan(recipe, rates).parts}
    assert {name: p.times for name, p in found.items()} == {
        "evaluation": 6, "rollouts": 5, "Monte-Carlo labels": 5, "log-probs": 5, "update": 5, "checkpoints": 5,
        "models saved": 1,
    }  # fmt: skip
    count, length = 500 * 8 * 7 * 8, 0.3 * 2048 / 2
    labels = found["Monte-Carlo labels"]
    assert labels.note == f"{count:,} continuations of {length:.0f} tokens"
    steps = count / 8 * length + math.ceil(count / CHUNK) * (2048 - length)
    assert labels.seconds == pytest.approx(32 * steps, rel=1e-4)
    # 63 steps: two checkpoints of weights and moments at 1 GB/s.
    assert found["checkpoints"].seconds == pytest.approx(2 * 12 * LLAMA_8B.parameters / 1e9)
    assert found["models saved"].seconds == pytest.approx(7 * 4 * LLAMA_8B.parameters / 1e9)


def test_offline_log_probs_are_taken_of_all_and_twice_of_the_held_out():
    offline = replace(LLAMA, label_source="dataset", labelled_dataset="rows.jsonl")
    one, other = (
        {p.name: p for p in plan(r, Rates()).parts}["log-probs"].seconds
        for r in (offline, replace(LLAMA, num_prompts=1250))
    )
    assert one == pytest.approx(1.2 * other)


def test_more_of_everything_takes_longer():
    base = plan(LLAMA, Rates()).seconds
    for change in ({"iterations": 4}, {"num_prompts": 600}, {"num_train_epochs": 2}, {"mc_continuations": 16}):
        assert plan(replace(LLAMA, **change), Rates()).seconds > base, change
    assert plan(LLAMA, Rates(gpu="b300")).seconds < base < plan(LLAMA, Rates(gpu="a100")).seconds


def test_advice_makes_the_run_fit():
    cases = [
        (replace(LLAMA, lora_rank=16, max_tokens_per_micro_batch=32768), "h200", "max_tokens_per_micro_batch"),
        (LLAMA, "h200", "lora_rank"),
        (replace(LLAMA, engine="transformers"), "b300", "engine"),
        (replace(LLAMA, lora_rank=16, vllm_memory=0.5), "h200", "vllm_memory"),
    ]
    for recipe, gpu, key in cases:
        found = plan(recipe, Rates(gpu=gpu))
        assert found.complaint is not None
        said = advice(found)
        assert said is not None
        assert said.startswith("set ")
        assert key in said
        change = dict(pair.split(" to ") for pair in said.removeprefix("set ").split(" and "))
        mended = replace(recipe, **{k: type(getattr(recipe, k))(v) for k, v in change.items()})
        assert plan(mended, Rates(gpu=gpu)).complaint is None, said


@pytest.mark.parametrize("tokens", [32768, 32768 - 256])
def test_the_largest_micro_batch_that_fits_is_advised(tokens):
    recipe = replace(LLAMA, lora_rank=16, max_tokens_per_micro_batch=tokens)
    tokens = int(advice(plan(recipe, Rates())).split()[-1])
    for more, fits in ((0, True), (256, False)):
        mended = replace(recipe, max_tokens_per_micro_batch=tokens + more)
        assert (plan(mended, Rates()).complaint is None) == fits


def test_one_setting_alone_is_advised_where_one_is_enough():
    assert advice(plan(LLAMA, Rates(gpu="h200"))) == "set lora_rank to 16"


def test_advice_on_an_absurd_batch_does_not_try_every_size():
    recipe = replace(LLAMA, lora_rank=16, max_tokens_per_micro_batch=10**12)
    small = advice(plan(replace(recipe, max_tokens_per_micro_batch=10**5), Rates(gpu="h200")))
    assert small.startswith("set max_tokens_per_micro_batch to ")
    assert advice(plan(recipe, Rates(gpu="h200"))) == small


def test_rates_are_split_from_the_recipes_words():
    words = ["r.yaml", "--gpu", "h100", "--steps=4", "extra", "--beta", "0.2", "--memory-gib", "80"]
    assert planner.split_arguments(words) == (
        ["--gpu", "h100", "--steps=4", "--memory-gib", "80"], ["r.yaml", "extra", "--beta", "0.2"]
    )  # fmt: skip


def test_advice_says_when_nothing_helps():
    found = plan(LLAMA, Rates(gpu="l40s"))
    assert "no setting makes it fit" in advice(found)
    assert "does not fit" in "\n".join(summary(found))


def test_too_little_memory_for_the_engine():
    found = plan(replace(LLAMA, vllm_memory=0.12, lora_rank=16), Rates(gpu="h200"))
    assert "vllm_memory 0.12 leaves vLLM room for 0 tokens" in found.complaint
    share = float(advice(found).split()[-1])
    mended = replace(found.recipe, vllm_memory=share)
    assert plan(mended, found.rates).complaint is None
    assert plan(mended, found.rates).held.sequences(2560) >= 8


def test_shape_of_a_local_config(tmp_path):
    config = Qwen2Config(**SMALL, tie_word_embeddings=True)
    config.save_pretrained(tmp_path)
    assert shape_of(Recipe(model=str(tmp_path))) == ModelShape(64, 3, 4, 2, 16, 160, 96, tied=True, qkv_bias=True)


def test_models_that_cannot_be_planned(tmp_path):
    with pytest.raises(RunError, match="cannot read the config of model 'nobody/nothing'"):
        shape_of(Recipe(model="nobody/nothing"))
    Qwen3Config(**SMALL).save_pretrained(tmp_path)
    with pytest.raises(RunError, match="is a qwen3: plans are made for llama, mistral and qwen2 only"):
        shape_of(Recipe(model=str(tmp_path)))


def test_the_built_model_and_every_device():
    for gpu in DEVICES:
        found = plan(Recipe(), Rates(gpu=gpu))
        assert found.complaint is None
        assert 0 < found.seconds < 3600
        assert set(found.peaks) == set(PHASES)


def test_rates_are_overridable_and_checked():
    assert Rates(gpu="h100", memory_gib=94, bf16_tflops=800).device.memory_gib == 94
    assert Rates(gpu="h100", bf16_tflops=800).flops(bf16=True) == 800e12
    for key, value in (("utilisation", 0.0), ("kept_pairs", 2.0), ("steps", 0), ("disk_gb", 0.0), ("launch_ms", -1.0)):
        with pytest.raises(RunError, match=f"{key} is {value}"):
            Rates(**{key: value})


def test_how_many_sequences_vllm_decodes_together():
    assert [Rates(gpu=gpu).sequences for gpu in ("h200", "a100", "l40s", "cpu")] == [1024, 256, 256, 256]
    assert Rates(max_sequences=7).sequences == 7
    # Sixteen at a time take at least as long as a thousand.
    few, many = (plan(LLAMA, Rates(gpu="b300", max_sequences=n)).seconds for n in (16, 1000))
    assert few > 2 * many


def test_rates_and_recipes_share_no_key():
    assert not {f.name for f in fields(Rates)} & {f.name for f in fields(Recipe)}


def test_command_line(tmp_path, capsys):
    path = tmp_path / "r.yaml"
    path.write_text(
        "model: Qwen/Qwen2.5-1.5B\ntask: math\nprm_labels: monte_carlo\nbf16: true\nmax_tokens_per_micro_batch: 4096\n"
    )
    assert planner.main([str(path), "--gpu", "h100", "--utilisation=0.25", "--num_prompts", "10"]) == 0
    said = capsys.readouterr().out
    assert "Predicted from formulas and the rates below, not measured" in said
    assert "2400 completions of 19 tokens" in said  # of the seed set
    assert "│ utilisation          │ 0.25 " in said
    assert planner.main([str(path), "--gpu", "h100", "--memory_gib", "20"]) == 1
    assert "does not fit: " in capsys.readouterr().out
    assert planner.main([str(path), "--gpu", "tpu"]) == 1
    assert "invalid choice: 'tpu'" in capsys.readouterr().err
    assert planner.main([str(path), "--utilization", "0.2"]) == 1
    assert "unknown option --utilization" in capsys.readouterr().err


def test_a_plan_of_the_training_command_runs_nothing(tmp_path, capsys):
    from stepkto_fast.train import main

    folder = tmp_path / "run"
    assert main(["--plan", "--output_dir", str(folder), "--gpu", "cpu", "--memory_gib", "64"]) == 0
    assert "Predicted from formulas" in capsys.readouterr().out
    assert main(["--output_dir", str(folder), "--plan", "--gpu", "h100", "--memory_gib", "3"]) == 1
    assert not folder.exists()


def test_every_rate_is_printed_beside_the_result():
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    planner.print_plan(plan(LLAMA, Rates()), console)
    said = console.export_text()
    assert all(f.name in said and f.metadata["help"][:40] in said for f in fields(Rates))
    assert all(line in said for line in summary(plan(LLAMA, Rates())))


# ---- several ranks, and what makes room ----


def parts_of(recipe, **rates):
    return {p.name: p for p in plan(recipe, Rates(**rates)).parts}


def test_ranks_share_weights_gradients_moments_and_the_second_model():
    one, eight = (
        {(i.name, i.phases): i.amount for i in memory(LLAMA, LLAMA_8B, Rates(gpus=n, nodes=m))}
        for n, m in ((1, 1), (4, 2))
    )
    for name, phases in (("policy", PHASES), ("M_0", PHASES), ("gradients", UPDATE), ("AdamW moments", UPDATE)):
        assert eight[name, phases] == one[name, phases] / 8
    # Activations and each rank's own engine are not shared out, and nothing is copied: the gathered layers are in bf16.
    same = {"vLLM", "activations", "LM head", "PRM features"}
    assert all(eight[key] == amount for key, amount in one.items() if key[0] in same)
    assert not any(name == "bf16 copies" for name, _ in eight)
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    assert eight["gathered layers", ("PRM head", "log-probs", *PASSES)] == 2 * 2 * layer
    # In fp32 the head is gathered in fp32; in bf16 that is the copy that is counted anyway.
    whole = {i.name: i.amount for i in memory(replace(LLAMA, bf16=False), LLAMA_8B, Rates(gpus=8))}
    assert whole["gathered head"] == 4 * 128256 * 4096
    assert not any(name == "gathered head" for name, _ in eight)


def test_adapters_to_the_end_need_no_second_model():
    lora = replace(LLAMA, lora_rank=16)
    one, other = (amounts(replace(lora, lora_merge=when)) for when in ("iteration", "end"))
    assert ("M_0", PHASES) in one
    assert ("M_0", PHASES) not in other
    assert other["adapters", PHASES] == one["adapters", UPDATE] == 4 * LLAMA_8B.adapter_parameters(16)


def test_a_trained_head_beside_adapters():
    lora = replace(LLAMA, lora_rank=16)
    frozen, trained = (amounts(replace(lora, lora_train_head=on)) for on in (False, True))
    head = LLAMA_8B.head_parameters
    assert trained["AdamW moments", UPDATE] - frozen["AdamW moments", UPDATE] == 8 * head
    assert trained["LM head", ("LM head",)] - frozen["LM head", ("LM head",)] == 6 * head
    slower, faster = (parts_of(replace(lora, lora_train_head=on))["update"].seconds for on in (True, False))
    assert slower > faster


def test_where_the_engine_is():
    """Asleep it is gone from the update; behind a server or under Ray it is gone altogether."""

    def share(**change):
        return {i.phases for i in memory(replace(LLAMA, **change), LLAMA_8B, Rates()) if i.name == "vLLM"}

    assert share() == {PHASES}
    assert share(vllm_sleep=True) == {("sampling", "PRM head", "log-probs")}
    elsewhere = {"vllm_mode": "server", "vllm_server_url": "http://there:8000"}
    assert share(**elsewhere) == share(vllm_mode="ray") == set()
    # There it has 0.9 of a GPU for itself.
    room = 0.9 * 139.8 * GIB - 2 * LLAMA_8B.parameters - 3 * GIB
    assert cache(replace(LLAMA, **elsewhere), LLAMA_8B, Rates()).tokens == room / (32 * 2 * 8 * 128 * 2)


def test_engines_sample_a_part_each():
    rates = {"launch_ms": 1000.0, "max_sequences": 8, "completion_share": 1.0}  # 32 s a step, all of one length
    seconds = {
        name: parts_of(replace(LLAMA, **change), **rates, **more)["rollouts"].seconds
        for name, change, more in (
            ("one", {}, {}), ("four ranks", {}, {"gpus": 4}), ("ray", {"vllm_mode": "ray", "ray_engines": 4}, {}),
            ("server", {"vllm_mode": "server", "vllm_server_url": "http://there:1"}, {"gpus": 2, "server_gpus": 4}),
        )
    }  # fmt: skip
    for name in ("four ranks", "ray", "server"):
        assert seconds[name] == pytest.approx(seconds["one"] / 4, rel=0.01), name


def test_activation_checkpointing_costs_a_forward_and_keeps_inputs():
    rates = Rates(kept_pairs=0.0, kept_blocks=0.0, bandwidth_efficiency=1.0)
    plain, again = (plan(replace(LLAMA, gradient_checkpointing=on), rates) for on in (False, True))
    tokens = 500 * 8 * (200 + 0.3 * 2048)
    forward = tokens * LLAMA_8B.forward_flops(200 + 0.3 * 2048) / (0.3 * 989e12)
    one, other = ({p.name: p for p in found.parts}["update"].seconds for found in (plain, again))
    assert other - one == pytest.approx(forward)
    kept = {i.name: i.amount for i in again.items if i.phases == ("forward", "LM head")}["activations"]
    assert kept == 4096 * 4 * (32 + 3) * 4096
    assert again.peaks["backward"] < plain.peaks["backward"]


def test_what_ranks_send():
    """FSDP's bytes for Llama 8B over 8 ranks, by hand; one rank sends nothing."""
    sent = traffic(LLAMA, LLAMA_8B, Rates(gpus=8))
    layers, head, every = LLAMA_8B.linear_parameters, 128256 * 4096, LLAMA_8B.parameters
    assert sent.forward == pytest.approx(7 / 8 * (2 * layers + 2 * head + 4 * head))
    assert sent.backward == pytest.approx(7 / 8 * (2 * layers + 4 * every))
    assert sent.weights == pytest.approx(7 / 8 * 4 * every)
    lora = traffic(replace(LLAMA, lora_rank=16), LLAMA_8B, Rates(gpus=8))
    assert sent.backward - lora.backward == pytest.approx(7 / 8 * 4 * (every - LLAMA_8B.adapter_parameters(16)))
    assert traffic(LLAMA, LLAMA_8B, Rates()) == type(sent)(0, 0, 0)
    # A tied head's gradient is summed as the embeddings' and as the head's.
    tied, untied = (traffic(LLAMA, replace(QWEN_1_5B, tied=t), Rates(gpus=8)) for t in (True, False))
    assert tied.backward == pytest.approx(untied.backward)


def test_time_with_ranks_is_shared_work_and_what_is_sent():
    base = {"launch_ms": 0.0, "bandwidth_efficiency": 1.0}
    recipe = replace(LLAMA, train_batch_size=64, max_tokens_per_micro_batch=10**6)  # a micro-batch a step
    one = parts_of(recipe, **base)["update"].seconds
    eight = parts_of(recipe, gpus=8, overlap=1.0, **base)["update"].seconds
    assert eight == pytest.approx(one / 8)
    sent = traffic(recipe, LLAMA_8B, Rates(gpus=8))
    steps = round(500 * 8 / 64)
    exposed = parts_of(recipe, gpus=8, overlap=0.25, **base)["update"].seconds - eight
    assert exposed == pytest.approx(0.75 * steps * (sent.forward + sent.backward) / (0.7 * 450e9))
    # Two machines: eight network cards together carry less than NVLink does.
    assert Rates(gpus=8, nodes=2).collective == pytest.approx(0.7 * 400e9)
    assert Rates(gpus=8, nodes=2, network_gb=100).collective == pytest.approx(0.7 * 450e9)


def test_an_automatic_budget_is_chosen_before_the_rest():
    recipe = replace(LLAMA, lora_rank=16, max_tokens_per_micro_batch=0)
    found = plan(recipe, Rates())
    tokens = found.recipe.max_tokens_per_micro_batch
    assert tokens % 256 == 0
    assert found.complaint is None
    assert plan(replace(recipe, max_tokens_per_micro_batch=tokens + 256), Rates()).complaint is not None


def test_advice_knows_sleep_and_checkpointing():
    lora = replace(LLAMA, lora_rank=16)

    def said(length, **change):
        recipe = replace(lora, context_length=length, max_tokens_per_micro_batch=length, **change)
        return advice(plan(recipe, Rates()))

    assert said(8192) == "set vllm_sleep to true"
    assert said(8192, vllm_mode="ray") is None  # there is no engine on this GPU
    assert said(16384) == "set gradient_checkpointing to true"


def test_the_table_of_predictions_is_current():
    text = (Path(__file__).parent.parent / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert table() in text, "put the output of python -m stepkto_fast.scaling_page into docs/scaling.md"
    assert "does not fit" in table()
    assert text.count("Predicted, never measured") == 1


def test_ranks_are_named(capsys):
    assert planner.main(["--gpu", "h100", "--gpus", "8", "--nodes", "2"]) == 0
    said = capsys.readouterr().out
    assert "(16 x h100)" in said
    for key in ("gpus", "nodes", "server_gpus", "network_gb"):
        with pytest.raises(RunError, match=f"{key} is 0"):
            Rates(**{key: 0})
    with pytest.raises(RunError, match=r"overlap is 2\.0: give a share from 0 to 1"):
        Rates(overlap=2.0)
