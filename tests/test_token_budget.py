"""Automatic token budgets, and what happens when memory runs out: real lack of it, and arranged."""

import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config

from stepkto_fast import objective, ranks, token_budget
from stepkto_fast.errors import RunError
from stepkto_fast.hardware import GIB, Rates
from stepkto_fast.model_shape import QWEN_1_5B
from stepkto_fast.objective import accumulate_gradients, class_weights
from stepkto_fast.plan_memory import memory, peak
from stepkto_fast.recipe import Recipe
from stepkto_fast.token_budget import (
    CHOSEN_FOR,
    STEP,
    TokenBudget,
    automatic_budget,
    automatic_tokens,
    free_memory,
    is_out_of_memory,
    with_retry,
)

CPU = torch.device("cpu")
QWEN = Recipe(model="Qwen/Qwen2.5-1.5B", task="math", bf16=True, context_length=2048, max_completion_length=1024)


def allocator_error() -> RuntimeError:
    """What torch really raises where memory runs out on a CPU."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    return caught.value


def most(recipe, rates):
    peaks = peak(memory(recipe, QWEN_1_5B, rates))
    return max(peaks[phase] for phase in CHOSEN_FOR)


@settings(max_examples=25, deadline=None)
@given(st.floats(40, 250), st.booleans(), st.booleans())
def test_the_largest_budget_that_fits(gib, checkpointing, sleeps):
    rates = Rates(gpu="h200", memory_gib=gib)
    recipe = replace(QWEN, gradient_checkpointing=checkpointing, vllm_sleep=sleeps)
    tokens = automatic_tokens(recipe, QWEN_1_5B, rates, rates.memory)
    largest = recipe.context_length * recipe.train_batch_size
    assert recipe.context_length <= tokens <= largest
    chosen, more = (most(replace(recipe, max_tokens_per_micro_batch=n), rates) for n in (tokens, tokens + STEP))
    assert chosen <= rates.memory or tokens == recipe.context_length
    assert more > rates.memory or tokens == largest
    assert tokens % STEP == 0


def test_what_is_in_memory_already_is_not_asked_for_twice():
    rates = Rates(gpu="h200")
    held = sum(i.amount for i in memory(QWEN, QWEN_1_5B, rates) if i.name in ("policy", "M_0", "vLLM"))
    fresh = automatic_tokens(QWEN, QWEN_1_5B, rates, rates.memory)
    assert automatic_tokens(QWEN, QWEN_1_5B, rates, rates.memory - held, token_budget.HELD) == fresh
    # An engine that sleeps gives its share back for the update, so that there is room for more.
    asleep = replace(QWEN, vllm_sleep=True)
    more = automatic_tokens(asleep, QWEN_1_5B, rates, rates.memory - held, token_budget.HELD)
    assert more == automatic_tokens(asleep, QWEN_1_5B, rates, rates.memory)
    assert more > fresh


def test_checkpointing_and_more_ranks_leave_room_for_more_tokens():
    tokens = [
        automatic_tokens(replace(QWEN, **change), QWEN_1_5B, Rates(gpu="h100", gpus=gpus), 79 * GIB)
        for change, gpus in (({}, 1), ({}, 8), ({"gradient_checkpointing": True}, 8))
    ]
    assert tokens == sorted(set(tokens))


def test_the_budget_of_this_machine(model, monkeypatch):
    recipe = Recipe(context_length=96, train_batch_size=64)
    assert automatic_budget(recipe, model, CPU) == 96 * 64 // STEP * STEP  # a tiny model: a whole batch fits
    monkeypatch.setattr(token_budget, "free_memory", lambda device: 0.0)
    assert automatic_budget(recipe, model, CPU) == 96
    # Of several ranks the one with least room decides.
    monkeypatch.setattr(token_budget.ranks, "gather", lambda value: [value, 7])
    assert automatic_budget(recipe, model, CPU) == 7
    with pytest.raises(RunError, match=r"max_tokens_per_micro_batch 0 asks the planner, .*qwen3.*: give a number"):
        automatic_budget(recipe, SimpleNamespace(config=Qwen3Config()), CPU)


def test_free_memory_of_a_machine_and_of_a_container(tmp_path, monkeypatch):
    assert 0 < free_memory(CPU) < 2**50
    assert token_budget._container_memory(tmp_path) == float("inf")
    (tmp_path / "memory.max").write_text("max\n")
    assert token_budget._container_memory(tmp_path) == float("inf")
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("600\n")
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 150\n")
    assert token_budget._container_memory(tmp_path) == 550
    monkeypatch.setattr(token_budget, "_available_memory", lambda: 800.0)
    monkeypatch.setattr(token_budget, "_container_memory", lambda: 900.0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory(CPU) == 200


def test_what_counts_as_out_of_memory():
    assert is_out_of_memory(allocator_error())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("sizes do not match"))
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator"))


def test_a_budget_is_halved_down_to_the_longest_completion():
    budget, error = TokenBudget(1000, longest=300), MemoryError()
    assert not budget.halve(RuntimeError("another"))
    assert [(budget.halve(error), budget.tokens) for _ in range(3)] == [(True, 500), (True, 300), (False, 300)]


def gradient(model, rollouts, recipe):
    """One optimizer batch's result and gradient, the budget that is left, and what was said of retries."""
    said: list[str] = []
    weights = class_weights(rollouts, recipe)
    budget = TokenBudget(recipe.max_tokens_per_micro_batch, max(len(r) for r in rollouts))
    result = with_retry(
        lambda tokens: accumulate_gradients(
            model, rollouts, replace(recipe, max_tokens_per_micro_batch=tokens), weights, (0.1, 0.1)
        ),
        budget, lambda: model.zero_grad(), said.append,
    )  # fmt: skip
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    return result, found, budget, said


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_step_that_ran_out_of_memory_is_repeated_with_the_same_result(model, rollouts, monkeypatch, nth):
    """Micro-batches before the fault have left their gradients: they must not count twice."""
    recipe = Recipe(max_tokens_per_micro_batch=400)
    model.train().double()
    want, expected, _, silent = gradient(model, rollouts, recipe)
    assert not silent
    real, calls = objective.linear_step_kto, []

    def faulty(*arguments, **options):
        calls.append(1)
        if len(calls) == nth:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore words")
        return real(*arguments, **options)

    monkeypatch.setattr(objective, "linear_step_kto", faulty)
    result, found, budget, said = gradient(model, rollouts, recipe)
    assert said == [
        "out of memory with 400 tokens in a micro-batch (CUDA out of memory. Tried to allocate 1 GiB): trying again "
        "with 200"
    ]
    assert budget.tokens == 200
    assert result.loss == pytest.approx(want.loss, rel=1e-12)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_nothing_left_to_halve():
    def action(tokens):
        raise MemoryError

    said: list[str] = []
    with pytest.raises(
        RunError, match=r"micro-batches of 50 tokens, and the longest completion has 50.*MemoryError.*set"
    ):
        with_retry(action, TokenBudget(100, 50), lambda: None, said.append)
    assert len(said) == 1


def test_other_errors_are_not_retried():
    def action(tokens):
        raise RuntimeError("sizes do not match")

    with pytest.raises(RuntimeError, match=r"sizes do not match"):
        with_retry(action, TokenBudget(100, 50), lambda: None, print)


def test_one_of_several_ranks_does_not_try_again(monkeypatch):
    monkeypatch.setattr(ranks, "size", lambda: 4)
    monkeypatch.setattr(ranks, "rank", lambda: 2)
    calls = []

    def action(tokens):
        calls.append(tokens)
        raise allocator_error()

    with pytest.raises(RunError, match=r"rank 2 ran out of memory .* lower --max_tokens_per_micro_batch"):
        with_retry(action, TokenBudget(100, 50), lambda: None, print)
    assert calls == [100]


REAL = """
import resource
import torch
from peak_memory import recipe_of, resident, rollout, shape
from stepkto_fast.attention import NAME
from test_token_budget import gradient
from transformers import LlamaForCausalLM

torch.set_num_threads(1)
torch.manual_seed(0)
model = LlamaForCausalLM(
    shape(hidden_size=64, layers=3, heads=2, kv_heads=2, inner=256, vocabulary=512)
).train()
model.set_attn_implementation(NAME)
batch = [rollout(512, 512, seed) for seed in range(16)]
recipe = recipe_of([512] * 16)
small = recipe_of([512] * 4)
want, expected, _, _ = gradient(model, batch, small)
room = resident("VmSize") + 100 * 2**20  # all 8,192 tokens take about 170 MB
resource.setrlimit(resource.RLIMIT_AS, (room, room))
result, found, budget, said = gradient(model, batch, recipe)
print(*said, sep="\\n")
assert said and budget.tokens < 8192
assert abs(result.loss - want.loss) < 1e-5 * abs(want.loss), (result.loss, want.loss)
for a, b in zip(found, expected):
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
print("same gradient")
"""


def test_a_process_whose_memory_really_runs_out(tmp_path):
    pytest.importorskip("resource", reason="limits of a process are set as on Unix")
    path = [str(p) for p in (os.path.dirname(__file__), *sys.path) if p]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", REAL], env=environment, capture_output=True, text=True, timeout=300, check=False,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "out of memory with 8192 tokens in a micro-batch" in done.stdout
    assert done.stdout.endswith("same gradient\n")
