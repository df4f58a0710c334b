"""What the Triton kernels share: whether they can run, on which chip, and how they are compiled ahead of time.

Triton is imported by the kernels' own modules, and those only when a kernel is first needed: the package works
without it.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

LOWEST_CAPABILITY = (8, 0)  # bf16 tensor cores and asynchronous copies
# compute capability -> KiB of shared memory a block may use
CHIPS = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def _lowest_capability_here() -> tuple[int, int] | None:
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return None
    return min(torch.cuda.get_device_capability(n) for n in range(torch.cuda.device_count()))


def missing() -> str | None:
    """None if kernels can run on this machine, else the reason and the remedy in one line."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    if interpreting():
        return None
    capability = _lowest_capability_here()
    if capability is None:
        return "torch sees no CUDA GPU; use one, or TRITON_INTERPRET=1 to run the kernels slowly on CPU tensors"
    if capability < LOWEST_CAPABILITY:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}; 8.0 (A100) or later is needed"
    return None


def refuses(tensor: Tensor) -> str | None:
    """Why the kernels cannot take tensors like this one, or None."""
    if tensor.dtype == torch.float64:
        return "it computes in float32 and this call's tensors are float64"
    device = "cpu" if interpreting() else "cuda"
    if tensor.device.type != device:
        how = "under TRITON_INTERPRET=1 it" if interpreting() else "it"
        return f"{how} runs on {device.upper()} tensors and this call's are on {tensor.device.type}"
    return None


def chip(tensor: Tensor) -> int:
    """The compute capability to configure for, as 10 * major + minor; the interpreter poses as a 9.0."""
    if tensor.device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(tensor: Tensor) -> int:
    return _multiprocessors(tensor.device.index) if tensor.device.type == "cuda" else 2


class Compilation(NamedTuple):
    """One shipped configuration of a kernel, for `make aot`."""

    kernel: Any  # the @triton.jit function
    signature: dict[str, str]  # argument -> type, as "*bf16", "i32", "fp32"; "constexpr" for constants
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    matrix: bool  # whether it must use tensor cores
    label: str = ""


def later(module: str, name: str) -> Callable:
    """A function that imports `module` of this package when it is first called, and calls its `name` on the device of
    its first argument: Triton launches on the current one."""

    def call(*arguments):
        function = getattr(importlib.import_module(f".{module}", __package__), name)
        with torch.cuda.device_of(arguments[0]):
            return function(*arguments)

    return call
