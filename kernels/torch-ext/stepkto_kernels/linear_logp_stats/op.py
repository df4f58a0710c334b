"""linear_logp_stats: registration with torch.library, and the public function."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .. import backends, checks, triton_backend
from ..linear_logp import eager as head
from ..linear_logp.op import (
    check_head,
    check_logit_options,
    differentiate_logp_entropy,
    reads_data,
    requested_for_backward,
)
from ..registration import op
from . import eager, native

backends.register("linear_logp_stats", "reference", eager.linear_logp_stats_forward)
backends.register("linear_logp_stats", "native", native.linear_logp_stats_forward)
backends.register(
    "linear_logp_stats",
    "triton",
    triton_backend.later("linear_logp.triton_forward", "linear_logp_stats_forward"),
)


class LogpStats(NamedTuple):
    """Per token, each (N,) fp32 (fp64 for fp64 inputs) but the last, which is bool; 0 and False where ignored.

    logp: of the target, in nats. entropy: of the distribution over the vocabulary, in nats. log_sum_sq_probs:
    log sum_v p_v^2, in nats. mean_logits: mean_v z_v. is_top1: whether the target is the first largest logit.
    Only logp and entropy have a gradient.
    """

    logp: Tensor
    entropy: Tensor
    log_sum_sq_probs: Tensor
    mean_logits: Tensor
    is_top1: Tensor


@op
def linear_logp_stats_forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    filter_eps: float,
    validate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp, lse, tile_lse, entropy, stats): stats (3, N) are log_sum_sq_probs, mean_logits, and is_top1 as 1 or 0.
    The backward is linear_logp_entropy's."""
    kernel = backends.choose("linear_logp_stats", hidden)
    if validate:
        checks.target_values(target, len(weight), ignore_index)
    return kernel.forward(hidden, weight, target, bias, logit_scale, softcap, temperature, ignore_index)


@linear_logp_stats_forward.register_fake
def _(hidden, weight, target, bias, *options):
    logp = hidden.new_empty(hidden.shape[0], dtype=head.compute_dtype(hidden))
    tile_lse = logp.new_empty(head.vocab_tiles(weight.shape[0]), hidden.shape[0])
    return logp, torch.empty_like(logp), tile_lse, torch.empty_like(logp), logp.new_empty(3, hidden.shape[0])


def _save(ctx, inputs, output):
    hidden, weight, target, bias, *ctx.options = inputs
    logp, lse, tile_lse, entropy, stats = output
    ctx.save_for_backward(hidden, weight, target, logp, lse, tile_lse, hidden.new_empty(0, 0), entropy, bias)
    ctx.backend = requested_for_backward()
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_logp, _lse, _tile_lse, grad_entropy, _stats):
    return differentiate_logp_entropy(ctx, grad_logp, grad_entropy)


linear_logp_stats_forward.register_autograd(_differentiate, setup_context=_save)


def linear_logp_stats(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    filter_eps: float | Literal["auto"] = "auto",
    validate: bool | None = None,
) -> LogpStats:
    """`linear_logp_entropy` with three more numbers per token, from the same single pass over the logits.

    Arguments and errors are those of `linear_logp_entropy`; an entropy that nothing differentiates costs no gradient.

    Returns:
        LogpStats(logp, entropy, log_sum_sq_probs, mean_logits, is_top1), each (N,).
    """
    hidden, weight, bias = check_head("", hidden, weight, bias, target)
    options = check_logit_options(hidden, logit_scale, softcap, temperature, ignore_index, filter_eps, weight, bias)
    logp, _, _, entropy, stats = linear_logp_stats_forward(
        hidden, weight, target, bias, *options, reads_data(validate, hidden)
    )
    log_sum_sq, mean, top1 = stats.unbind()
    return LogpStats(logp, entropy, log_sum_sq, mean, top1 != 0)
