"""Measures a group: several providers of one op on one set of inputs.

Each is called once and compared with the fp64 truth; whoever misses the budget (providers.TOLERANCE) is not timed. Of a
peer that is a finding, of ours a failure. Then the peak memory of one call, then the rounds, in which all take turns
(stopwatch.py).
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import registry
import torch
from head_inputs import Shape
from providers import TOLERANCE, Provider, gradient_bytes, one_line, records
from registry import BARE, COPY, OPS, Op, UnsupportedError

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
SLOW = 3.0  # seconds: beyond, the first call is the one whose memory counts
ROUNDS = ((0.05, 15), (1.0, 5), (3.0, 3), (12.0, 2))  # as many where a call takes less seconds than that, else one
FEWER = ("entropy", "scaling")  # suites of many points, for whose curves three rounds are enough


class Case(NamedTuple):
    """One benchmark: a provider of an op on inputs of a shape, forward alone or with its backward."""

    suite: str
    op: str
    shape: Shape
    inputs: str
    gradients: bool
    provider: str
    axis: str = ""  # which of n, d, v a scaling case varies

    @property
    def way(self) -> str:
        return "forward and backward" if self.gradients else "forward"

    @property
    def dtype(self) -> str:
        return next(name for name, known in DTYPES.items() if known == self.shape.dtype)

    @property
    def group(self) -> str:
        s = self.shape
        sizes = f"({s.n}, {s.d}, {s.v})" if s.v else f"{s.n} tokens"
        axis = f" by {self.axis}" if self.axis else ""
        return f"{self.op} - {s.name} {sizes} {self.dtype} - {self.inputs} - {self.way}{axis}"

    @property
    def id(self) -> str:
        axis = f" by {self.axis} {getattr(self.shape, self.axis)}" if self.axis else ""
        return f"{self.op} - {self.shape.name} - {self.dtype} - {self.inputs} - {self.way}{axis} - {self.provider}"


def large(cases: list[Case]) -> list:
    """The cases as parameters of tests that run with --large alone."""
    return [pytest.param(case, marks=pytest.mark.large) for case in cases]


class MissesError(Exception):
    """By how much a provider misses the error budget."""


class Measured(NamedTuple):
    """Seconds of each round and what else is known; or why there is nothing."""

    seconds: list[float]
    facts: dict[str, Any]
    skipped: str = ""
    failed: str = ""


def rounds(seconds: float) -> int:
    return next((count for most, count in ROUNDS if seconds < most), 1)


def checked(op: Op, provider: Provider, x: Any, found: Any) -> dict[str, float]:
    """The errors against the fp64 truth; MissesError beyond the budget, and for a NaN."""
    if provider.kind == "none":
        return {}
    errors = dict(zip(("value_error", "gradient_error"), op.errors(x, provider, found), strict=True))
    for (name, error), most in zip(errors.items(), TOLERANCE["ours" if provider.op else "peers"], strict=True):
        if error is not None and not error <= most:
            raise MissesError(f"not timed, as it is wrong here: {name.replace('_', ' ')} {error:.2g} beyond {most:g}")
    return {name: error for name, error in errors.items() if error is not None}


def started(case: Case, x: Any, device: torch.device) -> tuple[Callable, float, dict]:
    """The provider's call, the seconds one takes, and its errors, memory and routing."""
    op, watch = OPS[case.op], registry.stopwatch(device)
    provider = op.providers[case.provider]
    call = provider.start(x, case.gradients)
    facts: dict[str, Any] = {}

    def first() -> Any:
        kept: list[Any] = []
        facts.update(records(lambda: kept.append(call())) if provider.op and case.gradients else {})
        return kept[0] if kept else call()

    peak, seconds, found = watch.peak(first)
    facts |= checked(op, provider, x, found)
    if provider.kind == "none":
        facts["products"] = found.value
    if seconds < SLOW or provider.compiles:  # the first call compiled, or filled caches that stay
        del found
        peak, seconds, found = watch.peak(call)
    if peak is not None and op.products[1] and provider.kind != "none":
        extra = max(0, peak - gradient_bytes(found))
        shares = {"peak_share": x.hidden.itemsize, "peak_share_fp32": 4}
        facts |= {"peak_bytes": extra} | {k: extra / (x.shape.n * x.shape.v * size) for k, size in shares.items()}
    return call, seconds, facts


def measure(cases: list[Case], device: torch.device, say: Callable[[str], None]) -> dict[str, Measured]:
    """By provider. All cases differ in their providers alone."""
    case = cases[0]
    op, watch = OPS[case.op], registry.stopwatch(device)
    found: dict[str, Measured] = {}
    calls: dict[str, tuple[Callable, int, dict]] = {}
    begun = time.monotonic()
    say(f"{case.group}: {len(cases)} providers")
    x = registry.inputs_of(op, case.shape, case.inputs, device)
    common = described(case, x)
    for each in cases:
        base = common | {"provider": each.provider, "role": registry.role(each.provider)}
        try:
            call, seconds, facts = started(each, x, device)
        except (ImportError, UnsupportedError) as error:
            found[each.provider] = Measured([], base, skipped=one_line(error))
        except MissesError as error:
            ours = registry.role(each.provider) == "ours"
            found[each.provider] = Measured([], base, **{"failed" if ours else "skipped": one_line(error)})
        except Exception as error:  # whatever a provider does, the others are timed
            found[each.provider] = Measured([], base, failed=f"{type(error).__name__}: {one_line(error)}")
        else:
            count = min(rounds(seconds), 3) if case.suite in FEWER else rounds(seconds)
            calls[each.provider] = call, count, base | facts
            say(f"    {each.provider}: checked, {seconds:.3g} s")
            continue
        say(f"    {each.provider}: {found[each.provider].skipped or found[each.provider].failed}")
    timed = watch.interleaved([call for call, *_ in calls.values()], [count for _, count, _ in calls.values()])
    for (name, (_, _, facts)), seconds in zip(calls.items(), timed, strict=True):
        found[name] = Measured(seconds, facts)
    compare(found, op, case)
    say(f"    {time.monotonic() - begun:.0f} s in all")
    return found


def described(case: Case, x: Any) -> dict[str, Any]:
    op, s = OPS[case.op], case.shape
    facts = {"suite": case.suite, "op": case.op, "shape": s.name, "dtype": case.dtype, "inputs": case.inputs}
    facts |= {"way": case.way, "bytes": op.bytes(s, case.gradients)}
    if not op.products[1]:
        return facts | {"n": x.n}
    facts |= {"n": x.shape.n, "d": x.shape.d, "v": x.shape.v, "flops": op.operations(x.shape, case.gradients)}
    if case.axis:
        facts |= {"axis": case.axis, "value": getattr(x.shape, case.axis)}
    return facts | {"entropy": x.truth.entropy.mean().item()}


def compare(found: dict[str, Measured], op: Op, case: Case) -> None:
    """Rates, and ratios to the bare product and to the best peer, into the facts of all that were timed."""
    medians = {name: statistics.median(each.seconds) for name, each in found.items() if each.seconds}
    bare = next((medians[name] for name in (BARE, COPY) if name in medians), None)
    rivals = [s for name, s in medians.items() if registry.role(name) in ("peer", "torch")]
    for name, seconds in medians.items():
        facts = found[name].facts
        if "flops" in facts:
            facts["tflops"] = facts["flops"] / seconds / 1e12
        else:
            facts["gb_per_s"] = facts["bytes"] / seconds / 1e9
        if bare is not None:
            facts["of_bare"] = seconds / bare
        if rivals and registry.role(name) == "ours":
            facts["of_best_peer"] = min(rivals) / seconds
