"""Rollouts by transformers' generate, where vLLM is not installed: slower, the same interface."""

from collections.abc import Callable, Sequence

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from .attention import NAME
from .sampler import Sample, no_progress, token_limits

BATCH = 256  # rows generated together; all wait for the longest


class PreallocatedLayer(DynamicLayer):
    """The keys and values of one layer, (rows, heads, tokens, head_dim), written in place.

    transformers' own layer copies all of them for each new token.
    """

    def __init__(self, capacity: int):
        super().__init__()
        self._capacity = capacity

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._whole = [x.new_empty(*x.shape[:-2], self._capacity, x.shape[-1]) for x in (key_states, value_states)]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        for whole, new in zip(self._whole, (key_states, value_states), strict=True):
            whole[..., start:end, :] = new
        self.keys, self.values = (whole[..., :end, :] for whole in self._whole)
        return self.keys, self.values


def cache_of(model: PreTrainedModel, capacity: int) -> DynamicCache:
    """A cache for `capacity` tokens a row. Layers of other kinds, with a sliding window say, are transformers' own."""
    cache = DynamicCache(config=model.config)
    cache.layers = [PreallocatedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class TransformersSampler:
    """Samples from the trainer's own model object, so there is nothing to hand over."""

    name = "transformers"

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self._model, self._eos = model, tokenizer.eos_token_id
        self._pad = self._eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def sync(self, model: PreTrainedModel) -> None:
        """Keeps the model to sample from."""
        self._model = model

    @torch.no_grad()
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
        limits = token_limits(max_tokens, len(prompts))
        # Rows that are likely to become equally long go together.
        order = sorted(range(len(prompts)), key=lambda k: (limits[k], len(prompts[k])))
        rows = [(prompts[k], limits[k]) for k in order for _ in range(n)]
        samples: list[Sample] = []
        own_defaults = self._model.generation_config
        # A model's own defaults (a repetition penalty, say) would change the distribution that is sampled from.
        self._model.generation_config = GenerationConfig()
        self._model.set_attn_implementation("sdpa")
        try:
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                torch.manual_seed(seed)
                for start in range(0, len(rows), BATCH):
                    samples += self._generate(rows[start : start + BATCH], temperature)
                    on_progress(len(samples), len(rows))
        finally:
            self._model.set_attn_implementation(NAME)
            self._model.generation_config = own_defaults
        drawn = {k: samples[place * n : (place + 1) * n] for place, k in enumerate(order)}
        return [drawn[k] for k in range(len(prompts))]

    def sleep(self) -> None:
        """Nothing: the model is the trainer's own."""

    def close(self) -> None:
        """Nothing is held."""

    def _generate(self, rows: list[tuple[list[int], int]], temperature: float) -> list[Sample]:
        """One sample of each (prompt, limit): all go on to the largest limit and are cut at their own."""
        width = max(len(prompt) for prompt, _ in rows)
        ids = torch.tensor([[self._pad] * (width - len(prompt)) + prompt for prompt, _ in rows])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in rows])
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
            if temperature
            else {"do_sample": False}
        )
        longest = max(limit for _, limit in rows)
        output = self._model.generate(
            input_ids=ids.to(self._model.device), attention_mask=mask.to(self._model.device),
            max_new_tokens=longest, eos_token_id=self._eos, pad_token_id=self._pad,
            past_key_values=cache_of(self._model, width + longest),
            return_dict_in_generate=True, output_scores=bool(temperature), **sampling,
        )  # fmt: skip
        tokens = output.sequences[:, width:].cpu()
        logps = None
        if temperature:
            scores = torch.stack(output.scores, dim=1).float().log_softmax(-1)
            logps = scores.gather(-1, output.sequences[:, width:, None])[..., 0].cpu()
        samples = []
        for k, (row, (_, limit)) in enumerate(zip(tokens.tolist(), rows, strict=True)):
            row = row[:limit]
            length = row.index(self._eos) + 1 if self._eos in row else len(row)
            samples.append(
                Sample(
                    row[:length],
                    [] if logps is None else logps[k, :length].tolist(),
                    finished=self._eos in row,
                )
            )
        return samples
