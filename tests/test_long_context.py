"""Sequences of 32,768 tokens, activation checkpointing, and the planner's memory against a process that does it."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import peak_memory
import pytest
import torch

from stepkto_fast.adapters import add_adapters
from stepkto_fast.checkpointing import checkpoint_activations
from stepkto_fast.errors import RunError
from stepkto_fast.hardware import Rates
from stepkto_fast.model_shape import shape_of_config
from stepkto_fast.objective import accumulate_gradients, class_weights, log_probs
from stepkto_fast.plan_memory import PASSES, memory
from stepkto_fast.recipe import Recipe

SCRIPT = Path(peak_memory.__file__)
SHAPE = {"hidden_size": 64, "layers": 2, "heads": 1, "kv_heads": 1, "inner": 128, "vocabulary": 1024}
SMALL = SHAPE | {"hidden_size": 32, "layers": 1, "inner": 96}
ALWAYS = ("policy", "reserve", "gradients", "AdamW moments", "adapters")  # there before the micro-batch comes


def predicted(model_shape: dict, lengths: list[int], settings: dict) -> float:
    """Bytes that the planner expects of the micro-batch, at its height."""
    recipe, shape = peak_memory.recipe_of(lengths, **settings), peak_memory.shape(**model_shape)
    items = memory(recipe, shape_of_config(shape, "measured"), Rates(gpu="cpu"))
    return max(sum(i.amount for i in items if phase in i.phases and i.name not in ALWAYS) for phase in PASSES)


def measured(asked: list[tuple]) -> list[dict]:
    """The same of a process, for each of `asked` in turn."""
    words = json.dumps([dict(zip(("shape", "lengths", "settings"), each, strict=True)) for each in asked])
    # glibc gives freed blocks above the threshold back at once, so that what is resident is what is in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), words], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of resident memory are read as on Linux")
def test_32768_tokens_train_in_the_memory_that_the_planner_says():
    """One sequence, and eight that add up to it, with and without activation checkpointing, within 15 %."""
    asked = [
        (SMALL, [32768], {"gradient_checkpointing": True}),
        (SHAPE, [4096] * 8, {"gradient_checkpointing": False}),
        (SHAPE, [4096] * 8, {"gradient_checkpointing": True}),
    ]
    _, plain, checkpointed = found = measured(asked)
    for each, result in zip(asked, found, strict=True):
        assert math.isfinite(result["loss"])
        assert result["norm"] > 0
        assert predicted(*each) == pytest.approx(result["bytes"], rel=0.15), each
    assert (plain["loss"], plain["norm"]) == (checkpointed["loss"], checkpointed["norm"])
    assert checkpointed["bytes"] < 0.7 * plain["bytes"]


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("bf16", [False, True])
def test_checkpointed_gradients_are_the_same_to_the_bit(model, rollouts, bf16, lora_rank):
    if lora_rank:
        pytest.importorskip("peft", reason="peft is not installed")
    recipe = Recipe(bf16=bf16, lora_rank=lora_rank, max_tokens_per_micro_batch=300)
    add_adapters(model, recipe, seed=0)
    weights = class_weights(rollouts, recipe)
    model.train()
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_activations(model)
        result = accumulate_gradients(model, rollouts, recipe, weights, (0.1, 0.1))
        found.append((result.loss, [p.grad for p in model.parameters() if p.requires_grad]))
        model.zero_grad()
    (loss, gradients), (other, others) = found
    assert loss == other
    assert gradients
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))


def test_only_a_training_forward_is_checkpointed(model, rollouts):
    """Layers run twice in an update and once elsewhere; log-probs keep their bits."""
    calls = []
    model.get_decoder().layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    recipe = Recipe(max_tokens_per_micro_batch=1 << 16)
    before = log_probs(model, rollouts, recipe)
    checkpoint_activations(model)
    after = log_probs(model, rollouts, recipe)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert len(calls) == 2
    model.train()
    accumulate_gradients(model, rollouts, recipe, class_weights(rollouts, recipe), (0.0, 0.0))
    assert len(calls) == 4
    # The embeddings' output needs no gradient of its own: with adapters nothing below them is trained.
    assert not model.get_input_embeddings()._forward_hooks


def test_a_model_that_cannot_be_checkpointed(model, monkeypatch):
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(RunError, match=r"does not support gradient checkpointing\. Set it to false"):
        checkpoint_activations(model)
