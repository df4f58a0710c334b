"""The slow truth of linear_logp_stats: all logits at once, ordinary autograd, any dtype."""

import torch
from torch import Tensor

from ..linear_logp.reference import logits


def linear_logp_stats(
    hidden: Tensor, weight: Tensor, target: Tensor, *, ignore_index: int = -100, **head
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp, entropy, log_sum_sq_probs, mean_logits, is_top1)."""
    (kept,) = torch.nonzero(target != ignore_index, as_tuple=True)
    z_nV, target_n = logits(hidden[kept], weight, **head), target[kept]
    logp_nV = torch.log_softmax(z_nV, dim=-1)
    found = (
        logp_nV.gather(1, target_n[:, None]).squeeze(1),
        -(logp_nV.exp() * logp_nV).sum(-1),
        (2 * logp_nV).logsumexp(-1).detach(),
        z_nV.mean(-1).detach(),
        z_nV.argmax(-1) == target_n,
    )
    logp, entropy, log_sum_sq, mean, top1 = (x_n.new_zeros(len(target)).index_put((kept,), x_n) for x_n in found)
    return logp, entropy, log_sum_sq, mean, top1
