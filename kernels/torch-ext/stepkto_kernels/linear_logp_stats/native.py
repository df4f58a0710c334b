"""The native backend of linear_logp_stats: kernels/csrc/linear_logp.cpp. Arguments as in eager.py."""

from typing import Any

from torch import Tensor

from ..native import functions


def linear_logp_stats_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return functions().linear_logp(*arguments, True, True)
