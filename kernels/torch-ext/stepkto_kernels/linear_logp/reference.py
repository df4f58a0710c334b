"""The slow truth of linear_logp and linear_logp_entropy: all logits at once, ordinary autograd, any dtype."""

import torch
from torch import Tensor


def logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    z_NV = hidden @ weight.T
    if bias is not None:
        z_NV = z_NV + bias
    z_NV = logit_scale * z_NV
    if softcap is not None:
        z_NV = softcap * torch.tanh(z_NV / softcap)
    return z_NV / temperature


def linear_logp(hidden: Tensor, weight: Tensor, target: Tensor, *, ignore_index: int = -100, **head) -> Tensor:
    return linear_logp_entropy(hidden, weight, target, ignore_index=ignore_index, **head)[0]


def linear_logp_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, *, ignore_index: int = -100, **head
) -> tuple[Tensor, Tensor]:
    (kept,) = torch.nonzero(target != ignore_index, as_tuple=True)
    logp_nV = torch.log_softmax(logits(hidden[kept], weight, **head), dim=-1)
    logp_n = logp_nV.gather(1, target[kept, None]).squeeze(1)
    entropy_n = -(logp_nV.exp() * logp_nV).sum(-1)
    zeros_N = logp_n.new_zeros(len(target))
    return zeros_N.index_put((kept,), logp_n), zeros_N.index_put((kept,), entropy_n)
