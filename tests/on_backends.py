"""What the kernel tests share: the backends that run here, and calls of an op wherever its backend wants tensors."""

import functools

import pytest
import torch
from stepkto_kernels import backend, backends, triton_backend
from torch import Tensor

INTERPRETING = triton_backend.interpreting()


def needs(op, name):
    reason = backends.why_not(op, name)
    return pytest.mark.skipif(reason is not None, reason=str(reason))


def where_it_runs(op, name):
    return pytest.param(name, marks=needs(op, name))


def device_of(name):
    return "cuda" if name == "triton" and not INTERPRETING else "cpu"


def moved(function):
    """`function` of CPU tensors, run on the device of the backend in force; results and gradients come back."""

    @functools.wraps(function)
    def call(*args, **keywords):
        if torch.compiler.is_compiling() or device_of(backends.requested()) == "cpu":
            return function(*args, **keywords)
        device, there = device_of(backends.requested()), {}

        def move(x):
            if not isinstance(x, Tensor):
                return x
            if id(x) not in there:  # one tensor passed twice stays one
                there[id(x)] = x.to(device)
            return there[id(x)]

        result = function(*map(move, args), **{k: move(x) for k, x in keywords.items()})
        if isinstance(result, Tensor):
            return result.cpu()
        results = [x.cpu() for x in result]
        return type(result)(*results) if hasattr(result, "_fields") else tuple(results)

    return call


def fixture_over(op, *names):
    """A fixture that runs a test on each of the named backends that can run here."""

    @pytest.fixture(params=[where_it_runs(op, name) for name in names])
    def on_backend(request):
        with backend(request.param):
            yield request.param

    return on_backend


class NaNMemory:
    """Within it, every new tensor that is not filled holds NaN (integers: their largest number)."""

    def __enter__(self):
        torch.use_deterministic_algorithms(True)
        assert torch.empty(3).isnan().all()

    def __exit__(self, *_):
        torch.use_deterministic_algorithms(False)
