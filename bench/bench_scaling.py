"""Time and memory of the head against N, V and D, each alone, and the largest N that fits.

What fits is measured, not extrapolated: N doubles until one forward and backward needs more than a budget of memory
beyond its inputs and gradients, or more time than a benchmark has.
"""

import pytest
import registry
import torch
from bench_linear_logp import CUDA, MIDDLE, PEAKED
from head_inputs import Inputs, Shape
from measure import Case, Measured, MissesError, checked
from providers import UnsupportedError, gradient_bytes, one_line
from registry import BARE, OPS
from replay import replay

SIZES = {axis: [getattr(MIDDLE, axis) * factor // 4 for factor in (1, 2, 8)] for axis in "ndv"}
NAMES = (BARE, "ours, native", "ours, triton", "TRL", "torch linear_cross_entropy")
CASES = [
    Case("scaling", "linear_logp", MIDDLE._replace(**{axis: size}), PEAKED, True, name, axis)
    for axis, sizes in SIZES.items()
    for size in sizes
    for name in NAMES
]
WIDE = Shape("wide", 1024, 128, 32768, completion=128)
BUDGET = 2**33 if CUDA else 2**30  # bytes
LONGEST = 1.0  # seconds of a call behind which N is not doubled again
FITTING = ("ours, native", "ours, triton", "TRL", "torch linear_cross_entropy", "torch linear_cross_entropy, chunked",
           "cut-cross-entropy, torch.compile", "full logits")  # fmt: skip


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_scaling(timed, case):
    timed(case)


def random_inputs(n: int, device: torch.device) -> Inputs:
    """Of N tokens whose logits are flat, with targets from anywhere: the most that any method has to keep."""
    generator = torch.Generator(device).manual_seed(0)
    hidden, weight = (
        torch.randn(size, WIDE.d, generator=generator, device=device).to(torch.bfloat16) for size in (n, WIDE.v)
    )
    target = torch.randint(WIDE.v, (n,), generator=generator, device=device)
    return Inputs(WIDE._replace(n=n), "flat", hidden, weight / 50, target)


def largest(name: str, device: torch.device) -> Measured:
    """The facts of the largest N that fits, with the seconds of its call."""
    watch, provider = registry.stopwatch(device), OPS["linear_logp"].providers[name]
    facts = {"suite": "largest", "op": "linear_logp", "shape": WIDE.name, "dtype": "bf16", "inputs": "flat"}
    facts |= {"way": "forward and backward", "provider": name, "role": registry.role(name), "budget_bytes": BUDGET}
    facts |= {"d": WIDE.d, "v": WIDE.v}
    n, seconds, limit = WIDE.n, 0.0, ""
    fitting: dict = {}
    while not limit:
        try:
            x = random_inputs(n, device)
            call = provider.start(x, True)
        except (ImportError, UnsupportedError) as error:
            return Measured([], facts, skipped=one_line(error))
        if n == WIDE.n:  # later ones are too large for an fp64 truth
            try:
                facts |= checked(OPS["linear_logp"], provider, x, call())
            except MissesError as error:
                return Measured([], facts, skipped=one_line(error))
        peak, seconds, found = watch.peak(call)
        if peak is None:
            return Measured([], facts, skipped="the peak memory of a call is known on Linux and on GPUs only")
        extra = max(0, peak - gradient_bytes(found))
        if extra > BUDGET:
            limit = "memory"
        else:
            fitting = {"n": n, "peak_bytes": extra, "seconds": seconds}
            limit = "time" if seconds > LONGEST else ""
        n *= 2
    if not fitting:
        return Measured([], facts, failed=f"{n // 2} tokens already need {extra / 1e6:.0f} MB")
    return Measured([fitting.pop("seconds")], facts | fitting | {"limited_by": limit, "tried": n // 2})


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize("name", FITTING)
def test_largest(groups, report, name):
    groups.say(f"largest N that fits: {name}")
    report(
        largest(name, groups.device), f"largest N whose head takes at most {BUDGET >> 30} GiB, D {WIDE.d}, V {WIDE.v}"
    )
