"""The native backend of linear_logp_kl: kernels/csrc/linear_logp_kl.cpp."""

import torch
from torch import Tensor

from ..native import functions


def linear_logp_kl_forward(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    ref_hidden_NE: Tensor,
    ref_weight_VE: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    ref_bias_V: Tensor | None,
    *options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if ref_hidden_NE.dtype == torch.float64:  # computed in the policy's precision
        ref_hidden_NE, ref_weight_VE = ref_hidden_NE.float(), ref_weight_VE.float()
    return functions().linear_logp_kl(
        hidden_ND, weight_VD, ref_hidden_NE, ref_weight_VE, target_N, bias_V, ref_bias_V, *options
    )
