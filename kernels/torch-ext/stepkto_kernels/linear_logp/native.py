"""The native backend of linear_logp and linear_logp_entropy: kernels/csrc/linear_logp*.cpp."""

from torch import Tensor

from ..native import functions
from ..routing import Routing, record, watching

WORKSPACE_BYTES = 2**26  # for gradients of logits, at most; more, 512 bytes a token in bf16, only past 131072 tokens


def linear_logp_forward(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, bias_V: Tensor | None, *options_store_probs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    operands = hidden_ND, weight_VD, target_N, bias_V
    return linear_logp_entropy_forward(*operands, *options_store_probs, with_entropy=False)[:4]


def linear_logp_entropy_forward(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    *options_store_probs,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *options, _ = options_store_probs
    logp, lse, tile_lse, entropy = functions().linear_logp(
        hidden_ND, weight_VD, target_N, bias_V, *options, with_entropy
    )
    return logp, lse, tile_lse, hidden_ND.new_empty(0, 0), entropy


def linear_logp_backward(
    grad_logp_N: Tensor,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    logp_N: Tensor,
    lse_N: Tensor,
    tile_lse_TN: Tensor,
    tile_probs_NV: Tensor,
    bias_V: Tensor | None,
    *options_needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return linear_logp_entropy_backward(
        grad_logp_N, None, hidden_ND, weight_VD, target_N, logp_N, lse_N, tile_lse_TN, tile_probs_NV, None, bias_V,
        *options_needs,
    )  # fmt: skip


def linear_logp_entropy_backward(
    grad_logp_N: Tensor,
    grad_entropy_N: Tensor | None,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    logp_N: Tensor,
    lse_N: Tensor,
    tile_lse_TN: Tensor,
    tile_probs_NV: Tensor,  # for backends that need not multiply again
    entropy_N: Tensor | None,
    bias_V: Tensor | None,
    *options_needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    need_hidden, need_weight, need_bias = options_needs[-3:]
    dhidden, dweight, dbias, figures = functions().linear_logp_backward(
        grad_logp_N, grad_entropy_N, hidden_ND, weight_VD, target_N, logp_N, lse_N, tile_lse_TN, entropy_N, bias_V,
        *options_needs, WORKSPACE_BYTES,
    )  # fmt: skip
    if watching():
        rho, dropped_max, dropped_mean, dense = figures.unbind()
        # tokens are gathered for both gradients, so both cost rho
        record(Routing(rho, rho, dropped_max, dropped_mean, dense != 0))
    need_bias = need_bias and bias_V is not None
    return dhidden if need_hidden else None, dweight if need_weight else None, dbias if need_bias else None
