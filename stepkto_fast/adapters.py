"""LoRA: an iteration's update trains low-rank adapters, which are merged into the weights at its end.

M_t with fresh adapters is M_t, so the reference of an iteration needs no second model; sampler, checkpoints and
evaluation only ever see merged weights. The LM head stays frozen.
"""

import importlib.util
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from .errors import RunError
from .recipe import Recipe


def require_adapters(recipe: Recipe) -> None:
    """RunError when the package that `lora_rank` needs is not installed."""
    if recipe.lora_rank and importlib.util.find_spec("peft") is None:
        raise RunError(f"lora_rank {recipe.lora_rank} needs peft: pip install 'stepkto-fast[lora]', or --lora_rank 0")


def add_adapters(policy: PreTrainedModel, recipe: Recipe, seed: int) -> Callable[[], None]:
    """Puts adapters of `recipe.lora_rank` into `policy` and freezes all else; nothing for rank 0.

    Returns what merges them into the weights and takes them out again. Raises RunError where `recipe.lora_target`
    names no module.
    """
    if not recipe.lora_rank:
        return lambda: None
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=recipe.lora_rank, lora_alpha=recipe.lora_alpha, target_modules=recipe.lora_target, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(policy, config)
        except ValueError as error:
            raise RunError(f"lora_target {recipe.lora_target!r}: {error}") from error

    if hasattr(policy.get_output_embeddings(), "lora_A"):
        raise RunError(f"lora_target {recipe.lora_target!r} takes in the LM head, which stays frozen: leave it out")

    def merge() -> None:
        adapted.merge_and_unload()
        policy.requires_grad_(True)

    return merge
