"""A model's forward taught to take a packed batch, so that it still goes through whatever wraps the model.

DDP reduces gradients in the backward of its own forward alone, adapters act in theirs: a loss computed beside the
forward would miss both.
"""

import functools
from types import MethodType
from typing import Any

import torch
from accelerate.utils import is_peft_model
from stepkto_kernels import linear_logp, linear_step_kto
from torch import Tensor, nn

from ..attention import NAME
from ..packing import PackedBatch, pack
from ..policy import head, hidden_states
from ..rollout import Rollout
from .lm_head import FAMILIES, evaluating, logit_options, verify_logits

PROBED_LENGTHS = (7, 5, 9)  # tokens of the sequences that are packed to see whether they stay apart


def add_packed_forward(model: Any) -> None:
    """Teaches `model` the call model(packed=batch, objective=options) -> `StepKTOOutput`, and without options -> the
    log-probs (N,) of the batch's tokens; other calls stay as they are.

    A few tokens are run, packed and not. Raises ValueError for a model whose packed sequences see each other, or whose
    logits are not those of `lm_head.SUPPORTED_LOGITS`.
    """
    if is_peft_model(model):
        if any(config.is_prompt_learning for config in model.peft_config.values()):
            raise ValueError("prompt-learning adapters put tokens into each sequence, not into packed ones: use LoRA")
        model = model.get_base_model()
    name, output = type(model).__name__, model.get_output_embeddings()
    family = model.config.get_text_config().model_type
    if not model._supports_attention_backend or model._is_stateful:
        raise ValueError(f"{name} cannot keep packed sequences apart: choose a model of attention layers alone")
    if not isinstance(output, nn.Linear) and not hasattr(output, "modules_to_save"):
        raise ValueError(f"the LM head of {name} is a {type(output).__name__}: leave it out of the adapter's targets")
    if not isinstance(output, nn.Linear) and family not in FAMILIES:
        raise ValueError(f"{name} (model_type {family!r}) has its head in modules_to_save; expected one of {FAMILIES}")
    before = vars(model).pop("forward", None)  # accelerate's, which may round to 16 bits, or that of another patch
    try:
        if model.config._attn_implementation == NAME:  # which takes nothing but packed inputs
            model.set_attn_implementation("sdpa")
        if isinstance(output, nn.Linear):
            verify_logits(model, logit_options(model))
        _set_packed_attention(model, name)
    finally:
        if before is not None:
            model.forward = before

    @functools.wraps(type(model).forward)  # its signature is read: for columns, and by generate
    def forward(self, *args, packed: PackedBatch | None = None, objective: dict[str, Any] | None = None, **kwargs):
        if packed is None:
            return before(*args, **kwargs) if before else type(self).forward(self, *args, **kwargs)
        hidden = hidden_states(self, packed)
        if objective is None:
            return linear_logp(hidden, target=packed.target, **head(self))
        return linear_step_kto(
            hidden, target=packed.target, ref_logp=packed.ref_logp, cu_seqlens=packed.cu_seqlens,
            cu_steps=packed.cu_steps, labels=packed.labels, step_labels=packed.step_labels, **objective, **head(self),
        )  # fmt: skip

    model.forward = MethodType(forward, model)


@torch.no_grad()
def _set_packed_attention(model: Any, name: str) -> None:
    """Raises ValueError unless packed sequences then have the hidden states that each had alone before, and those of
    others leave them as they are."""
    embedding = model.get_input_embeddings().weight

    def tokens(offset: int, size: int) -> list[int]:
        return [(3 + 7 * n + 11 * offset) % len(embedding) for n in range(size)]

    def packed(rows: list[list[int]]) -> tuple[Tensor, ...]:
        batch = pack([_rollout(row) for row in rows]).to(embedding.device)
        return hidden_states(model, batch).split([len(row) - 1 for row in rows])

    rows = [tokens(k, size) for k, size in enumerate(PROBED_LENGTHS)]
    with evaluating(model), torch.autocast(embedding.device.type, enabled=False):
        alone = [
            model.get_decoder()(input_ids=torch.tensor([row], device=embedding.device), use_cache=False) for row in rows
        ]
        model.set_attn_implementation(NAME)
        together = packed(rows)
        beside_others = packed([tokens(len(rows), PROBED_LENGTHS[0]), *rows[1:]])
    eps = torch.finfo(together[0].dtype).eps
    for k, (found, states, other) in enumerate(zip(together, alone, beside_others, strict=True)):
        # Attention kernels that round differently, through all layers. What leaks from another sequence may be less:
        # with that replaced, nothing but the rounding of a mixture of experts differs.
        moved = _relative(found, states.last_hidden_state[0, :-1]) / max(8 * eps, 1e-3)
        leaked = _relative(other, found) / min(32 * eps, 0.02) if k else 0.0
        if not max(moved, leaked) <= 1:
            raise ValueError(
                f"{name} cannot keep packed sequences apart: what number {k} of {len(rows)} comes to depends on the "
                "others; choose a model of ordinary attention layers alone"
            )


def _relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).float().norm() / wanted.float().norm()).item()


def _rollout(ids: list[int]) -> Rollout:
    return Rollout(
        problem_id=0, sample=0, prompt="", prompt_ids=ids[:1], completion="", completion_ids=ids[1:], logps=[],
        finished=True, step_ends=[len(ids) - 1], label=True, step_labels=[1], ref_logps=[],
    )  # fmt: skip
