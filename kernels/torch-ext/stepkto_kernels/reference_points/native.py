"""The native backend of reference_points: kernels/csrc/reference_points.cpp."""

from torch import Tensor

from ..native import functions


def reference_points_forward(
    values_N: Tensor, cu_seqlens: Tensor, cu_steps: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # completions and steps partition the same tokens, so the two sums are one number
    total = functions().reference_points(values_N)
    completions, steps = (total.new_full((), len(cu) - 1) for cu in (cu_seqlens, cu_steps))
    return total, completions, total.clone(), steps
