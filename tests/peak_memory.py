"""How much a process grows by a gradient, for test_long_context.py: `python peak_memory.py '[{...}, ...]'`.

Of each measurement, one after the other: bytes of growth, loss and gradient norm, as a line of JSON. By hand:
MALLOC_MMAP_THRESHOLD_=65536 python tests/peak_memory.py '[{"hidden_size": 128, ...}]'
"""

import json
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stepkto_fast.adapters import add_adapters
from stepkto_fast.attention import NAME
from stepkto_fast.checkpointing import checkpoint_activations
from stepkto_fast.objective import accumulate_gradients
from stepkto_fast.recipe import Recipe
from stepkto_fast.rollout import Rollout

PROMPT = 64


def shape(*, hidden_size: int, layers: int, heads: int, kv_heads: int, inner: int, vocabulary: int) -> LlamaConfig:
    """The Llama that is measured."""
    return LlamaConfig(
        hidden_size=hidden_size, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=inner, vocab_size=vocabulary, max_position_embeddings=32768,
    )  # fmt: skip


def recipe_of(lengths: list[int], **settings) -> Recipe:
    """All in one micro-batch; no engine and no second model are in this process."""
    return Recipe(
        label_source="dataset", labelled_dataset="none", context_length=max(lengths),
        max_tokens_per_micro_batch=sum(lengths), beta=1e-4, step_beta=1e-4, **settings,  # far from saturation
    )  # fmt: skip


def rollout(length: int, vocabulary: int, seed: int) -> Rollout:
    """One prompt and one step of random tokens."""
    ids = torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    n = length - PROMPT
    return Rollout(
        seed, 0, "", ids[:PROMPT], "", ids[PROMPT:], [], True, [""], [n], label=seed % 2 == 0,
        step_labels=[1 - seed % 2], ref_logps=[-6.0] * n,
    )  # fmt: skip


def resident(key: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (at most)."""
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return 1024 * int(rows[key].split()[0])


def measure(model_shape: dict, lengths: list[int], settings: dict) -> dict:
    """The growth from behind a tiny batch, whose gradients stay, to the height of a batch of `lengths`."""
    torch.manual_seed(0)
    config, recipe = shape(**model_shape), recipe_of(lengths, **settings)
    model = LlamaForCausalLM(config)
    model.set_attn_implementation(NAME)
    add_adapters(model, recipe, seed=0)
    if recipe.gradient_checkpointing:
        checkpoint_activations(model)
    model.train()
    names = ("desirable_weight", "undesirable_weight", "step_desirable_weight", "step_undesirable_weight")
    weights, vocabulary = dict.fromkeys(names, 1.0), config.vocab_size
    batch = [rollout(length, vocabulary, seed) for seed, length in enumerate(lengths)]
    accumulate_gradients(model, [rollout(2 * PROMPT, vocabulary, 99)], recipe, weights, (0.0, 0.0))
    for p in model.parameters():
        if p.grad is not None:
            p.grad.zero_()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts anew
    result = accumulate_gradients(model, batch, recipe, weights, (0.0, 0.0))
    grown = resident("VmHWM") - before
    norm = float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())
    return {"bytes": grown, "loss": result.loss, "norm": norm}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for asked in json.loads(sys.argv[1]):
        print(json.dumps(measure(asked["shape"], asked["lengths"], asked["settings"])), flush=True)
