"""The table of predictions in docs/scaling.md, from the planner: `python -m stepkto_fast.scaling_page`."""

import sys
from dataclasses import replace
from itertools import product
from typing import Literal

from .hardware import GIB, Rates
from .plan_time import Clock
from .planner import duration, plan
from .recipe import Recipe

RECIPE = Recipe(
    task="math", num_prompts=2000, num_generations=8, train_batch_size=128, context_length=2560,
    max_completion_length=2048, max_tokens_per_micro_batch=16384, gradient_checkpointing=True, bf16=True,
    vllm_memory=0.4, vllm_sleep=True, label_source="monte_carlo",
)  # fmt: skip
MODELS: tuple[tuple[str, str, dict], ...] = (
    ("Llama-3.1-8B", "all", {"model": "meta-llama/Llama-3.1-8B-Instruct"}),
    ("Llama-3.1-8B", "LoRA 16", {"model": "meta-llama/Llama-3.1-8B-Instruct", "lora_rank": 16, "lora_merge": "end"}),
    ("Qwen2.5-1.5B", "all", {"model": "Qwen/Qwen2.5-1.5B-Instruct"}),
)
Device = Literal["h100", "h200"]
DEVICES: tuple[Device, ...] = ("h100", "h200")
MACHINES = ((1, 1), (8, 1), (8, 2))  # GPUs of each, how many
HEADER = [
    "| model | trained | GPUs | GiB of each | update, tokens/s | rollouts, tokens/s | GB a step | iteration |",
    "|---|---|---|---|---|---|---|---|",
]


def table() -> str:
    """The rows as Markdown, one for each model, device and number of GPUs."""
    cases = product(MODELS, DEVICES, MACHINES)
    return "\n".join(
        [*HEADER, *(_row(name, trained, change, gpu, *many) for (name, trained, change), gpu, many in cases)]
    )


def _row(name: str, trained: str, change: dict, gpu: Device, gpus: int, nodes: int) -> str:
    found = plan(replace(RECIPE, **change), Rates(gpu=gpu, gpus=gpus, nodes=nodes))
    memory = f"{found.peak[1] / GIB:.0f} of {found.rates.device.memory_gib:.0f}"
    cells = [name, trained, found.rates.devices.replace("h", "H"), memory]
    if found.complaint:
        return _line([*cells, "does not fit", "", "", ""])
    clock = Clock(found.recipe, found.shape, found.rates, found.held)
    seconds = {part.name: part.seconds for part in found.parts}
    completions, batch = found.recipe.num_prompts * found.recipe.num_generations, found.recipe.train_batch_size
    sent = clock.micro_batches(batch) * (clock.traffic.forward + clock.traffic.backward)
    loop = ("rollouts", "log-probs", "update", "weights to the engines")
    return _line(
        [
            *cells,
            f"{completions * clock.length / seconds['update']:,.0f}",
            f"{completions * clock.completion / seconds['rollouts']:,.0f}",
            f"{sent / 1e9:.1f}",
            duration(sum(seconds.get(part, 0.0) for part in loop)),
        ]
    )


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
