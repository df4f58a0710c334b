"""Loads the C++ library that lies inside the package; `missing()` says why there is none, and the remedy."""

import ctypes
import functools
import shutil
from pathlib import Path
from typing import Any

import torch

from ._ops import ops

LIBRARY = Path(__file__).with_name("libstepkto_native.so")
REBUILD = "pip install --no-build-isolation --no-deps -e . (or: python setup.py build_ext --inplace)"
PREFIX = "native_"  # the C++ functions share this package's namespace with its ops
# kernel-builder's builds are Python modules that register them as `_ops` imports them; there is no library to load
REGISTERED = hasattr(ops, f"{PREFIX}instruction_set")


@functools.cache
def missing() -> str | None:
    """None once the C++ functions are registered, else the reason and the remedy in one line."""
    if REGISTERED:
        return None
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
        # not torch.ops.load_library, which makes symbols global: another copy's library has the same ones
        register = ctypes.CDLL(str(LIBRARY)).stepkto_register
    except OSError as error:  # built against another torch, or for another machine
        return f"{LIBRARY.name} does not load under torch {torch.__version__} ({error}); rebuild it: {REBUILD}"
    except AttributeError:
        return f"{LIBRARY.name} is of another version; rebuild it: {REBUILD}"
    register.argtypes, register.restype = [ctypes.c_char_p], ctypes.c_char_p
    refusal = register(ops.name.encode())
    return refusal and f"torch {torch.__version__} refuses its functions ({refusal.decode()}); rebuild it: {REBUILD}"


class _Functions:
    def __getattr__(self, name: str) -> Any:
        found = getattr(ops, f"{PREFIX}{name}")
        setattr(self, name, found)
        return found


_FUNCTIONS = _Functions()


def functions() -> Any:
    """The library's functions, by the names of the ops."""
    return _FUNCTIONS


def refuses(op: str, tensor: torch.Tensor) -> str | None:
    """Why `op`, which this library has, cannot take tensors like `tensor`; or None."""
    if tensor.device.type != "cpu":
        return f"it runs on CPU tensors and this call's are on {tensor.device.type}"
    if tensor.dtype == torch.float64 and op.startswith("linear_"):
        return "its products are in fp32 and this call's tensors are float64; use 'reference'"
    return None
