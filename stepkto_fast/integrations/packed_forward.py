"""A model's forward taught to take a packed batch, so that it still goes through whatever wraps the model.

DDP reduces gradients in the backward of its own forward alone, adapters act in theirs: a loss computed beside the
forward would miss both.
"""

import functools
from types import MethodType
from typing import Any

from accelerate.utils import is_peft_model
from stepkto_kernels import linear_logp, linear_step_kto
from torch import nn

from ..attention import NAME
from ..packing import PackedBatch
from ..policy import head, hidden_states


def add_packed_forward(model: Any) -> None:
    """Teaches `model` the call model(packed=batch, objective=options) -> `StepKTOOutput`, and without options -> the
    log-probs (N,) of the batch's tokens; other calls stay as they are."""
    if is_peft_model(model):
        if any(config.is_prompt_learning for config in model.peft_config.values()):
            raise ValueError("prompt-learning adapters put tokens into each sequence, not into packed ones: use LoRA")
        model = model.get_base_model()
    name, config, output = type(model).__name__, model.config, model.get_output_embeddings()
    if not model._supports_attention_backend or model._is_stateful:
        raise ValueError(f"{name} cannot keep packed sequences apart: choose a model of attention layers alone")
    if not isinstance(output, nn.Linear) and not hasattr(output, "modules_to_save"):
        raise ValueError(f"the LM head of {name} is a {type(output).__name__}: leave it out of the adapter's targets")
    for scale in ("output_multiplier", "lm_head_multiplier"):
        if getattr(config, scale, None) not in (None, 1.0):
            raise ValueError(f"{name} scales its logits by {scale} {getattr(config, scale)}, which is not supported")
    if config.model_type == "hyperclovax":
        raise ValueError(f"{name} scales its logits in a way that is not supported: choose another model")
    model.set_attn_implementation(NAME)
    original = model.forward

    @functools.wraps(type(model).forward)  # its signature is read: for columns, and by generate
    def forward(self, *args, packed: PackedBatch | None = None, objective: dict[str, Any] | None = None, **kwargs):
        if packed is None:
            return original(*args, **kwargs)
        hidden = hidden_states(self, packed)
        if objective is None:
            return linear_logp(hidden, target=packed.target, **head(self))
        return linear_step_kto(
            hidden, target=packed.target, ref_logp=packed.ref_logp, cu_seqlens=packed.cu_seqlens,
            cu_steps=packed.cu_steps, labels=packed.labels, step_labels=packed.step_labels, **objective, **head(self),
        )  # fmt: skip

    model.forward = MethodType(forward, model)
