"""Tokens of a micro-batch: as many as the planner fits into what is free, and half as many when memory runs out.

How a batch is cut into micro-batches changes neither its loss nor its gradient but by rounding, so a step that ran out
of memory is repeated with smaller ones.
"""

import os
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from . import ranks
from .errors import RunError
from .hardware import GIB, Rates
from .model_shape import ModelShape, shape_of_config
from .plan_memory import PASSES, Item, memory
from .recipe import Recipe

T = TypeVar("T")
STEP = 256  # automatic budgets are multiples of it
HELD = ("policy", "M_0", "vLLM")  # what is in memory when a budget is chosen
CHOSEN_FOR = ("log-probs", *PASSES)  # the phases in which micro-batches are in memory


def automatic_tokens(recipe: Recipe, shape: ModelShape, rates: Rates, free: float, held: tuple[str, ...] = ()) -> int:
    """Trunk tokens of the largest micro-batch for which the planner's phases fit into `free` bytes of each device.

    A multiple of 256 between `context_length` (returned where not even that fits) and what a whole optimizer batch can
    have. `held`: names of the planner's items that are there already and not part of `free`; an engine that sleeps
    during the update gives its own back.
    """
    least, most = recipe.context_length, recipe.context_length * recipe.train_batch_size

    def fits(tokens: int) -> bool:
        items = memory(replace(recipe, max_tokens_per_micro_batch=tokens), shape, rates)
        back = sum(i.amount for i in items if i.name == "vLLM") if "vLLM" in held else 0.0
        return all(_needed(items, phase, held) <= free + back * _asleep(items, phase) for phase in CHOSEN_FOR)

    sizes = range(least // STEP * STEP + STEP, most + 1, STEP)
    # More tokens never take less memory.
    fitting = bisect_left(sizes, True, key=lambda tokens: not fits(tokens))
    return sizes[fitting - 1] if fitting else least


def _needed(items: list[Item], phase: str, held: tuple[str, ...]) -> float:
    return sum(item.amount for item in items if phase in item.phases and item.name not in held)


def _asleep(items: list[Item], phase: str) -> bool:
    return not any(item.name == "vLLM" and phase in item.phases for item in items)


def automatic_budget(recipe: Recipe, model: PreTrainedModel, device: torch.device) -> int:
    """What `max_tokens_per_micro_batch: 0` stands for on `device` (the same on every rank: the smallest of theirs).

    To be called when policy, M_0 and the engine are in memory, and gradients and moments are not. RunError for an
    architecture that the planner does not know.
    """
    try:
        shape = shape_of_config(model.config, recipe.model or "built here")
    except RunError as error:
        raise RunError(f"max_tokens_per_micro_batch 0 asks the planner, but {error}: give a number") from error
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        rates = Rates(memory_gib=total / GIB, gpus=ranks.size())
    else:
        rates = Rates(gpu="cpu", gpus=ranks.size())
    return min(ranks.gather(automatic_tokens(recipe, shape, rates, free_memory(device), HELD)))


def free_memory(device: torch.device) -> float:
    """Bytes that this process can still take: of the GPU, or its part of the machine's memory (its container's)."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(_available_memory(), _container_memory()) / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _available_memory() -> float:
    found = Path("/proc/meminfo")
    if found.is_file():
        rows = dict(line.split(":", 1) for line in found.read_text(encoding="ascii").splitlines())
        return 1024.0 * int(rows["MemAvailable"].split()[0])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2  # no Linux: half of what there is


def _container_memory(folder: Path = Path("/sys/fs/cgroup")) -> float:
    """What a control group (version 2) leaves; infinity where none limits."""
    limit = folder / "memory.max"
    if not limit.is_file() or (text := limit.read_text(encoding="ascii").strip()) == "max":
        return float("inf")
    used = int((folder / "memory.current").read_text(encoding="ascii"))
    rows = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    return float(int(text) - used + int(rows["inactive_file"]))  # cached files make room


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is a device's or the CPU allocator's lack of memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in text or "bad_alloc" in text)


@dataclass
class TokenBudget:
    """tokens: trunk tokens of a micro-batch. longest: of one completion with its prompt, which is never cut."""

    tokens: int
    longest: int

    def halve(self, error: BaseException) -> bool:
        """Halves `tokens`, to `longest` at least; False where `error` is no lack of memory, or nothing is left to
        halve."""
        if not is_out_of_memory(error) or self.tokens <= self.longest:
            return False
        self.tokens = max(self.longest, self.tokens // 2)
        return True


def with_retry(
    action: Callable[[int], T], budget: TokenBudget, reset: Callable[[], None], say: Callable[[str], None]
) -> T:
    """`action(budget.tokens)`, again with half the tokens as often as memory runs out. The budget stays halved.

    `reset` undoes what an unfinished action left (gradients), `say` is told of each retry. Raises RunError with the
    remedies when the longest completion alone is too much, or when there are other ranks: they wait in a collective.
    """
    while True:
        tried = budget.tokens
        try:
            return action(tried)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            if ranks.size() > 1:
                raise RunError(
                    f"rank {ranks.rank()} ran out of memory with micro-batches of {tried} tokens ({reason}): continue "
                    f"with --resume true and a lower --max_tokens_per_micro_batch, or --gradient_checkpointing true"
                ) from error
            if not budget.halve(error):
                raise RunError(
                    f"memory ran out with micro-batches of {tried} tokens, and the longest completion has "
                    f"{budget.longest} ({reason}): set gradient_checkpointing to true or lora_rank to 16, lower "
                    "vllm_memory or context_length, or take more GPUs"
                ) from error
        # Out here the error and its frames are gone, and with them the tensors that they held.
        reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        say(f"out of memory with {tried} tokens in a micro-batch ({reason}): trying again with {budget.tokens}")
