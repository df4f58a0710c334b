"""The reference backend of reference_points."""

import torch
from torch import Tensor


def reference_points_forward(
    values_N: Tensor, cu_seqlens: Tensor, cu_steps: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if values_N.dtype == torch.float64 else torch.float32
    # completions and steps partition the same tokens, so the two sums are one number; fp64, for batches of
    # 10^6 tokens
    total = values_N.sum(dtype=torch.float64).to(dtype)
    completions = total.new_full((), len(cu_seqlens) - 1)
    steps = total.new_full((), len(cu_steps) - 1)
    return total, completions, total.clone(), steps
