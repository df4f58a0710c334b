"""OpenRLHF: an actor that scores tokens without logits, and Step-KTO as a loss module.

In the trainer, behind `actor = Actor(...)` and before or after `strategy.prepare`, one line:

    use_linear_logp(actor)

From then on `actor(sequences, action_mask, ...)` gives the same log-probs (and entropies) from hidden states. Calls
that ask for logits, with neither an action mask nor `return_logprobs`, still run OpenRLHF's forward.

OpenRLHF has no KTO or PRM trainer any more (0.11); `StepKTOLoss` takes what its other losses take, per-token log-probs
and a mask over (B, T), and step labels as its process-reward data had them: one at the last token of each step, -100
elsewhere.
"""

import warnings
from types import MethodType
from typing import Any

import torch
from stepkto_kernels import StepKTOOutput, linear_logp, linear_logp_entropy, step_kto
from torch import Tensor, nn

from . import require
from .head_call import scoring

SUPPORTED = "==0.11.2"
NO_LABEL = -100


def use_linear_logp(actor: Any) -> None:
    """Makes one `openrlhf.models.Actor` compute log-probs from hidden states.

    Log-probs and entropy are those of the logits divided by the actor's temperature, as in OpenRLHF. Outputs then carry
    no logits. Models are those of `lm_head.FAMILIES`, without LoRA or quantisation on the head.

    Raises:
        ImportError: no supported openrlhf is installed.
        ValueError: the actor is a vision-language model.
    """
    require("openrlhf", SUPPORTED, "stepkto_fast.integrations.openrlhf.use_linear_logp")
    if getattr(actor, "is_vlm", False):
        raise ValueError("actor is a vision-language model (is_vlm); expected a causal LM: leave it as it is")
    actor.forward = MethodType(_forward, actor)


def _forward(
    actor: Any,
    sequences: Tensor,
    action_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    return_output: bool = False,
    allgather_logits: bool = False,
    return_logprobs: bool = False,
    ring_attn_group: Any = None,
    packed_seq_lens: list[int] | None = None,
    return_entropy: bool = False,
) -> Any:
    """`Actor.forward`: sequences, attention_mask (B, L), action_mask (B, A) -> log-probs (B, A), or (B, L - 1)."""
    if action_mask is None and not return_logprobs:
        return type(actor).forward(
            actor, sequences, action_mask, attention_mask, return_output, allgather_logits, return_logprobs,
            ring_attn_group, packed_seq_lens, return_entropy,
        )  # fmt: skip
    if attention_mask is None:
        raise ValueError("attention_mask is None; expected (B, L), as OpenRLHF's actor needs it for positions")
    packing = None
    if getattr(actor, "packing_samples", False):
        from openrlhf.models.ring_attn_utils import gather_and_pad_tensor, unpad_and_slice_tensor

        input_ids, position_ids, target, *packing = unpad_and_slice_tensor(sequences, attention_mask, ring_attn_group)
    else:
        input_ids, target = sequences, sequences.roll(-1, 1)
        position_ids = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)

    def score(hidden: Tensor, **head: Any) -> Tensor:
        head |= {"target": target.flatten(), "temperature": actor.temperature}
        if return_entropy:
            return torch.stack(linear_logp_entropy(hidden, **head), dim=1)
        return linear_logp(hidden, **head)[:, None]

    with scoring(actor.model, score) as scores:
        output = actor.model(input_ids, attention_mask=None if packing else attention_mask, position_ids=position_ids)
    output["logits"] = None
    logp, *entropy = scores[0].unbind(-1)
    if packing:
        batch, length = sequences.shape
        logp, *entropy = (gather_and_pad_tensor(x, ring_attn_group, *packing, batch, length) for x in (logp, *entropy))
    if entropy:
        output.entropy = entropy[0][:, :-1]
    logp = logp[:, :-1]
    if action_mask is not None:
        logp = logp[:, -action_mask.shape[1] :] * action_mask.float()
    return (logp, output) if return_output else logp


class StepKTOLoss(nn.Module):
    """Step-KTO of per-token log-probs.

    Args:
        options: the objective's, as for `stepkto_kernels.step_kto`: beta, step_beta, the class weights, outcome_weight,
            step_weight, step_reduction, after_first_error, loss_type.
    """

    def __init__(self, **options: Any):
        super().__init__()
        self.options = options

    def forward(
        self,
        log_probs: Tensor,
        reference_log_probs: Tensor,
        action_mask: Tensor,
        labels: Tensor,
        step_labels: Tensor,
        kl: float | Tensor = 0.0,
        step_kl: float | Tensor = 0.0,
        num_completions: int | Tensor | None = None,
        num_supervised: int | Tensor | None = None,
    ) -> StepKTOOutput:
        """The loss of B completions.

        Args:
            log_probs, reference_log_probs: (B, T) floating, in nats; the second is a constant.
            action_mask: (B, T) bool or number, not 0 at the tokens of the completions.
            labels: (B,) bool, the outcome of each completion.
            step_labels: (B, T) integers: 1 (right), 0 (wrong) or -1 (unlabelled) at the last token of each step, -100
                elsewhere. Tokens behind the last label are one more step, unlabelled.
            kl, step_kl: the reference points, in nats.
            num_completions, num_supervised: what the means divide by: give the counts of the whole batch where it is
                split over micro-batches or ranks (divided by the number of ranks where gradients are averaged).

        Returns:
            stepkto_kernels.StepKTOOutput; only `.loss` has a gradient, in log_probs.

        Raises:
            ValueError: a shape or value is wrong; a completion is empty; a label lies outside action_mask; or no step
                has a label, though step_weight is above 0 and num_supervised is not given.

        Warns when all labels are 1: often a sign of labels that lost their type on the way.
        """
        for name, value in (
            ("reference_log_probs", reference_log_probs), ("action_mask", action_mask), ("step_labels", step_labels),
        ):  # fmt: skip
            if value.shape != log_probs.shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {tuple(log_probs.shape)}")
        scored = action_mask != 0
        ends = step_labels != NO_LABEL
        if (ends & ~scored).any():
            b, t = (ends & ~scored).nonzero()[0].tolist()
            raise ValueError(
                f"step_labels[{b}, {t}] is {int(step_labels[b, t])}, but action_mask is 0 there; expected labels at "
                "tokens of the completion: align them with log_probs, which start with the second token of a sequence"
            )
        self._check_labels(step_labels[ends], num_supervised)
        lengths = scored.sum(1)
        if (lengths == 0).any():
            raise ValueError(f"action_mask[{int((lengths == 0).nonzero()[0])}] is 0 throughout; expected a completion")
        cu_seqlens = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        packed = torch.where(ends, step_labels, -1)[scored].to(torch.int8)
        ends = ends[scored]
        ends[cu_seqlens[1:] - 1] = True
        last = ends.nonzero().flatten()
        cu_steps = nn.functional.pad(last + 1, (1, 0)).int()
        return step_kto(
            log_probs[scored], reference_log_probs[scored], cu_seqlens, cu_steps, labels, packed[last], kl=kl,
            step_kl=step_kl, num_completions=num_completions, num_supervised=num_supervised, **self.options,
        )  # fmt: skip

    def _check_labels(self, given: Tensor, num_supervised: int | Tensor | None) -> None:
        labelled = given[given != -1]
        if ((labelled != 0) & (labelled != 1)).any():
            wrong = labelled[(labelled != 0) & (labelled != 1)][0]
            raise ValueError(
                f"step_labels holds {int(wrong)}; expected 1, 0, -1, or {NO_LABEL} where no step ends: map reward "
                "tokens to 1 and 0 first"
            )
        if self.options.get("step_weight", 1.0) == 0 or num_supervised is not None:
            return
        if len(labelled) == 0:
            raise ValueError(
                f"step_labels holds no label: all are {NO_LABEL} or -1. The placeholder token may not be one token of "
                "the tokenizer; pass num_supervised if other micro-batches hold the labels, or step_weight=0"
            )
        if (labelled == 1).all():
            warnings.warn(
                f"step_labels: all {len(labelled)} labels are 1. Booleans are labels too: check that {NO_LABEL} and 0 "
                "did not become true, and that the data mark wrong steps",
                stacklevel=3,
            )
