"""How an op of this package is declared."""

import functools
from collections.abc import Callable

import torch

from ._ops import add_op_namespace_prefix


def op(function: Callable):
    """Declare `function` (tensors first) as an op of this package, under its own name.

    Autocast is off inside: an op upcasts its operands itself, and autocast would round them down again.
    """

    @functools.wraps(function)
    def without_autocast(first: torch.Tensor, *rest):
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *rest)

    return torch.library.custom_op(add_op_namespace_prefix(function.__name__), without_autocast, mutates_args=())
