"""Where the head of a transformers model is, what the model does to its logits, and proof that this is all it does."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

# Model types whose logits are tested against ours; others are taken when `verify_logits` finds nothing.
FAMILIES = (
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi", "phi3", "granite", "cohere", "cohere2",
)  # fmt: skip
SUPPORTED_LOGITS = (
    "logit_scale * (hidden @ weight.T + bias), then the softcap, with the config's logit_scale or 1 / logits_scaling, "
    "its final_logit_softcapping, and a torch.nn.Linear head"
)
TELLING = ("logit", "softcap", "soft_cap", "multiplier")  # parts of names of config attributes that may change logits

PROBED_TOKENS = 8
# Logits are amplified to this size: softcaps in use (15 to 50) then bend them by far more than 16 bits round them.
PROBED_SIZE = 50.0


class LogitOptions(NamedTuple):
    """What a model does to its logits, as keyword arguments of `stepkto_kernels.linear_logp`."""

    logit_scale: float
    softcap: float | None


def logit_options(model: Any) -> LogitOptions:
    """What the config of a transformers model says of its logits.

    Raises ValueError if it says both to multiply and to divide.
    """
    config = model.config.get_text_config()
    scale, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    if scale is not None and divisor is not None:
        raise ValueError(f"the config has logit_scale={scale!r} and logits_scaling={divisor!r}; expected one at most")
    softcap = getattr(config, "final_logit_softcapping", None)
    return LogitOptions(
        1.0 / float(divisor) if divisor is not None else 1.0 if scale is None else float(scale),
        None if softcap is None else float(softcap),
    )


def linear_head(model: Any) -> nn.Linear:
    """The model's LM head. Raises ValueError if it computes anything but `hidden @ weight.T + bias`."""
    head = model.get_output_embeddings()
    name = f"{type(head).__module__}.{type(head).__qualname__}"
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise ValueError(
            f"the LM head of {type(model).__name__} is a {name}; expected a torch.nn.Linear, whose weight is the whole "
            "head: no LoRA on it (leave it out of target_modules), no quantised one (skip it when quantising)"
        )
    replaced = "forward" in vars(head) and not hasattr(head, "_hf_hook")  # accelerate's hooks only move its inputs
    if replaced or head._forward_hooks or head._forward_pre_hooks:
        raise ValueError(
            f"the LM head of {type(model).__name__} has {'a forward of its own' if replaced else 'forward hooks'}, "
            "which would not run; expected a head without: no tensor parallelism of the head, and FSDP on the root "
            "module, not on the head alone"
        )
    return head


def whole_head(model: Any) -> nn.Linear:
    """`linear_head` whose weights are here and whole. Raises ValueError otherwise."""
    head = linear_head(model)
    if elsewhere := _elsewhere(head):
        raise ValueError(
            f"{elsewhere[0]} of the LM head is {elsewhere[1]}; expected a whole tensor here: do not offload the head, "
            "and let FSDP shard it with the root module, not on its own"
        )
    return head


def verify_logits(model: Any, options: LogitOptions, *, skip: bool = False) -> None:
    """Raises ValueError unless a model's logits and loss are what `options` and its head make of its hidden states.

    A few tokens go through `model.base_model`, and then, in eval mode, through the model, within which the hidden
    states are replaced by amplified ones. With `skip` nothing is run: the model must be of one of `FAMILIES`.
    """
    name = f"{type(model).__name__} (model_type {model.config.get_text_config().model_type!r})"
    linear_head(model)
    if getattr(model.config, "is_encoder_decoder", False) or model.base_model is model:
        raise ValueError(f"{name} is no decoder with a head on it (model.base_model); expected a causal language model")
    if skip:
        known = type(model).forward.__module__.startswith("transformers.models.")
        if not known or model.config.get_text_config().model_type not in FAMILIES:
            raise ValueError(f"verify=False with {name}; expected one of transformers' own {', '.join(FAMILIES)}")
        return
    if elsewhere := _elsewhere(model):
        raise ValueError(
            f"{elsewhere[0]} is {elsewhere[1]}, so the logits of {name} cannot be verified: call patch_lm_head before "
            f"the model is sharded or offloaded, or with verify=False ({', '.join(FAMILIES)})"
        )
    head = whole_head(model)
    with evaluating(model), torch.no_grad(), torch.autocast(head.weight.device.type, enabled=False):
        difference = _difference(model, head, options)
    if difference is not None:
        config = model.config.get_text_config().to_dict()
        found = {k: v for k, v in config.items() if any(part in k for part in TELLING)}
        raise ValueError(
            f"{difference} of {name}; its config has {found or 'nothing that would tell why'}. Expected logits of "
            f"{SUPPORTED_LOGITS}, and a loss that is their mean cross entropy"
        )


def _difference(model: Any, head: nn.Linear, options: LogitOptions) -> str | None:
    device = model.get_input_embeddings().weight.device
    ids = (3 + 7 * torch.arange(PROBED_TOKENS, device=device)[None]) % head.out_features
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False, "return_dict": True}
    hidden = model.base_model(**inputs).last_hidden_state
    there = hidden.to(head.weight.device)
    largest = (options.logit_scale * linear(there, head.weight, head.bias)).abs().max().item()
    if not 0 < largest < float("inf"):
        return f"the largest of the logits is {largest}, which shows nothing: initialise or load the weights"
    room = torch.finfo(hidden.dtype).max / 4 / hidden.abs().max().item()
    amplified = hidden * min(PROBED_SIZE / largest, room)
    given: list[Tensor] = []

    def amplify(module: nn.Module, args: Any, output: Any) -> Any:
        given.append(output.last_hidden_state)
        output.last_hidden_state = amplified
        return output

    hook = model.base_model.register_forward_hook(amplify)
    try:
        output = model(**inputs, labels=ids)
    finally:
        hook.remove()
    if len(given) != 1 or not _close(given[0], hidden):
        return f"the backbone ran {len(given)} times, or gave other hidden states than when called alone, in a forward"
    logits = options.logit_scale * _wide(linear(amplified.to(there.device), head.weight, head.bias))
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    if output.logits is None or output.logits.shape != logits.shape or not _close(output.logits, logits, hidden):
        return "there are other logits than expected in a forward"
    loss = cross_entropy(_wide(output.logits[0, :-1]), ids[0, 1:].to(there.device))
    if output.loss is None or not torch.isclose(output.loss.to(loss), loss, rtol=1e-3, atol=0):
        return f"the loss is {output.loss}, where the mean cross entropy of the labels is {loss.item()}, in a forward"
    return None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _close(found: Tensor, expected: Tensor, *rounded: Tensor) -> bool:
    """Whether the two are as near as a few roundings to the coarsest dtype leave them: 2 of its units, in the mean."""
    unit = max(torch.finfo(x.dtype).eps for x in (found, expected, *rounded))
    found, expected = _wide(found), _wide(expected)
    return bool((found - expected).square().mean().sqrt() <= 2 * unit * expected.square().mean().sqrt())


def _elsewhere(module: nn.Module) -> tuple[str, str] | None:
    """(name, what it is) of a parameter that is not a whole tensor on a device."""
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            return name, "on the meta device"
        if parameter.numel() == 0:
            return name, "empty, as ZeRO-3 and FSDP leave what they have sharded"
        if type(parameter.data) is not Tensor:
            return name, f"a {type(parameter.data).__name__}"
    return None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode inside the context; each module goes back to the mode it had."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
