"""What several adapters share: the LM head of another stack's model, called to score tokens instead of making logits.

The head stays the module that is called, so whatever wraps its call still runs: FSDP's gathering of its weight,
DeepSpeed's hooks, accelerate's autocast.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .lm_head import FAMILIES, logit_options


def check_weight(weight: Tensor, hidden: Tensor, remedy: str) -> None:
    """Raises ValueError, with `remedy`, unless `weight` is a plain (V, D) tensor for `hidden` (..., D)."""
    if hasattr(weight, "placements"):
        raise ValueError(
            f"weight is a DTensor of shape {tuple(weight.shape)} with placements {tuple(weight.placements)}; "
            f"expected a plain tensor: {remedy}"
        )
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; expected (V, D={hidden.shape[-1]}), the size of hidden. If a "
            f"sharding wrapper (FSDP, ZeRO-3) holds the rest of it: {remedy}"
        )


def plain_linear(name: str, module: object) -> nn.Linear:
    """`module`. Raises ValueError unless it computes `hidden @ weight.T + bias` and nothing else."""
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        raise ValueError(
            f"{name} is a {type(module).__name__}; expected a torch.nn.Linear: leave it out of LoRA's target_modules "
            "and of quantisation"
        )
    return module


@contextmanager
def computing(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Inside the context a call of `module` runs `forward`, with the module's hooks around it."""
    attributes = vars(module)
    before = attributes.get("forward")
    attributes["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del attributes["forward"]
        else:
            attributes["forward"] = before


@contextmanager
def scoring(model: nn.Module, score: Callable[..., Tensor]) -> Iterator[list[Tensor]]:
    """Inside the context a call of `model` computes `score(hidden, weight=..., ...)` where it would compute logits.

    Args:
        model: a causal LM of transformers, or a wrapper that has it as `.module` (DDP, DeepSpeed) or passes its
            methods on (PEFT, not on the head). Its outputs' `logits` are of no use inside the context.
        score: gets hidden (N, D), all positions in a row, and the head as the kernels' keyword arguments (weight, bias,
            logit_scale, softcap); returns (N, K).

    Yields:
        a list, to which each forward of the head adds its scores (..., K).

    Raises:
        ValueError: the model is of no tested family, its head is no nn.Linear, or the weight is not whole when used.
    """
    causal_lm: Any = getattr(model, "module", model)
    family = causal_lm.config.get_text_config().model_type
    if family not in FAMILIES:
        raise ValueError(
            f"{type(causal_lm).__name__} has model_type {family!r}; expected one whose logits are tested against ours: "
            f"{', '.join(FAMILIES)}"
        )
    linear = plain_linear(f"the LM head of {type(causal_lm).__name__}", causal_lm.get_output_embeddings())
    options = logit_options(causal_lm)._asdict()
    scores: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        check_weight(linear.weight, hidden, "gather it for the call, or pass its full_tensor()")
        found = score(hidden.flatten(0, -2), weight=linear.weight, bias=linear.bias, **options)
        return found.unflatten(0, hidden.shape[:-1])

    def keep(_module: nn.Module, _arguments: object, result: Tensor) -> None:
        scores.append(result)

    hook = linear.register_forward_hook(keep)  # after wrappers' own, which may tie the gathering for backward to it
    try:
        with computing(linear, forward):
            yield scores
    finally:
        hook.remove()


def mean_nll(logp: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Mean of -logp (N,) over the targets (N,) that count; 0, with a gradient of 0, where none does."""
    return -logp.sum() / torch.sum(target != ignore_index).clamp(min=1)
