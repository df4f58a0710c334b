"""What a recipe needs: `python -m stepkto_fast.train recipe.yaml --plan [--gpu h200] [--key value ...]`.

Predicts memory phase by phase and time part by part from the model's shape, the recipe and stated rates. Starts
nothing: no GPU, no weights, no data, and no network where the shape is known. `docs/planning.md` has the formulas.
"""

import math
import sys
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from .errors import RunError
from .hardware import GIB, Rates
from .model_shape import ModelShape, shape_of
from .plan_memory import (
    PHASES,
    Cache,
    Item,
    cache,
    memory,
    micro_batch_tokens,
    peak,
    trained_parameters,
    uses_vllm,
)
from .plan_time import Part, times
from .recipe import Recipe, parse_recipe
from .settings import parse_settings
from .token_budget import automatic_tokens

SEQUENCES = 8  # of context_length that a lowered vllm_memory must leave room for


@dataclass(frozen=True)
class Plan:
    """A prediction: what takes memory and when, what takes time, and the rates that both rest on."""

    recipe: Recipe
    rates: Rates
    shape: ModelShape
    held: Cache
    items: list[Item]
    parts: list[Part]

    @property
    def peaks(self) -> dict[str, float]:
        """Bytes of each phase."""
        return peak(self.items)

    @property
    def peak(self) -> tuple[str, float]:
        """The phase that takes most, and its bytes."""
        return max(self.peaks.items(), key=lambda pair: pair[1])

    @property
    def seconds(self) -> float:
        return sum(part.total for part in self.parts)

    @property
    def complaint(self) -> str | None:
        """Why the run does not fit, None where it does."""
        phase, needed = self.peak
        if needed > self.rates.memory:
            return f"{needed / GIB:.1f} GiB at the phase {phase!r}, {self.rates.device.memory_gib:.1f} are there"
        if uses_vllm(self.recipe) and not self.held.sequences(self.recipe.context_length):
            if self.recipe.vllm_mode != "colocate":
                return (
                    f"an engine on a GPU of its own has no room for a sequence of {self.recipe.context_length} tokens"
                )
            share = smallest_share(self)
            return (
                f"vllm_memory {self.recipe.vllm_memory} leaves vLLM room for {self.held.tokens:.0f} tokens of KV "
                f"cache, and context_length is {self.recipe.context_length}: raise it to {share:.2f}"
            )
        return None


def plan(recipe: Recipe, rates: Rates) -> Plan:
    """The prediction for `recipe`, whose max_tokens_per_micro_batch is chosen here where it is 0; RunError where the
    model's shape cannot be known."""
    shape = shape_of(recipe)
    if recipe.max_tokens_per_micro_batch == 0:
        tokens = automatic_tokens(recipe, shape, rates, rates.memory)
        recipe = replace(recipe, max_tokens_per_micro_batch=tokens)
    held = cache(recipe, shape, rates)
    return Plan(recipe, rates, shape, held, memory(recipe, shape, rates), times(recipe, shape, rates, held))


def smallest_share(p: Plan) -> float:
    """The vllm_memory that holds the engine's weights and `SEQUENCES` sequences of context_length, in steps of 0.01."""
    tokens = SEQUENCES * p.recipe.context_length
    needed = p.held.weight_bytes + p.rates.engine_reserve_gib * GIB + tokens * p.held.token_bytes
    return math.ceil(100 * needed / p.rates.memory) / 100


def advice(p: Plan) -> str | None:
    """Which settings make the run fit: one alone where one does, else the first few together; None where it fits."""
    if p.complaint is None:
        return None
    if p.peak[1] <= p.rates.memory:
        if p.recipe.vllm_mode != "colocate":
            return "give the engines GPUs with more memory, or lower context_length"
        return f"raise vllm_memory to {smallest_share(p):.2f}"
    changes = _changes(p)
    for change in changes:
        if (found := _smallest_step(p, change)) is not None:
            return f"set {_words(found)}"
    together: dict[str, Any] = {}
    for change in changes:
        together |= change
        if (found := _smallest_step(p, together)) is not None:
            return f"set {_words(found)}"
    least = plan(replace(p.recipe, **together), p.rates).peak[1]
    least_words = f"with {_words(together)} it takes {least / GIB:.0f} GiB"
    return f"no setting makes it fit; {least_words}: take a device with more memory, or more of them (--gpus)"


def _changes(p: Plan) -> list[dict[str, Any]]:
    """What can be lowered, those that cost least first."""
    recipe = p.recipe
    found: list[dict[str, Any]] = []
    if micro_batch_tokens(recipe) > recipe.context_length:
        found.append({"max_tokens_per_micro_batch": recipe.context_length})
    own_engine = uses_vllm(recipe) and recipe.vllm_mode == "colocate" and p.rates.gpu != "cpu"
    if own_engine and (share := smallest_share(p)) < recipe.vllm_memory:
        found.append({"vllm_memory": share})
    if own_engine and not recipe.vllm_sleep:
        found.append({"vllm_sleep": True})
    if recipe.engine == "transformers" and recipe.label_source != "dataset":
        found.append({"engine": "vllm"})
    if recipe.prm_trunk == "trained":
        found.append({"prm_trunk": "initial"})
    if recipe.reference_points in ("exact", "mismatched"):
        found.append({"reference_points": "lagged"})
    if not recipe.gradient_checkpointing:
        found.append({"gradient_checkpointing": True})
    if not recipe.lora_rank:
        found.append({"lora_rank": 16})
    return found


def _smallest_step(p: Plan, change: dict[str, Any]) -> dict[str, Any] | None:
    """`change` where it makes the run fit, with as many tokens in a micro-batch as then fit; None where it does not."""
    if not _fits(p, change):
        return None
    key = "max_tokens_per_micro_batch"
    if key in change:
        mended = replace(p.recipe, **change)
        tokens = automatic_tokens(mended, p.shape, p.rates, p.rates.memory)
        return change | {key: min(tokens, p.recipe.max_tokens_per_micro_batch)}
    return change


def _fits(p: Plan, change: dict[str, Any]) -> bool:
    return plan(replace(p.recipe, **change), p.rates).complaint is None


def _words(change: dict[str, Any]) -> str:
    return " and ".join(f"{key} to {str(value).lower()}" for key, value in change.items())


def summary(p: Plan) -> list[str]:
    """The plan in a few lines, as recipe files quote it."""
    phase, needed = p.peak
    trained = trained_parameters(p.recipe, p.shape)
    fits = f"does not fit: {advice(p)}" if p.complaint else "fits"
    parts = sorted(p.parts, key=lambda part: -part.total)[:4]
    there = f"{p.rates.device.memory_gib:.1f} GiB ({p.rates.devices})"
    return [
        f"parameters  {p.shape.parameters / 1e9:.3f} B, of which {trained / 1e9:.3f} B are trained"
        if not p.recipe.lora_rank
        else f"parameters  {p.shape.parameters / 1e9:.3f} B, and {trained / 1e6:.1f} M in adapters, which are trained",
        f"memory      {needed / GIB:.1f} of {there}, phase {phase}: {fits}",
        f"time        {duration(p.seconds)}{' if it fitted' if p.complaint else ''}: "
        + ", ".join(f"{part.name} {duration(part.total)}" for part in parts),
    ]


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.1f} s"


def print_plan(p: Plan, console: Console) -> None:
    """The whole plan as tables."""
    model = p.recipe.model or "a model built here"
    console.print(
        f"{p.recipe.name}: {model} on {p.rates.devices}. Predicted from formulas and the rates below, not measured.",
        markup=False,
        soft_wrap=True,
    )
    table = Table(title="memory")
    for name in ("", "GiB", "when", "from"):
        table.add_column(name, justify="right" if name == "GiB" else "left")
    for item in p.items:
        when = "always" if item.phases == PHASES else ", ".join(item.phases)
        table.add_row(item.name, f"{item.amount / GIB:.2f}", when, item.note)
    table.add_section()
    for phase, amount in p.peaks.items():
        table.add_row("together", f"{amount / GIB:.2f}", phase, f"of {p.rates.device.memory_gib:.1f} GiB")
    console.print(table)
    if p.recipe.label_source != "dataset":
        console.print(
            f"KV cache: {p.held.token_bytes / 1e3:.0f} kB a token, room for {p.held.tokens:,.0f} tokens: "
            f"{p.held.sequences(p.recipe.context_length)} sequences of context_length {p.recipe.context_length}",
            markup=False,
            soft_wrap=True,
        )
    table = Table(title="time")
    for name in ("", "each", "times", "together"):
        table.add_column(name, justify="left" if not name else "right")
    table.add_column("of")
    for part in p.parts:
        table.add_row(part.name, duration(part.seconds), str(part.times), duration(part.total), part.note)
    table.add_section()
    table.add_row("together", "", "", duration(p.seconds), "")
    console.print(table)
    table = Table(title="rates and assumptions: --key value sets each")
    for name in ("key", "value", "what"):
        table.add_column(name)
    used = asdict(p.rates) | asdict(p.rates.device) | {"max_sequences": p.rates.sequences}
    for f in fields(p.rates):
        table.add_row(f.name, str(used[f.name]), f.metadata["help"])
    console.print(table)
    for line in summary(p):
        console.print(line, markup=False, soft_wrap=True)


def split_arguments(argv: list[str]) -> tuple[list[str], list[str]]:
    """The words of a command line that are rates, and the others, which are the recipe's."""
    known = {f.name for f in fields(Rates)}
    own: list[str] = []
    others: list[str] = []
    taken = False  # whether the last word was a rate's key, whose value comes next
    for word in argv:
        key = word[2:].split("=")[0].replace("-", "_") if word.startswith("--") else None
        if key in known:
            own.append(word)
            taken = "=" not in word
        elif taken and key is None:
            own.append(word)
            taken = False
        else:
            others.append(word)
            taken = False
    return own, others


def main(argv: list[str]) -> int:
    """`[recipe.yaml] [--gpu NAME] [--key value ...]` of recipe and rates. 0 where the run fits, 1 where it does not or
    something is wrong."""
    try:
        own, others = split_arguments(argv)
        if "--help" in others or "-h" in others:
            own = ["--help"]
        rates = parse_settings(Rates, own, "stepkto_fast.train recipe.yaml --plan")
        found = plan(parse_recipe(others), rates)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_plan(found, Console(highlight=False))
    return 1 if found.complaint else 0
