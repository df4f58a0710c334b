"""Liger's fused KTO loss on our kernels: a class with the signature of `liger_kernel.chunked_loss`'s.

liger_kernel need not be installed: only its interface, that of 0.8.5, is used.
"""

from typing import Literal

import torch
from stepkto_kernels import linear_logp
from torch import Tensor, nn
from torch.nn.functional import logsigmoid


class LigerFusedLinearKTOLoss(nn.Module):
    """KTO over B padded completions of T positions, with the constructor, inputs and outputs of Liger's class.

    With d = logp - ref_logp at the positions whose target is not `ignore_index`, r_i the sum of d over completion i
    (the mean with `average_log_prob`) and s_i = +1 for a preferred completion, -1 for another:

        loss = 1/B * sum_i lam_i * (1 - sigmoid(s_i * beta * (r_i - kl)))

    What differs from Liger's, which computes the same loss from the logits of every position:

    - Positions with target `ignore_index` are left out before the head, so NaN there changes nothing but the logits
      sums of the metrics.
    - Logits and log-probabilities are fp32 for 16-bit inputs; Liger's logits are rounded to 16 bits.
    - lam_i is `desirable_weight` or `undesirable_weight`; Liger's loss has no such weights, so trainers that have them
      lose them when they call it.
    - Where the value function is saturated, its gradient keeps its digits; Liger's is s * (1 - s) with s rounded to 1.
    - `kl` may be (B,), one number per completion. Liger's docstring says so too, but it does not divide kl into its
      chunks, and each chunk meets all B numbers.
    - With `average_log_prob`, a completion without a scored position has r_i = 0; Liger's is 0 / 0 and makes the loss
      NaN.
    - Gradients are computed in the backward, and differentiate the loss only, as Liger's do.

    Args:
        ignore_index: the target of positions that are not scored: prompt and padding.
        beta: above 0, per nat.
        compiled, chunk_size: how Liger runs. Accepted and without effect: our kernels are compiled already, and their
            memory does not depend on chunks.
        use_ref_model: whether `forward` subtracts the reference's log-probabilities. If not, ref_logp is 0 and what
            `forward` gets of a reference is not used, as in Liger's.
        average_log_prob: r_i is a mean over the scored positions instead of a sum.
        desirable_weight, undesirable_weight: lam of preferred completions and of the others, >= 0. Ours: Liger's
            class has no such arguments.
        filter_eps: of `stepkto_kernels.linear_logp`. 0 is the exact gradient. Ours.

    Raises:
        ValueError, TypeError: an argument out of its range.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        *,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        filter_eps: float | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        if not 0 < beta < float("inf"):
            raise ValueError(f"beta is {beta!r}; expected a finite number > 0")
        for name, weight in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
            if not 0 <= weight < float("inf"):
                raise ValueError(f"{name} is {weight!r}; expected a finite number >= 0")
        if chunk_size < 1:
            raise ValueError(f"chunk_size is {chunk_size!r}; expected an integer >= 1")
        self.ignore_index = ignore_index
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size
        self.desirable_weight = desirable_weight
        self.undesirable_weight = undesirable_weight
        self.filter_eps = filter_eps

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: float | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """Loss and metrics of a batch.

        Args:
            _input: (B, T, D) fp32, bf16, fp16 or fp64: the policy's hidden states, each predicting the target of its
                position (shifted by the caller).
            lin_weight, bias: (V, D) and (V,) or None, of the dtype of _input: the policy's head.
            target: (B, T) int64 in [0, V) or `ignore_index`.
            preference_labels: (B,) bool, True for preferred completions. Required.
            ref_input, ref_weight, ref_bias: (B, T, D'), (V, D'), (V,) or None: the same of the reference, constants.
                The first two are required with `use_ref_model`.
            kl: the reference point in nats, a constant: a number, a tensor of shape () or (1,), one per completion
                (B,), or None for 0.

        Returns:
            (loss, metrics): loss a 0-d fp32 tensor (fp64 for fp64 inputs), differentiable in _input, lin_weight and
            bias; metrics six detached ones: the sums over preferred and over other completions of their
            log-probability (means with `average_log_prob`), of the logits of all T positions and V entries, and of
            beta * r_i.

        Raises:
            ValueError, TypeError: a missing argument, or a wrong shape, dtype or value; the message names it.
        """
        labels = _check(_input, target, preference_labels)
        rows = (target.reshape(-1) != self.ignore_index).nonzero().squeeze(1)
        scored = target.reshape(-1)[rows]

        def log_probs(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return linear_logp(
                hidden.flatten(0, 1).index_select(0, rows), weight, scored,
                bias=bias, ignore_index=self.ignore_index, filter_eps=self.filter_eps,
            )  # fmt: skip

        # Positions summed in place, not added with atomics: the same numbers in every run.
        def per_completion(values: Tensor) -> Tensor:
            return values.new_zeros(target.numel()).index_copy(0, rows, values).view(target.shape).sum(1)

        logp = log_probs(_input, lin_weight, bias)
        difference = logp
        if self.use_ref_model:
            with torch.no_grad():
                ref_logp = log_probs(*_check_reference(_input, ref_input, ref_weight), ref_bias)
            difference = logp - ref_logp
        # step_kto has no completions without tokens, no reference point per completion and no means over tokens.
        log_ratios, logps = per_completion(difference), per_completion(logp.detach())
        if self.average_log_prob:
            scored_positions = (target != self.ignore_index).sum(1).clamp(min=1)
            log_ratios, logps = log_ratios / scored_positions, logps / scored_positions
        margins = self.beta * (log_ratios - _reference_point(kl, log_ratios))
        # 1 - sigmoid(x) is sigmoid(-x). By way of its logarithm: the derivative of sigmoid(y) is computed from
        # 1 - sigmoid(y), which has no digits left where the value function is saturated.
        signed = torch.where(labels, -margins, margins)
        losses = torch.where(labels, self.desirable_weight, self.undesirable_weight) * logsigmoid(signed).exp()
        logits = _logits_sums(_input.detach(), lin_weight.detach(), None if bias is None else bias.detach())
        rewards = _of_either(self.beta * log_ratios.detach(), labels)
        metrics = *_of_either(logps, labels), *_of_either(logits, labels), *rewards
        return losses.sum() / len(losses), metrics


def _check(hidden: Tensor, target: Tensor, preference_labels: Tensor | None) -> Tensor:
    if hidden.dim() != 3 or len(hidden) == 0:
        raise ValueError(f"_input has shape {tuple(hidden.shape)}; expected (B, T, D) with B >= 1")
    if target.shape != hidden.shape[:2]:
        raise ValueError(
            f"target has shape {tuple(target.shape)}; expected (B, T) = {tuple(hidden.shape[:2])}, as _input has it"
        )
    if preference_labels is None:
        raise ValueError("preference_labels is None; expected a (B,) bool tensor, True for preferred completions")
    if preference_labels.dtype != torch.bool:
        raise TypeError(f"preference_labels has dtype {preference_labels.dtype}; expected torch.bool")
    if preference_labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"preference_labels has shape {tuple(preference_labels.shape)}; expected (B,) = ({len(hidden)},)"
        )
    return preference_labels


def _check_reference(hidden: Tensor, ref_input: Tensor | None, ref_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    if ref_input is None or ref_weight is None:
        missing = "ref_input" if ref_input is None else "ref_weight"
        raise ValueError(f"{missing} is None; use_ref_model=True needs ref_input and ref_weight")
    if ref_input.dim() != 3 or ref_input.shape[:2] != hidden.shape[:2]:
        raise ValueError(
            f"ref_input has shape {tuple(ref_input.shape)}; expected (B, T, D') with (B, T) = "
            f"{tuple(hidden.shape[:2])}, as _input has it"
        )
    return ref_input.detach(), ref_weight.detach()


def _reference_point(kl: float | Tensor | None, like: Tensor) -> float | Tensor:
    if kl is None:
        return 0.0
    if isinstance(kl, Tensor):
        if kl.shape not in ((), (1,), like.shape):
            raise ValueError(f"kl has shape {tuple(kl.shape)}; expected (), (1,) or (B,) = ({len(like)},)")
        return kl.detach().to(like)
    return kl


def _logits_sums(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B,) sums of the logits over positions and vocabulary. The head is linear: its sum is that of its rows."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    sums = (hidden.sum(1, dtype=dtype) * weight.sum(0, dtype=dtype)).sum(1)
    return sums if bias is None else sums + hidden.shape[1] * bias.sum(dtype=dtype)


def _of_either(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    # Not by a product with the labels: 0 * NaN of one side would reach the other.
    return values.where(labels, 0).sum(), values.where(labels.logical_not(), 0).sum()
