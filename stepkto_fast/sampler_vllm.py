"""Rollouts by vLLM in this process: weights are handed over in memory, log-probs come back with the tokens."""

import contextlib
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from .recipe import Recipe
from .sampler import Sample, no_progress, token_limits

# Read when vllm is imported: one process (so that weights can be handed over), no network, no chatter.
for _name, _value in {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}.items():
    os.environ.setdefault(_name, _value)

import vllm  # noqa: E402  (the variables above must be set first)
from tqdm import tqdm  # noqa: E402


def _relay(on_progress: Callable[[int, int], None]) -> type[tqdm]:
    """A bar that draws nothing and passes the count of finished samples on: the only progress vLLM reports."""

    class Relay(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "file": io.StringIO()})

        def update(self, n: float = 1) -> bool | None:
            changed = super().update(n)
            on_progress(int(self.n), int(self.total))
            return changed

    return Relay


class VLLMSampler:
    """A vLLM engine inside the trainer's process."""

    name = "vllm"

    def __init__(
        self, recipe: Recipe, directory: Path, context_length: int, eos_token_id: int, *, prefix_caching: bool = False
    ):
        """Starts the engine on the model in `directory` (any weights: `sync` brings the real ones).

        `prefix_caching` lets the prompts of one `sample` call share the work on what they begin with.
        """
        threads = torch.get_num_threads()
        self._eos, self._prefix_caching = eos_token_id, prefix_caching
        self._llm = vllm.LLM(
            model=str(directory),
            max_model_len=context_length,
            dtype="bfloat16" if recipe.bf16 else "float32",
            hf_overrides={"head_dtype": "float32"},  # the trainer never rounds logits to 16 bits either
            seed=recipe.seed,
            skip_tokenizer_init=True,
            trust_remote_code=False,
            enforce_eager=True,
            enable_prefix_caching=prefix_caching,
            # On a CPU vLLM caches blocks of 128 tokens if not told otherwise: longer than most prompts and steps.
            block_size=32 if prefix_caching and not torch.cuda.is_available() else None,
            logprobs_mode="processed_logprobs",
            gpu_memory_utilization=recipe.vllm_memory,
            disable_log_stats=True,
        )
        torch.set_num_threads(threads)

    def sync(self, model: PreTrainedModel) -> None:
        """Hands the policy's weights to the engine, in memory."""
        named = [(name, tensor.detach()) for name, tensor in model.state_dict().items()]
        with open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet):
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(named)})
        self._llm.reset_prefix_cache()

    def sample(
        self,
        prompts: Sequence[list[int]],
        *,
        n: int,
        temperature: float,
        max_tokens: int | Sequence[int],
        seed: int,
        on_progress: Callable[[int, int], None] = no_progress,
    ) -> list[list[Sample]]:
        parameters = [
            vllm.SamplingParams(
                n=n, temperature=temperature, max_tokens=limit, detokenize=False,
                stop_token_ids=[self._eos], logprobs=None if temperature == 0 else 0,
            )
            for limit in token_limits(max_tokens, len(prompts))
        ]  # fmt: skip
        # A sample's last bits must not depend on what earlier calls left in the cache.
        if self._prefix_caching and not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: it takes requests to be still running")
        # In one process vLLM draws from torch's global generator; a generator for each request would be far slower.
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            outputs = self._llm.generate(
                [{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=_relay(on_progress)
            )
        return [
            [
                Sample(
                    token_ids=list(c.token_ids),
                    logps=[entry[t].logprob for t, entry in zip(c.token_ids, c.logprobs or [], strict=False)],
                    finished=c.finish_reason == "stop",
                )
                for c in output.outputs
            ]
            for output in outputs
        ]
