"""The native backend of step_kto: kernels/csrc/step_kto.cpp."""

import torch

from ..native import functions


def step_kto_forward(*arguments) -> tuple[torch.Tensor, ...]:
    return functions().step_kto(*arguments)
