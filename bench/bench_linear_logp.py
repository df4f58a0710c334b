"""linear_logp, forward alone and with its backward, against full logits and torch's linear_cross_entropy.

GFLOP/s count what the result needs, 2NDV forward and 6NDV with the backward, so that whoever recomputes or
materialises more is slower, not busier.
"""

import functools

import pytest
import torch
from stepkto_kernels import backend, backends, linear_logp
from stepkto_kernels.linear_logp import reference as truth
from torch.nn import functional as F

SHAPES = [(256, 512, 8192), (512, 256, 16384)]  # (N, D, V)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def ours(name):
    def function(hidden, weight, target):
        with backend(name):
            return linear_logp(hidden, weight, target)

    return function


def full_logits(hidden, weight, target):
    logits = F.linear(hidden, weight)
    return torch.log_softmax(logits, -1).gather(1, target[:, None]).squeeze(1)


def linear_cross_entropy(hidden, weight, target):
    return -F.linear_cross_entropy(hidden, weight, target, reduction="none")


PROVIDERS = {"ours, reference": ours("reference"), "torch full logits": full_logits}
if backends.why_not("linear_logp", "native") is None:
    PROVIDERS["ours, native"] = ours("native")
if hasattr(F, "linear_cross_entropy"):
    PROVIDERS["torch linear_cross_entropy"] = linear_cross_entropy


@functools.cache
def problem(shape, dtype_name):
    """Inputs as a head sees them (logits of size 1 to 10), cotangents, and the fp64 truth of value and
    gradients."""
    n, d, v = shape
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=generator).to(DTYPES[dtype_name])
    weight = (torch.randn(v, d, generator=generator) * 2 / d**0.5).to(DTYPES[dtype_name])
    target = torch.randint(0, v, (n,), generator=generator)
    cotangent = torch.randn(n, generator=generator) / n
    leaves = [x.double().requires_grad_() for x in (hidden, weight)]
    logp = truth.linear_logp(*leaves, target)
    gradients = torch.autograd.grad(logp, leaves, cotangent.double())
    return hidden, weight, target, cotangent, logp.detach(), gradients


def check(result, dtype_name):
    """fp32 is right to a few roundings; bf16 peers round logits (up to 10, so to 2^-6) and may not be
    worse."""
    *_, exact, exact_gradients = result["problem"]
    error = (result["logp"].double() - exact).abs().max().item()
    assert error <= (1e-4 if dtype_name == "fp32" else 0.1), error
    for found, wanted in zip(result.get("gradients", ()), exact_gradients, strict=False):
        relative = ((found.double() - wanted).norm() / wanted.norm()).item()
        assert relative <= (1e-5 if dtype_name == "fp32" else 2e-2), relative
    return error


@pytest.mark.parametrize("who", PROVIDERS)
@pytest.mark.parametrize("dtype_name", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(benchmark, shape, dtype_name, who):
    hidden, weight, target, *_ = problem(shape, dtype_name)
    function = PROVIDERS[who]
    with torch.no_grad():
        logp = function(hidden, weight, target)
        error = check({"problem": problem(shape, dtype_name), "logp": logp}, dtype_name)
        benchmark.group = f"linear_logp forward N, D, V = {shape} {dtype_name}"
        benchmark.pedantic(function, (hidden, weight, target), rounds=3, warmup_rounds=1)
    record(benchmark, shape, dtype_name, 2, error)


@pytest.mark.parametrize("who", PROVIDERS)
@pytest.mark.parametrize("dtype_name", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_backward(benchmark, shape, dtype_name, who):
    hidden, weight, target, cotangent, *_ = problem(shape, dtype_name)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    function = PROVIDERS[who]

    def run():
        logp = function(*leaves, target)
        return logp, torch.autograd.grad(logp, leaves, cotangent.to(logp.dtype))

    logp, gradients = run()
    found = {"problem": problem(shape, dtype_name), "logp": logp.detach(), "gradients": gradients}
    error = check(found, dtype_name)
    benchmark.group = f"linear_logp forward and backward N, D, V = {shape} {dtype_name}"
    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
    record(benchmark, shape, dtype_name, 6, error)


def record(benchmark, shape, dtype_name, products, error):
    n, d, v = shape
    benchmark.extra_info.update(shape=str(shape), dtype=dtype_name, max_error_nats=f"{error:.1e}")
    if benchmark.stats is not None:  # None under --benchmark-disable
        seconds = benchmark.stats.stats.median
        benchmark.extra_info["GFLOP/s"] = round(products * n * d * v / seconds / 1e9, 1)
