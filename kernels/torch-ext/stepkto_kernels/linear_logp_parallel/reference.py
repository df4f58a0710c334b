"""The slow truth of linear_logp_parallel and its entropy: the shards put together, and the truth of the whole head."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..linear_logp import reference


def linear_logp_parallel(
    hidden: Tensor, weights: Sequence[Tensor], target: Tensor, *, biases: Sequence[Tensor] = (), **head
) -> Tensor:
    """`weights` and `biases` of all ranks, in order."""
    return linear_logp_entropy_parallel(hidden, weights, target, biases=biases, **head)[0]


def linear_logp_entropy_parallel(
    hidden: Tensor, weights: Sequence[Tensor], target: Tensor, *, biases: Sequence[Tensor] = (), **head
) -> tuple[Tensor, Tensor]:
    bias = torch.cat(list(biases)) if biases else None
    return reference.linear_logp_entropy(hidden, torch.cat(list(weights)), target, bias=bias, **head)
