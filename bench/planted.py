"""A small Llama with a planted language, and rollouts of it.

A policy that is fine-tuned knows its language. Minutes of training would give one; here one is planted: some tokens
anywhere in the vocabulary, with orthogonal embeddings, of which each has eight successors with probabilities as 1/k^2,
or the end; the head's rows are the sums of the directions that lead to them, so the trunk's residual stream does the
rest. Prompts and completions follow it. The reference is the policy with a disturbed head, so that log-ratios are some
nats and no loss is trivial.
"""

import math
import random
from dataclasses import replace
from functools import cache
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from stepkto_fast.attention import NAME as PACKED
from stepkto_fast.rollout import Rollout


class Size(NamedTuple):
    hidden: int
    layers: int
    vocabulary: int
    problems: int
    samples: int  # completions of each problem
    prompt: int  # mean tokens
    completion: int
    step: int
    per_device: int  # completions of TRL's micro-batch: of 2, 4 and 8 the fastest, with the least padding
    generated: int  # most tokens of a sampled completion


SIZES = {
    "quick": Size(64, 2, 4096, 2, 2, 24, 64, 16, per_device=2, generated=32),
    "goal": Size(256, 4, 32000, 4, 2, 64, 256, 32, per_device=2, generated=128),
}
PAD, END, SPECIAL = 0, 1, 3  # token ids: padding, end of sequence, the first that is a word
SUCCESSORS = 8
PEAK = 20.0  # the likeliest successor's logit; 32,000 others around 0 weigh as much as one of 10
DISTURBANCE = 0.2  # of the reference's logits
SPREAD = 0.5  # standard deviation of a completion's log length


@cache
def language(size: Size) -> tuple[Tensor, Tensor]:
    """(W,) its words, as token ids; (W, SUCCESSORS) the places of each one's successors in that list."""
    generator = torch.Generator().manual_seed(1)
    count = size.hidden // 2
    words = SPECIAL + torch.randperm(size.vocabulary - SPECIAL, generator=generator)[:count]
    return words, torch.rand(count, count, generator=generator).argsort(1)[:, :SUCCESSORS]


@torch.no_grad()
def plant(model: LlamaForCausalLM, size: Size) -> None:
    words, following = language(size)
    directions = torch.linalg.qr(torch.randn(size.hidden, len(words)))[0].T
    # as long as unit normal ones: what random layers add is less
    model.model.embed_tokens.weight[words] = math.sqrt(size.hidden) * directions
    weight = model.lm_head.weight
    for k in range(SUCCESSORS):
        height = (PEAK - 2 * math.log(k + 1)) / math.sqrt(size.hidden)
        weight.index_add_(0, words[following[:, k]], height * directions)
    total = math.log(sum(1 / (k + 1) ** 2 for k in range(SUCCESSORS)))
    weight[END] = (PEAK + total - math.log(size.completion)) / math.sqrt(size.hidden) * directions.sum(0)


def policy(size: Size) -> LlamaForCausalLM:
    torch.manual_seed(0)
    heads = max(2, size.hidden // 64)
    config = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=2 * size.hidden,
        num_hidden_layers=size.layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=2 * (size.prompt + size.completion), bos_token_id=None, eos_token_id=END,
        pad_token_id=PAD,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    plant(model, size)
    model.set_attn_implementation(PACKED)
    return model.train()


@torch.no_grad()
def reference(size: Size) -> LlamaForCausalLM:
    model = policy(size).requires_grad_(False)
    noise = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(2))
    model.lm_head.weight += DISTURBANCE / math.sqrt(size.hidden) * noise
    return model.eval()


def walk(size: Size, rng: random.Random, length: int, after: int | None = None) -> list[int]:
    """`length` tokens of the language, behind the word `after`."""
    words, following = language(size)
    weights = [1 / (k + 1) ** 2 for k in range(SUCCESSORS)]
    places = {int(word): n for n, word in enumerate(words)}
    place, found = rng.randrange(len(words)) if after is None else places[after], []
    for n in range(length):
        if n or after is not None:
            place = int(following[place, rng.choices(range(SUCCESSORS), weights)[0]])
        found.append(int(words[place]))
    return found


def step_ends(size: Size, rng: random.Random, length: int) -> list[int]:
    ends = [0]
    while length - ends[-1] > 1.5 * size.step:
        ends.append(ends[-1] + rng.randint(3 * size.step // 4, 5 * size.step // 4))
    return [*ends[1:], length]


def prompts(size: Size) -> list[list[int]]:
    rng = random.Random("prompts")
    lengths = [rng.randint(3 * size.prompt // 4, 5 * size.prompt // 4) for _ in range(size.problems)]
    return [walk(size, rng, length) for length in lengths]


def batch(size: Size) -> list[Rollout]:
    """Completions with log-normal lengths, as those of mathematics have. Neighbours answer different prompts, so that
    TRL's rotation by one mismatches every pair."""
    rng = random.Random("completions")
    asked, count, found = prompts(size), size.problems * size.samples, []
    labels = rng.sample([n % 2 == 0 for n in range(count)], count)
    # quantiles, not draws: of eight the longest, and with it the padding, would be a matter of luck
    middle = size.completion * math.exp(-(SPREAD**2) / 2)
    lengths = [int(middle * math.exp(SPREAD * NormalDist().inv_cdf((n + 0.5) / count))) for n in range(count)]
    rng.shuffle(lengths)
    for n in range(count):
        prompt = asked[n % size.problems]
        length = lengths[n]
        ends = step_ends(size, rng, length)
        rollout = Rollout(
            problem_id=n % size.problems, sample=n // size.problems, prompt="", completion="", logps=[], finished=True,
            label=labels[n], prompt_ids=prompt, completion_ids=[*walk(size, rng, length - 1, prompt[-1]), END],
            step_ends=ends, step_labels=rng.choices((-1, 0, 1), k=len(ends)),
        )  # fmt: skip
        found.append(rollout)
    return found


def rotated(rollouts: list[Rollout]) -> list[Rollout]:
    """TRL's mismatched pairs: each prompt with the completion before it."""
    return [
        replace(other, prompt_ids=r.prompt_ids, problem_id=r.problem_id, ref_logps=[])
        for r, other in zip(rollouts, [rollouts[-1], *rollouts[:-1]], strict=True)
    ]


def count_tokens(rollouts: list[Rollout]) -> int:
    """Prompt and completion tokens, without padding, each once: what both sides' speeds are about."""
    return sum(len(r) for r in rollouts)
