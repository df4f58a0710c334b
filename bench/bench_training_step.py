"""One training step of a small Llama as the engine does it: packing, trunk, linear_step_kto, backward, clipping, AdamW.

A policy that is fine-tuned knows its language. Minutes of training would give one; here one is planted: some tokens
anywhere in the vocabulary, with orthogonal embeddings, of which each has eight successors with probabilities as 1/k^2;
the head's rows are the sums of the directions that lead to them, so the trunk's residual stream does the rest.
Completions follow it. The rho of its routed backward is in the figures. "flat" is the bare initialisation, where no
backend may leave anything out.

bf16 is the engine's: autocast, with weights and optimizer in fp32. fp32 is timed exact, its default, and with the
filter_eps of 16 bits. Prompts never reach the head. With `--goals` 8 completions of 256 tokens and a vocabulary of
32,000, else a quarter of that or less.
"""

import functools
import math
import random
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from stepkto_kernels import backend, backends, watch
from transformers import LlamaConfig, LlamaForCausalLM

from stepkto_fast.attention import NAME
from stepkto_fast.objective import accumulate_gradients, class_weights, log_probs
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
PLANTED, FLAT = "planted", "flat"
CASES = [  # inputs, dtype, filter_eps
    (PLANTED, "bf16", None),
    (PLANTED, "fp32", 2.0**-9),
    (PLANTED, "fp32", None),
    (FLAT, "bf16", None),
    (FLAT, "fp32", None),
]
SUCCESSORS = 8
PEAK = 20.0  # the likeliest successor's logit; 32,000 others around 0 weigh as much as one of 10
LEARNING_RATE = 1e-7  # every step then does the same work: a policy that moves on leaves tokens without a coefficient


def language(size: Size) -> tuple[torch.Tensor, torch.Tensor]:
    """(W,) its words, as token ids; (W, SUCCESSORS) the places of each one's successors in that list."""
    generator = torch.Generator().manual_seed(1)
    count = size.hidden // 2
    words = torch.randperm(size.vocabulary, generator=generator)[:count]
    return words, torch.rand(count, count, generator=generator).argsort(1)[:, :SUCCESSORS]


@torch.no_grad()
def plant(model: LlamaForCausalLM, size: Size) -> None:
    words, following = language(size)
    directions = torch.linalg.qr(torch.randn(size.hidden, len(words)))[0].T
    # as long as unit normal ones: what random layers add is less
    model.model.embed_tokens.weight[words] = math.sqrt(size.hidden) * directions
    for k in range(SUCCESSORS):
        height = (PEAK - 2 * math.log(k + 1)) / math.sqrt(size.hidden)
        model.lm_head.weight.index_add_(0, words[following[:, k]], height * directions)


def policy(size: Size, inputs: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=2 * size.hidden,
        num_hidden_layers=size.layers, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=size.prompt + size.tokens,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.set_attn_implementation(NAME)
    if inputs == PLANTED:
        plant(model, size)
    return model.train()


def walk(size: Size, rng: random.Random) -> list[int]:
    """A prompt and its completion, in the planted language."""
    words, following = language(size)
    weights = [1 / (k + 1) ** 2 for k in range(SUCCESSORS)]
    place, found = rng.randrange(len(words)), []
    for _ in range(size.prompt + size.tokens):
        found.append(int(words[place]))
        place = int(following[place, rng.choices(range(SUCCESSORS), weights)[0]])
    return found


def batch(size: Size) -> list[Rollout]:
    rng = random.Random(0)
    walks = [walk(size, rng) for _ in range(size.completions)]
    ends = list(range(size.step, size.tokens + 1, size.step))
    return [
        Rollout(
            problem_id=n, sample=0, prompt="", completion="", logps=[], finished=True, label=n % 2 == 0,
            prompt_ids=walks[n][: size.prompt], completion_ids=walks[n][size.prompt :],
            step_ends=ends, step_labels=rng.choices((-1, 0, 1), k=len(ends)), ref_logps=[],
        )
        for n in range(size.completions)
    ]  # fmt: skip


def stepper(size: Size, inputs: str, dtype: str, filter_eps: float | None, name: str):
    """A call that takes one step on a model of its own and returns the loss and the gradient's norm before it."""
    model, rollouts = policy(size, inputs), batch(size)
    recipe = Recipe(bf16=dtype == "bf16", filter_eps=filter_eps, learning_rate=LEARNING_RATE)
    with torch.no_grad():  # its own reference: every token's coefficient is at its largest
        rollouts = [
            replace(r, ref_logps=logps.tolist())
            for r, logps in zip(rollouts, log_probs(model, rollouts, recipe), strict=True)
        ]
    weights = class_weights(rollouts, recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)

    def step() -> list[float]:
        with backend(name):
            loss = accumulate_gradients(model, rollouts, recipe, weights, (0.0, 0.0)).loss
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return [loss, float(norm)]

    return step


@functools.cache
def expected(size: Size, inputs: str, dtype: str) -> list[float]:
    """Loss and gradient's norm of a first step by the reference backend."""
    return stepper(size, inputs, dtype, None, "reference")()


def pytest_generate_tests(metafunc):
    name = "goal" if metafunc.config.getoption("--goals") else "small"
    found = [(name, *case, who) for case in CASES for who in WHO]
    labels = [" - ".join([size, *map(str, rest)]) for size, *rest in found]
    metafunc.parametrize(("size", "inputs", "dtype", "filter_eps", "who"), found, ids=labels)


def test_training_step(benchmark, size, inputs, dtype, filter_eps, who):
    reason = backends.why_not("linear_step_kto", WHO[who])
    if reason:
        pytest.skip(f"{who}: {reason}")
    s = SIZES[size]
    step = stepper(s, inputs, dtype, filter_eps, WHO[who])
    with watch() as calls:
        found = step()
    rounding = 1e-2 if dtype == "bf16" else 1e-4
    assert found == pytest.approx(expected(s, inputs, dtype), rel=rounding + 5 * (filter_eps or 0))
    way = "filter_eps auto" if filter_eps is None else f"filter_eps {filter_eps:.3g}"
    benchmark.group = f"training step {size} {dtype}, {inputs}, {way}"
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
    benchmark.extra_info.update(shape=size, dtype=dtype, inputs=inputs, way=way, **s._asdict())
    if calls:
        benchmark.extra_info.update(rho=round(calls[0].rho, 4), path=calls[0].path)
    if benchmark.stats is not None:  # None under --benchmark-disable
        tokens = s.completions * (s.prompt + s.tokens)
        benchmark.extra_info["tokens/s"] = round(tokens / benchmark.stats.stats.median)
