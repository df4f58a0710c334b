"""Time of a run, part by part, from counts of tokens and stated rates. Predicted, not measured."""

import math
from dataclasses import dataclass

from .hardware import Rates
from .model_shape import ModelShape
from .monte_carlo import CHUNK
from .plan_memory import (
    Cache,
    engines,
    fits_head,
    micro_batch_tokens,
    samples_seed_set,
    trained_parameters,
    trains_head,
    uses_vllm,
)
from .prm import CACHED_BYTES, HELD_OUT
from .recipe import Recipe
from .sampler_transformers import BATCH

ADAM_BYTES = 80  # read and written for each trained weight by an optimizer step of the multi-tensor form


@dataclass(frozen=True)
class Part:
    """Something that takes time: seconds each time, how often, what it counts."""

    name: str
    seconds: float
    times: int
    note: str

    @property
    def total(self) -> float:
        return self.seconds * self.times


@dataclass(frozen=True)
class Traffic:
    """Bytes that each rank receives: for a micro-batch's forward, for its backward, and with the weights that it hands
    to an engine of its own. FSDP's collectives, as rings: a rank receives (n - 1) / n of what is gathered or summed."""

    forward: float
    backward: float
    weights: float


def traffic(recipe: Recipe, shape: ModelShape, rates: Rates) -> Traffic:
    """What FSDP sends. Layers are gathered for each pass and the head for the forward, in bf16 or fp32; embeddings for
    the forward, in fp32. Gradients are summed and scattered in fp32: those of tied embeddings twice, as the head's too.
    """
    size, share = 2 if recipe.bf16 else 4, 1 - 1 / rates.ranks
    layers, head = shape.linear_parameters, shape.head_parameters
    summed = trained_parameters(recipe, shape) + head * (shape.tied and not recipe.lora_rank)
    return Traffic(
        share * (size * (layers + head) + 4 * head), share * (size * layers + 4 * summed), share * 4 * shape.parameters
    )


class Clock:
    """Seconds of the operations that the parts are made of. Trainer and engines share their work out evenly."""

    def __init__(self, recipe: Recipe, shape: ModelShape, rates: Rates, held: Cache):
        self.recipe, self.shape, self.rates, self.held = recipe, shape, rates, held
        self.prompt = rates.prompt_tokens
        self.completion = rates.completion_share * recipe.max_completion_length
        self.length = self.prompt + self.completion
        self.traffic = traffic(recipe, shape, rates)
        self._peak = rates.flops(recipe.bf16)

    def forward(self, completions: float, *, head: bool = True, everywhere: bool = False) -> float:
        """A forward of the trainer over so many completions with their prompts; the head on completion tokens.
        `everywhere`: every rank looks at all of them."""
        if everywhere:
            completions *= self.rates.ranks
        flops = self.length * self.shape.forward_flops(self.length)
        flops += self.completion * 2 * self.shape.head_parameters * head
        return self._products(completions * flops) + self._sent(self.micro_batches(completions) * self.traffic.forward)

    def update(self, completions: float, steps: int) -> float:
        """Forward and backward of so many completions in so many steps. The trunk's backward costs two forwards, one
        with LoRA, whose frozen weights need no gradient; activation checkpointing adds a forward; the head's: 8NDV
        exact, or what the filter leaves (the README of linear_logp)."""
        rates, recipe, frozen = self.rates, self.recipe, bool(self.recipe.lora_rank)
        passes = (2 if frozen else 3) + recipe.gradient_checkpointing
        trunk = self.length * self.shape.forward_flops(self.length) * passes
        if frozen:
            adapters = self.shape.adapter_parameters(recipe.lora_rank)
            trunk += self.length * (6 + 2 * recipe.gradient_checkpointing) * adapters
        kept = rates.kept_pairs if trains_head(recipe) else 0
        if recipe.filter_eps == 0:
            products = 4.0 if trains_head(recipe) else 3.0
        else:
            products = 1 + rates.kept_pairs + rates.kept_blocks + kept
        head = self.completion * 2 * self.shape.head_parameters * products
        micro_batches = steps * self.micro_batches(completions / steps)
        sent = micro_batches * (self.traffic.forward + self.traffic.backward)
        return self._products(completions * (trunk + head)) + self._sent(sent)

    def micro_batches(self, completions: float) -> int:
        """How many micro-batches each rank makes of so many completions."""
        return math.ceil(completions * self.length / (self.rates.ranks * micro_batch_tokens(self.recipe)))

    def _products(self, flops: float) -> float:
        return flops / (self.rates.ranks * self._peak * self.rates.utilisation)

    def _sent(self, received: float) -> float:
        """Seconds in which a rank waits for so many bytes."""
        return (1 - self.rates.overlap) * received / self.rates.collective

    def hand_over(self) -> float:
        """Seconds until the engines have the trainer's weights: gathered, and then sent to each of Ray's over the
        network, or written to a disk that the server reads. One rank with its own engine: nothing."""
        rates, weights = self.rates, 4 * self.shape.parameters
        seconds = self.traffic.weights / rates.collective
        if uses_vllm(self.recipe) and self.recipe.vllm_mode == "ray":
            seconds += self.recipe.ray_engines * weights / (1e9 * rates.network_gb * rates.link_efficiency)
        elif uses_vllm(self.recipe) and self.recipe.vllm_mode == "server":
            seconds += 2 * weights / (1e9 * rates.disk_gb)
        return seconds

    def step(self, sequences: float, context: float) -> float:
        """One decoding step of the engine: reads the weights and the sequences' KV cache, or is bound by its products,
        or by the launches of its kernels."""
        read = self.held.weight_bytes + sequences * context * self.held.token_bytes
        flops = sequences * 2 * (self.shape.linear_parameters + self.shape.head_parameters)
        peak = self.rates.flops(self.recipe.bf16 and uses_vllm(self.recipe))
        return max(
            read / self.rates.bandwidth,
            flops / (peak * self.rates.prefill_utilisation),
            1e-3 * self.rates.launch_ms * self.shape.num_layers,
        )

    def sample(self, sequences: float, prefill_tokens: float, completion: float, calls: int = 1) -> float:
        """Prefill, then decoding in as many sequences together as there is room for; the end of the longest completion
        of each call is decoded alone. Several engines sample a part each. infinity where no sequence has room."""
        copies = engines(self.recipe, self.rates)
        sequences, prefill_tokens = sequences / copies, prefill_tokens / copies
        limit = self.rates.sequences if uses_vllm(self.recipe) else BATCH
        together = min(sequences / calls, limit, self.held.sequences(self.length))
        if together < 1:
            return float("inf")
        peak = self.rates.flops(self.recipe.bf16 and uses_vllm(self.recipe))
        prefill = prefill_tokens * self.shape.forward_flops(self.prompt) / (peak * self.rates.prefill_utilisation)
        steps = sequences * completion / together
        decode = steps * self.step(together, self.prompt + self.completion / 2)
        tail = (self.recipe.max_completion_length - completion) * self.step(1, self.length)
        return prefill + decode + calls * tail


def times(recipe: Recipe, shape: ModelShape, rates: Rates, held: Cache) -> list[Part]:
    """Every part of the run that takes time. Loading, the engine's start, the answers' check and the report are not
    counted."""
    clock = Clock(recipe, shape, rates, held)
    return _offline(clock) if recipe.label_source == "dataset" else _loop(clock)


def _loop(clock: Clock) -> list[Part]:
    recipe, rates, shape = clock.recipe, clock.rates, clock.shape
    c, p = clock.completion, clock.prompt
    rollouts, T = recipe.num_prompts * recipe.num_generations, recipe.iterations
    test, k = recipe.num_test_problems, recipe.num_eval_generations
    parts = []
    if samples_seed_set(recipe):
        seeds = recipe.prm_seed_problems * recipe.prm_seed_generations
        parts.append(Part("seed set", clock.sample(seeds, seeds * p, c), 1, f"{seeds} completions of {c:.0f} tokens"))
        if recipe.prm_labels == "monte_carlo":
            parts.append(_monte_carlo(clock, "seed labels", seeds, 1))
    has_head = fits_head(recipe) or recipe.prm is not None
    if fits_head(recipe):
        parts.append(_fit(clock))
    # Of the held-out problems: a greedy and k sampled completions; log-probs by M_t and M_0; the head's view.
    passes = 2 * clock.forward(test) + has_head * clock.forward(test, head=recipe.prm_pooling == "attention")
    evaluation = clock.sample(test * (1 + k), test * (1 + k) * p, c) + passes
    parts.append(Part("evaluation", evaluation, T + 1, f"{test} problems, {1 + k} completions each"))
    tokens = rollouts * c
    parts.append(
        Part("rollouts", clock.sample(rollouts, rollouts * p, c), T, f"{tokens / 1e6:.1f} M tokens, prefill each")
    )
    if recipe.label_source in ("monte_carlo", "consensus"):
        parts.append(_monte_carlo(clock, "Monte-Carlo labels", rollouts, T))
    if has_head:
        score = clock.forward(rollouts, head=recipe.prm_pooling == "attention")
        parts.append(Part("head's labels", score, T, "a forward"))
    models = 2 if recipe.reference == "initial" else 1
    parts.append(Part("log-probs", models * clock.forward(rollouts), T, f"a forward of {models} model(s)"))
    parts += _update(clock, rollouts, T)
    if handed := clock.hand_over():
        parts.append(Part("weights to the engines", handed, T + 1, f"4 P bytes, vllm_mode {recipe.vllm_mode}"))
    saved = (T + 2) * 4 * shape.parameters / (rates.disk_gb * 1e9)
    parts.append(Part("models saved", saved, 1, f"M_0 to M_{T} and model/, 4 P bytes each"))
    return parts


def _offline(clock: Clock) -> list[Part]:
    """Nine tenths of the data train, one tenth is held out and looked at twice."""
    data = clock.rates.labelled_completions
    saved = 3 * 4 * clock.shape.parameters / (clock.rates.disk_gb * 1e9)
    return [
        Part("log-probs", 1.2 * clock.forward(data), 1, f"{data} completions, the held-out tenth twice more"),
        *_update(clock, 0.9 * data, 1),
        Part("models saved", saved, 1, "M_0, M_1 and model/, 4 P bytes each"),
    ]


def _update(clock: Clock, completions: float, iterations: int) -> list[Part]:
    recipe, rates = clock.recipe, clock.rates
    trained = trained_parameters(recipe, clock.shape)
    seen = completions * recipe.num_train_epochs
    steps = max(1, round(seen / recipe.train_batch_size))
    seconds = clock.update(seen, steps)
    if recipe.reference_points in ("exact", "mismatched"):
        seconds += 2 * clock.forward(seen)
    seconds += steps * ADAM_BYTES * trained / (rates.ranks * rates.bandwidth)
    bytes_saved = 4 * clock.shape.parameters + (4 if recipe.lora_rank else 0) * trained + 8 * trained
    saves = (steps - 1) // recipe.save_steps
    parts = [Part("update", seconds, iterations, f"{seen * clock.length / 1e6:.1f} M tokens, {steps} steps")]
    if saves:
        written = saves * bytes_saved / (rates.disk_gb * 1e9)
        parts.append(Part("checkpoints", written, iterations, f"{saves} of {bytes_saved / 1e9:.0f} GB (save_steps)"))
    return parts


def _fit(clock: Clock) -> Part:
    """The head on four fifths of the labelled completions; where all features fit into their cache, the trunk runs
    once, else in every epoch for the others."""
    recipe, shape = clock.recipe, clock.shape
    given = recipe.prm_dataset is not None
    data = clock.rates.labelled_completions if given else recipe.prm_seed_problems * recipe.prm_seed_generations
    fitted = data * (1 - 1 / HELD_OUT)
    attention = recipe.prm_pooling == "attention"
    numbers = (2 * shape.hidden_size + 2) * clock.completion if attention else shape.hidden_size * clock.rates.steps
    cached = min(1.0, CACHED_BYTES / (4 * numbers * fitted))
    pass_seconds = clock.forward(fitted, head=attention, everywhere=True)
    if recipe.prm_trunk == "trained":
        seconds, how = (cached + 3 * recipe.prm_epochs) * pass_seconds, "forward and backward in every epoch"
    else:
        seconds = (cached + recipe.prm_epochs * (1 - cached)) * pass_seconds
        how = f"{cached:.0%} of the features cached"
    times = 1 if recipe.prm_trunk == "initial" else recipe.iterations + 1
    return Part("PRM head", seconds, times, f"{recipe.prm_epochs} epochs, {how}")


def _monte_carlo(clock: Clock, name: str, completions: float, times: int) -> Part:
    """K continuations from the end of each step but the last, half a completion long on average; with prefix caching
    each completion is prefilled once. They are sampled in chunks."""
    count = completions * (clock.rates.steps - 1) * clock.recipe.mc_continuations
    tokens = clock.completion / 2
    seconds = clock.sample(count, completions * clock.length, tokens, calls=max(1, math.ceil(count / CHUNK)))
    return Part(name, seconds, times, f"{count:,.0f} continuations of {tokens:.0f} tokens")
