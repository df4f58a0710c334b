"""Which implementation of an op runs: a registry of op -> backend -> functions, and the choice among them.

Ops read the choice when they run, so it also steers code that torch.compile traced earlier.
What a forward saves for its backward is defined by the op, never by the backend: any backend's backward can
follow any backend's forward.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from . import native, triton_backend

ENVIRONMENT_VARIABLE = "STEPKTO_BACKEND"
AUTO = "auto"
BACKENDS = ("reference", "native", "triton")
# what `auto` tries, by device; Triton's interpreter is never among it
FASTEST_FIRST = {"cuda": ("triton", "reference"), "cpu": ("native", "reference")}


class Kernel(NamedTuple):
    forward: Callable
    backward: Any = None  # a function, for ops whose backward is more than a product


_KERNELS: dict[str, dict[str, Kernel]] = {}
_COMPOSED: dict[str, tuple[str, ...]] = {}  # ops that only call other ops' kernels
_chosen: ContextVar[str | None] = ContextVar("stepkto_backend", default=None)


def register(op: str, backend: str, forward: Callable, backward: Callable | None = None) -> None:
    _KERNELS.setdefault(op, {})[backend] = Kernel(forward, backward)


def register_composed(op: str, *parts: str) -> None:
    _COMPOSED[op] = parts


def ops() -> list[str]:
    return [*_KERNELS, *_COMPOSED]


def _check_name(name: str, source: str) -> str:
    if name != AUTO and name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}; expected one of {', '.join((AUTO, *BACKENDS))}")
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops called inside the `with` block on one backend: "auto", "reference", "native" or "triton".

    It takes precedence over the environment variable STEPKTO_BACKEND. An op's backward runs on the backend
    that was in force for its forward; compiled code reads the choice whenever it runs, for the backward too.

    Raises ValueError for an unknown name here, and RuntimeError when an op is called that this backend lacks.
    """
    token = _chosen.set(_check_name(name, "backend name"))
    try:
        yield
    finally:
        _chosen.reset(token)


def requested() -> str:
    """The backend asked for right now: the innermost `backend(...)`, else STEPKTO_BACKEND, else "auto"."""
    return _chosen.get() or _check_name(os.environ.get(ENVIRONMENT_VARIABLE) or AUTO, ENVIRONMENT_VARIABLE)


def why_not(op: str, name: str) -> str | None:
    """None if backend `name` can run `op` on this machine, else the reason and the remedy."""
    if op in _COMPOSED:
        lacking = [part for part in _COMPOSED[op] if why_not(part, name)]
        return f"it needs {lacking[0]}: {why_not(lacking[0], name)}" if lacking else None
    if name not in _KERNELS[op]:
        return f"no {name} kernel in this version; use {' or '.join((AUTO, *_KERNELS[op]))}"
    if name == "native":
        return native.missing()
    return triton_backend.missing() if name == "triton" else None


def _refuses(op: str, name: str, tensor: torch.Tensor) -> str | None:
    """Why backend `name`, which can run `op` here, cannot take tensors like `tensor`; or None."""
    if name == "triton":
        return triton_backend.refuses(tensor)
    return native.refuses(op, tensor) if name == "native" else None


def choose(op: str, tensor: torch.Tensor, name: str = "") -> Kernel:
    """The kernel of `op` for tensors like `tensor`; a `name` that is not empty overrides the choice."""
    name = name or requested()
    if name == AUTO:
        order = FASTEST_FIRST.get(tensor.device.type, ("reference",))
        return next(_KERNELS[op][each] for each in order if not (why_not(op, each) or _refuses(op, each, tensor)))
    reason = why_not(op, name) or _refuses(op, name, tensor)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} lacks {op}: {reason}")
    return _KERNELS[op][name]
