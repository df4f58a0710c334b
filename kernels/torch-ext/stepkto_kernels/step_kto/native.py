"""The native backend of step_kto: kernels/csrc/step_kto.cpp."""

import torch

from .._ops import NATIVE_NAMESPACE


def step_kto_forward(*arguments) -> tuple[torch.Tensor, ...]:
    return getattr(torch.ops, NATIVE_NAMESPACE).step_kto(*arguments)
