"""The slow truth of linear_logp_kl: all logits of both models at once, any floating dtype."""

import torch
from torch import Tensor

from ..linear_logp.reference import logits


def linear_logp_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ignore_index: int = -100,
    **head,
) -> tuple[Tensor, Tensor, Tensor]:
    (kept,) = torch.nonzero(target != ignore_index, as_tuple=True)
    logp_nV = torch.log_softmax(logits(hidden[kept], weight, bias, **head), dim=-1)
    with torch.no_grad():
        ref_logp_nV = torch.log_softmax(logits(ref_hidden[kept], ref_weight, ref_bias, **head), dim=-1)
        kl_n = (logp_nV.exp() * (logp_nV - ref_logp_nV)).sum(-1).clamp(min=0)
    logp_n, ref_logp_n = (x.gather(1, target[kept, None]).squeeze(1) for x in (logp_nV, ref_logp_nV))
    zeros_N = logp_n.new_zeros(len(target))
    logp_N, ref_logp_N, kl_N = (zeros_N.index_put((kept,), x.to(zeros_N.dtype)) for x in (logp_n, ref_logp_n, kl_n))
    return logp_N, ref_logp_N, kl_N
