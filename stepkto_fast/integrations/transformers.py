"""Per-token log-probabilities from any causal language model of transformers, without its logits.

    from stepkto_fast import patch_lm_head

    model = patch_lm_head(model)
    output = model(input_ids, attention_mask=attention_mask, labels=labels)
    output.loss, output.log_probs

The hidden states that have a label, and no others, go to `stepkto_kernels.linear_logp` with the model's head. Without
labels the model's own forward runs, so `generate` is as it was.
"""

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from stepkto_kernels import linear_logp, linear_logp_entropy
from torch import Tensor, nn

from . import require
from .lm_head import LogitOptions, logit_options, verify_logits, whole_head

SUPPORTED = ">=5.16.1,<5.20"
require("transformers", SUPPORTED, "stepkto_fast.patch_lm_head")

from transformers import PreTrainedModel  # noqa: E402  # not before the version is known
from transformers.modeling_outputs import ModelOutput  # noqa: E402

PATCH = "_stepkto_lm_head"


@dataclass
class CausalLMLogProbs(ModelOutput):
    """What a patched model returns for labels; with `labels` T' = T - 1, with `shift_labels` T' = T.

    Args:
        loss: 0-d: the sum of -log_probs, divided by `num_items_in_batch` or the number of labels that are not ignored.
            Without any, 0 with a graph (transformers: NaN).
        log_probs: (B, T') fp32 (fp64 for an fp64 model), in nats: of each label after the tokens before it; 0 where the
            label is ignored. Differentiable, as is the loss.
        entropy: (B, T') of the distributions that `log_probs` are taken from, in nats, if `output_entropy=True`.
        logits: None; for code that looks for it.
        past_key_values, hidden_states, attentions: as the model's backbone returns them, where asked for.
    """

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class Patch:
    """What a patched model carries. On the model, not in a closure: a deep copy of the model has one of its own."""

    logits: LogitOptions
    temperature: float
    filter_eps: float | Literal["auto"]
    replaced: Callable | None  # the forward of the instance, if it had one before


def patch_lm_head(
    model: PreTrainedModel,
    *,
    temperature: float = 1.0,
    filter_eps: float | Literal["auto"] = "auto",
    verify: bool = True,
) -> PreTrainedModel:
    """Makes `model(..., labels=...)` return `CausalLMLogProbs` in place of logits; other calls stay as they are.

    Labels are those of transformers: (B, T) int64, shifted by the model, -100 (`ignore_index`) for what is not scored;
    or `shift_labels`, (B, T), shifted already. The call also takes `num_items_in_batch`, which the loss is then divided
    by, and `output_entropy=True`. The KV cache is off with labels unless `use_cache=True` is passed.

    The logits' scale, softcap and bias are read from the model (`logit_scale`, `logits_scaling` and
    `final_logit_softcapping` of its config; the bias of its head). That this is all the model does to its logits is
    verified here: eight tokens go once through the model and once through its backbone, in eval mode, with the hidden
    states amplified so that a softcap would show.

    Patch before `torch.compile`, FSDP, DDP and PEFT wrap the model. The head and the backbone are looked up at every
    call, so what these replace is used.

    Args:
        model: a causal language model with a `torch.nn.Linear` head.
        temperature: above 0; the logits are divided by it, for the loss too.
        filter_eps: of `stepkto_kernels.linear_logp`. 0 is the exact gradient.
        verify: False skips the verification, for a model whose weights are not here (sharded, offloaded, on the meta
            device). Only for families that are tested: `stepkto_fast.integrations.lm_head.FAMILIES`.

    Returns:
        The same model.

    Raises:
        ValueError: the logits are not those of a supported head; the message says what was found. At a call: labels
            with `logits_to_keep` or `output_router_logits`, or a head that has since been replaced by one whose weight
            is not all of it (LoRA, quantisation, tensor parallelism, a sharded DTensor).
        TypeError: `model` is not a PreTrainedModel: unwrap it first.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model is a {type(model).__name__}; expected a transformers.PreTrainedModel: patch it before it is wrapped"
        )
    if getattr(model, PATCH, None) is not None:
        raise ValueError("model is patched already: call unpatch_lm_head(model) first")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature!r}; expected a finite number > 0")
    options = logit_options(model)
    verify_logits(model, options, skip=not verify)
    setattr(model, PATCH, Patch(options, float(temperature), filter_eps, vars(model).get("forward")))
    model.forward = types.MethodType(_patched_forward(type(model).forward), model)
    return model


def unpatch_lm_head(model: PreTrainedModel) -> None:
    """Gives a model patched by `patch_lm_head` its own forward back.

    Raises ValueError if it is not patched, or if something else has replaced its forward since.
    """
    patch = getattr(model, PATCH, None)
    if patch is None:
        raise ValueError("model is not patched: call patch_lm_head(model) first")
    if not hasattr(getattr(vars(model).get("forward"), "__func__", None), PATCH):
        raise ValueError("model.forward was replaced after patch_lm_head: undo that first (Accelerator.unwrap_model)")
    if patch.replaced is None:
        del model.forward
    else:
        model.forward = patch.replaced
    delattr(model, PATCH)


def _patched_forward(original: Callable) -> Callable:
    """A forward for models of the class that `original` is of, with its signature: `generate` and Trainer read it."""
    parameters = list(inspect.signature(original).parameters.values())[1:]
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    @functools.wraps(original)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        by_name = dict(zip(names, args, strict=False))
        if len(args) > len(names) or by_name.keys() & kwargs.keys():
            raise TypeError(f"{type(self).__name__}.forward got {len(args)} positional arguments and {sorted(kwargs)}")
        arguments = by_name | kwargs
        if arguments.get("labels") is None and arguments.get("shift_labels") is None:
            if kwargs.pop("output_entropy", False):
                raise ValueError("output_entropy needs labels or shift_labels")
            patch: Patch = getattr(self, PATCH)
            if patch.replaced is not None:
                return patch.replaced(*args, **kwargs)
            return type(self).forward(self, *args, **kwargs)
        return _log_probs(self, **arguments)

    setattr(forward, PATCH, True)
    return forward


def _log_probs(
    model: PreTrainedModel,
    *,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = -100,
    output_entropy: bool = False,
    logits_to_keep: int | Tensor = 0,
    return_dict: bool | None = None,
    **inputs: Any,
) -> CausalLMLogProbs | tuple:
    patch: Patch = getattr(model, PATCH)
    if isinstance(logits_to_keep, Tensor) or logits_to_keep != 0:
        raise ValueError("logits_to_keep does not go with labels: ignore the positions by their label instead")
    if inputs.get("output_router_logits", getattr(model.config.get_text_config(), "output_router_logits", False)):
        raise ValueError(
            "output_router_logits asks for a load-balancing loss, which a patched model does not add: set "
            "model.config.output_router_logits = False, or unpatch_lm_head(model)"
        )
    inputs.setdefault("use_cache", False)
    states = model.base_model(**inputs, return_dict=True)
    head = whole_head(model)
    hidden = states.last_hidden_state.to(head.weight.device)
    target = shift_labels
    if target is None:
        assert labels is not None  # one of the two is given where this is called
        target = nn.functional.pad(labels[:, 1:], (0, 1), value=ignore_index)
    target = target.to(hidden.device)
    if target.shape != hidden.shape[:2]:
        name = "labels" if shift_labels is None else "shift_labels"
        raise ValueError(f"{name} has shape {tuple(target.shape)}; expected (B, T) = {tuple(hidden.shape[:2])}")
    rows = (target.reshape(-1) != ignore_index).nonzero().squeeze(1)
    scored = hidden.flatten(0, 1).index_select(0, rows), head.weight, target.reshape(-1).index_select(0, rows)
    options = {
        "bias": head.bias, "temperature": patch.temperature, "ignore_index": ignore_index,
        "filter_eps": patch.filter_eps, **patch.logits._asdict(),
    }  # fmt: skip
    entropy = None
    if output_entropy:
        logp, entropy = linear_logp_entropy(*scored, **options)
    else:
        logp = linear_logp(*scored, **options)

    length = target.shape[1]
    positions = rows // length, rows % length
    shape = len(target), length if shift_labels is not None else length - 1

    # Not a slice of something longer: FSDP's hooks on a view are lost when it is changed in place.
    def at_positions(values: Tensor) -> Tensor:
        return values.new_zeros(shape).index_put(positions, values)

    count = max(1, len(rows)) if num_items_in_batch is None else num_items_in_batch
    if isinstance(count, Tensor):
        count = count.to(logp.device)
    output = CausalLMLogProbs(
        loss=-logp.sum() / count,
        log_probs=at_positions(logp),
        entropy=None if entropy is None else at_positions(entropy),
        past_key_values=states.get("past_key_values"),
        hidden_states=states.get("hidden_states"),
        attentions=states.get("attentions"),
    )
    if return_dict is None:
        return_dict = getattr(model.config, "return_dict", True)
    return output if return_dict else output.to_tuple()
