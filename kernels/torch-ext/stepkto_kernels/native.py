"""Loads the C++ library that lies inside the package; `missing()` says why there is none, and the remedy."""

import functools
import shutil
from pathlib import Path
from typing import Any

import torch

from ._ops import NATIVE_NAMESPACE

LIBRARY = Path(__file__).with_name("libstepkto_native.so")
REBUILD = "pip install --no-build-isolation --no-deps -e . (or: python setup.py build_ext --inplace)"


@functools.cache
def missing() -> str | None:
    """None once the library is loaded, else the reason and the remedy in one line."""
    if not LIBRARY.exists():
        tools = [
            what
            for what, found in (
                (
                    "a C++ compiler (g++ or clang++)",
                    shutil.which("g++") or shutil.which("clang++") or shutil.which("c++"),
                ),
                ("cmake (3.18 or later)", shutil.which("cmake")),
                ("ninja or make", shutil.which("ninja") or shutil.which("make")),
            )
            if not found
        ]
        first = f"install {', '.join(tools)}, then " if tools else ""
        return f"{LIBRARY.name} was not built; {first}{REBUILD}"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:  # built against another torch, or for another machine
        return f"{LIBRARY.name} does not load under torch {torch.__version__} ({error}); rebuild it: {REBUILD}"
    return None


def functions() -> Any:
    """The library's functions, by the names of the ops."""
    return getattr(torch.ops, NATIVE_NAMESPACE)


def refuses(op: str, tensor: torch.Tensor) -> str | None:
    """Why `op`, which this library has, cannot take tensors like `tensor`; or None."""
    if tensor.device.type != "cpu":
        return f"it runs on CPU tensors and this call's are on {tensor.device.type}"
    if tensor.dtype == torch.float64 and op.startswith("linear_"):
        return "its products are in fp32 and this call's tensors are float64; use 'reference'"
    return None
