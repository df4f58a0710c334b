"""linear_logp_parallel and linear_logp_entropy_parallel: the kernels of linear_logp on each shard, and one exchange."""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .. import backends
from ..linear_logp.eager import VOCAB_TILE, compute_dtype, vocab_tiles
from ..linear_logp.op import (
    LogitOptions,
    check_head,
    check_logit_options,
    linear_logp_backward,
    linear_logp_entropy_backward,
    linear_logp_entropy_forward,
    linear_logp_forward,
    present,
    reads_data,
    requested_for_backward,
)
from .shards import gathered, local_operands, place

backends.register_composed("linear_logp_parallel", "linear_logp")
backends.register_composed("linear_logp_entropy_parallel", "linear_logp_entropy")

IGNORED = -1


class _Parallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, row: Tensor, group: Any, options: LogitOptions,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.set_materialize_grads(False)
        # no entry of this shard, in no tile of it: the kernels then see a token without a target
        target = torch.where(row == -2, vocab_tiles(len(weight)) * VOCAB_TILE, row)
        head = bias, *options._replace(ignore_index=IGNORED), False
        forward = linear_logp_entropy_forward if with_entropy else linear_logp_forward
        if len(weight):
            local_logp, local_lse, *of_tiles = forward(hidden, weight, target, *head)
        else:  # a rank that got no row
            local_lse = hidden.new_full((len(hidden),), -torch.inf, dtype=compute_dtype(hidden))
            local_logp, of_tiles = local_lse, [local_lse.new_empty(0, len(hidden)), hidden.new_empty(0, 0)]
        # Of each rank: the log-sum-exp of its entries but the target's, and the target's logit if it has it
        logp_N, lse_N = local_logp.double(), local_lse.double()
        rest_N = torch.where(row >= 0, lse_N + torch.log(-torch.expm1(logp_N)), lse_N)
        exchanged = [rest_N, torch.where(row >= 0, lse_N + logp_N, -torch.inf)]
        if with_entropy:
            exchanged.append(of_tiles[2].double() if len(weight) else torch.zeros_like(rest_N))
        rest_RN, z_RN, *entropy_RN = gathered(torch.stack(exchanged), group).unbind(1)
        rest_N, z_N, live_N = rest_RN.logsumexp(0), z_RN.amax(0), row != IGNORED
        kept = dict(dtype=local_lse.dtype)
        logp = torch.where(live_N, -torch.nn.functional.softplus(rest_N - z_N, threshold=700), 0).to(**kept)
        lse_N = torch.logaddexp(rest_N, z_N)
        entropy = torch.zeros_like(logp)
        if with_entropy:  # chain rule over the ranks: every term is >= 0
            log_mass_RN = torch.logaddexp(rest_RN, z_RN) - lse_N
            terms_RN = log_mass_RN.exp() * (entropy_RN[0] - log_mass_RN)
            entropy_N = torch.where(log_mass_RN == -torch.inf, 0, terms_RN).sum(0)
            entropy = torch.where(live_N, entropy_N, 0).to(**kept)
        ctx.save_for_backward(
            hidden, weight, target, logp, torch.where(live_N, lse_N, 0).to(**kept), *of_tiles[:2], entropy, bias
        )
        ctx.options, ctx.group, ctx.backend = options, group, requested_for_backward()
        return logp, entropy

    @staticmethod
    def backward(ctx, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> tuple:
        hidden, weight, *saved, entropy, bias = ctx.saved_tensors
        if grad_logp is None and grad_entropy is None:
            return (None,) * 7
        needs = ctx.needs_input_grad[:3]
        # each rank may drop its part of what all may drop together
        share = ctx.options.filter_eps / dist.get_world_size(ctx.group)
        options = *ctx.options._replace(ignore_index=IGNORED, filter_eps=share), *needs, ctx.backend
        if len(weight) == 0:
            # contiguous, as the other ranks' is: the sum over ranks is one of memory
            grads: tuple = (hidden.new_zeros(hidden.shape), weight.new_zeros(weight.shape), weight.new_zeros(0))
        elif grad_entropy is None:
            grads = linear_logp_backward(grad_logp, hidden, weight, *saved, bias, *options)
        else:
            grad_logp = torch.zeros_like(grad_entropy) if grad_logp is None else grad_logp
            grads = linear_logp_entropy_backward(
                grad_logp, grad_entropy, hidden, weight, *saved, entropy, bias, *options
            )
        dhidden, dweight, dbias = present(*grads, needed=needs)
        if dhidden is not None:
            sum_ND = dhidden.to(compute_dtype(hidden))
            dist.all_reduce(sum_ND, group=ctx.group)
            dhidden = sum_ND.to(hidden.dtype)
        return dhidden, dweight, dbias, None, None, None, None


@torch.compiler.disable  # collectives on the shapes of the moment: compiled code calls it as it is
def _parallel(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    group: Any,
    bias: Tensor | None,
    validate: bool | None,
    with_entropy: bool,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    hidden, weight, bias, group = local_operands(hidden, weight, bias, group)
    hidden, weight, bias = check_head("", hidden, weight, bias, target, empty_allowed=True)
    checked = check_logit_options(hidden, *options, weight, bias)
    row = place(target, len(weight), checked.ignore_index, reads_data(validate, hidden), group)
    return _Parallel.apply(hidden, weight, bias, row, group, checked, with_entropy)


def linear_logp_parallel(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    group: Any = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    filter_eps: float | Literal["auto"] = "auto",
    validate: bool | None = None,
) -> Tensor:
    """`linear_logp` of a head whose rows are sharded over ranks, each of which scores the same tokens.

    A collective: every rank of the group calls it, and later its backward, with the same tokens. Each rank multiplies
    by its own rows; the ranks then exchange two numbers per token, and in the backward add up dhidden.

    Args:
        hidden: (N, D), the same on every rank: a plain tensor, or a DTensor that is replicated.
        weight: (V_r, D), this rank's rows of the head, of any number (none, too): rank 0 has the first ones. Or a
            DTensor with placement Shard(0) over a mesh of one dimension.
        target: (N,) int64 in [0, sum of all V_r), or `ignore_index`; the same on every rank.
        group: the process group over which the vocabulary is sharded; None for a DTensor, whose mesh tells.
        bias: (V_r,), sharded as weight is, or None.
        logit_scale, softcap, temperature, ignore_index, filter_eps: as in `linear_logp`. The bound of `filter_eps`
            holds for all ranks together.
        validate: whether to check that the ranks have the same targets, in range, which makes the host wait for the
            device. None: on CPU only.

    Returns:
        (N,) fp32 (fp64 for fp64 inputs), in nats, the same on every rank. Gradients: of hidden the whole, on every
        rank (the ranks' parts are added in fp32); of weight and bias those of this rank's rows.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, placement or value, or a plain weight without its group.
    """
    options = logit_scale, softcap, temperature, ignore_index, filter_eps
    return _parallel(hidden, weight, target, group, bias, validate, False, *options)[0]


def linear_logp_entropy_parallel(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    group: Any = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    filter_eps: float | Literal["auto"] = "auto",
    validate: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_logp_parallel` together with the entropy over the whole vocabulary: (logp, entropy), as
    `linear_logp_entropy`. The ranks exchange three numbers per token."""
    options = logit_scale, softcap, temperature, ignore_index, filter_eps
    return _parallel(hidden, weight, target, group, bias, validate, True, *options)
