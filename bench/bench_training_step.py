"""One training step of a small Llama as the engine does it: packing, trunk, linear_step_kto, backward, clipping, AdamW.

Freshly initialised, so that the head's distribution is flat and no backend may leave anything out. bf16 is the
engine's: autocast, with weights and optimizer in fp32. Prompts never reach the head. With `--goals` 8 completions of
256 tokens and a vocabulary of 32,000, else a quarter of that or less.
"""

import functools
import random
from typing import NamedTuple

import pytest
import torch
from stepkto_kernels import backend, backends
from transformers import LlamaConfig, LlamaForCausalLM

from stepkto_fast.attention import NAME
from stepkto_fast.objective import accumulate_gradients, class_weights
from stepkto_fast.recipe import Recipe
from stepkto_fast.rollout import Rollout


class Size(NamedTuple):
    hidden: int
    layers: int
    vocabulary: int
    completions: int
    tokens: int  # of each completion
    prompt: int = 64
    step: int = 32


SIZES = {"small": Size(64, 2, 4096, 4, 64), "goal": Size(256, 4, 32000, 8, 256)}
WHO = {"ours, reference": "reference", "ours, native": "native"}


def policy(size: Size) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=2 * size.hidden,
        num_hidden_layers=size.layers, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=size.prompt + size.tokens,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.set_attn_implementation(NAME)
    return model.train()


def batch(size: Size) -> list[Rollout]:
    rng = random.Random(0)
    ends = list(range(size.step, size.tokens + 1, size.step))
    return [
        Rollout(
            problem_id=n, sample=0, prompt="", completion="", logps=[], finished=True, label=n % 2 == 0,
            prompt_ids=rng.choices(range(size.vocabulary), k=size.prompt),
            completion_ids=rng.choices(range(size.vocabulary), k=size.tokens),
            step_ends=ends, step_labels=rng.choices((-1, 0, 1), k=len(ends)),
            ref_logps=[-torch.tensor(float(size.vocabulary)).log().item()] * size.tokens,
        )
        for n in range(size.completions)
    ]  # fmt: skip


def stepper(size: Size, dtype: str, name: str):
    """A call that takes one step on a model of its own and returns the loss before it."""
    model, rollouts = policy(size), batch(size)
    recipe = Recipe(bf16=dtype == "bf16")
    weights = class_weights(rollouts, recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)

    def step() -> float:
        with backend(name):
            loss = accumulate_gradients(model, rollouts, recipe, weights, (0.0, 0.0)).loss
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


@functools.cache
def first_losses(size: Size, dtype: str) -> list[float]:
    """Of two steps by the reference backend: the second one tells whether the gradients were right."""
    step = stepper(size, dtype, "reference")
    return [step(), step()]


def pytest_generate_tests(metafunc):
    name = "goal" if metafunc.config.getoption("--goals") else "small"
    found = [(name, dtype, who) for dtype in ("fp32", "bf16") for who in WHO]
    metafunc.parametrize(("size", "dtype", "who"), found, ids=[" - ".join(case) for case in found])


def test_training_step(benchmark, size, dtype, who):
    reason = backends.why_not("linear_step_kto", WHO[who])
    if reason:
        pytest.skip(f"{who}: {reason}")
    s = SIZES[size]
    step = stepper(s, dtype, WHO[who])
    losses = [step(), step()]
    assert losses == pytest.approx(first_losses(s, dtype), rel=2e-3 if dtype == "bf16" else 1e-4)
    benchmark.group = f"training step {size} {dtype}"
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
    benchmark.extra_info.update(shape=size, dtype=dtype, **s._asdict())
    if benchmark.stats is not None:  # None under --benchmark-disable
        tokens = s.completions * (s.prompt + s.tokens)
        benchmark.extra_info["tokens/s"] = round(tokens / benchmark.stats.stats.median)
