"""The native backend of linear_logp and its entropy: kernels/csrc/linear_logp*.cpp. Arguments as in eager.py."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..native import functions
from ..routing import Routing, record, watching

WORKSPACE_BYTES = 2**26  # for gradients of logits, at most; more, 512 bytes a token in bf16, only past 131072 tokens


def linear_logp_forward(hidden_ND: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return linear_logp_entropy_forward(hidden_ND, *arguments, with_entropy=False)[:4]


def linear_logp_entropy_forward(
    hidden_ND: Tensor, *arguments: Any, with_entropy: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *arguments_but_storing, _ = arguments
    logp, lse, tile_lse, entropy, _ = functions().linear_logp(hidden_ND, *arguments_but_storing, with_entropy, False)
    return logp, lse, tile_lse, hidden_ND.new_empty(0, 0), entropy


def linear_logp_backward(grad_logp_N: Tensor, *arguments: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    *saved, _tile_probs, bias_V = arguments[:8]
    return _backward(grad_logp_N, None, saved, None, bias_V, arguments[8:])


def linear_logp_entropy_backward(
    grad_logp_N: Tensor, grad_entropy_N: Tensor, *arguments: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    *saved, _tile_probs, entropy_N, bias_V = arguments[:9]
    return _backward(grad_logp_N, grad_entropy_N, saved, entropy_N, bias_V, arguments[9:])


def _backward(
    grad_logp_N: Tensor,
    grad_entropy_N: Tensor | None,
    saved: Sequence[Tensor],  # hidden, weight, target, logp, lse, tile_lse
    entropy_N: Tensor | None,
    bias_V: Tensor | None,
    options_needs: Sequence[Any],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    *gradients, figures = functions().linear_logp_backward(
        grad_logp_N, grad_entropy_N, *saved, entropy_N, bias_V, *options_needs, WORKSPACE_BYTES
    )
    if watching():
        rho, dropped_max, dropped_mean, dense = figures.unbind()
        # tokens are gathered for both gradients, so both cost rho
        record(Routing(rho, rho, dropped_max, dropped_mean, dense != 0))
    need_hidden, need_weight, need_bias = options_needs[-3:]
    needs = need_hidden, need_weight, need_bias and bias_V is not None
    dhidden, dweight, dbias = (x if need else None for x, need in zip(gradients, needs, strict=True))
    return dhidden, dweight, dbias
