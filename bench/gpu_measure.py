"""The measuring process of gpu.py: makes the inputs, checks a provider against the fp64 truth, then times it.

python bench/gpu_measure.py RESULTS.json DEVICE DEADLINE SHAPE...
"""

import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu
import head_inputs
import peers  # noqa: F401  registers them
import providers
import step_kto_inputs
import torch
from providers import TOLERANCE, gradient_bytes, one_line, records
from stepkto_kernels import backends
from stopwatch import Stopwatch

LIMITS = {False: 60.0, True: 120.0}  # seconds an item may take, by whether torch.compile is in it
LM_LIMIT = 300.0
LM_SECONDS = 150.0  # what training takes, with its text, before there is anything to time


class Clock(Stopwatch):
    """Milliseconds of one call, again and again."""

    def rounds(self, call: Callable, count: int) -> list[float]:
        return [seconds * 1e3 for seconds in self.interleaved([call], [count])[0]]

    def time(self, call: Callable, seconds: float) -> dict:
        estimate = statistics.median(self.rounds(call, 2)) / 1e3
        count = min(100, max(3 if estimate > 0.5 else 7, int(seconds / max(estimate, 1e-6))))
        found = sorted(self.rounds(call, count))
        q1, median, q3 = statistics.quantiles(found, n=4)
        return {"median_ms": median, "q1_ms": q1, "q3_ms": q3, "iqr_ms": q3 - q1, "rounds": count}


def peak(call: Callable, clock: Stopwatch) -> float | None:
    """MiB at the highest point of a call beyond what was there before, the gradients it returns not counted."""
    extra, _, found = clock.peak(call)
    return None if extra is None else (extra - gradient_bytes(found)) / 2**20


def chosen_backend(op: str, device: torch.device) -> str:
    order = backends.FASTEST_FIRST.get(device.type, ("reference",))
    if backends.requested() != backends.AUTO:
        return backends.requested()
    return next((name for name in order if backends.why_not(op, name) is None), "reference")


def measure(entry: gpu.Entry, make: head_inputs.Maker, objective: Callable, clock: Clock) -> dict:
    x: Any
    errors: Callable
    if entry.shape == "step_kto":
        x, known, errors = objective(), step_kto_inputs.PROVIDERS, step_kto_inputs.errors
        sizes = {"n": x.n, "bytes": step_kto_inputs.BYTES * x.n}
    else:
        # the language model brings its own shape
        shape = head_inputs.SHAPES.get(entry.shape) or head_inputs.Shape(entry.shape, 0, 0, 0)
        x, known, errors = make(shape, entry.inputs), providers.PROVIDERS, providers.errors
        sizes = x.shape._asdict() | {"entropy": x.truth.entropy.mean().item()}
        quantiles = torch.tensor([0.5, 0.8, 0.95], dtype=torch.float64, device=x.device)
        sizes |= {"entropy_quantiles": x.truth.entropy.quantile(quantiles).tolist()}
        sizes = {name: value for name, value in sizes.items() if name != "name"}
    provider = known[entry.provider]
    facts: dict = {**sizes, "seconds": 0.0}
    if provider.op:
        facts["backend"] = chosen_backend(provider.op, x.device)
    call = provider.start(x, entry.gradients)
    found = call()
    if provider.kind != "none":
        facts["value_error"], facts["gradient_error"] = errors(x, provider, found)
        allowed = TOLERANCE["ours" if provider.op else "peers"]
        for what, most in zip(("value_error", "gradient_error"), allowed, strict=True):
            if facts[what] is not None and not facts[what] <= most:  # NaN, too
                facts["status"] = "wrong"
                facts["reason"] = f"{what.replace('_', ' ')} {facts[what]:.2g} beyond {most:g}"
                return facts
        if provider.op and entry.gradients:
            facts |= records(call)
        if hasattr(x, "shape"):
            del found
            facts["peak_mib"] = peak(call, clock)
            if facts["peak_mib"] is not None:
                logits = x.shape.n * x.shape.v / 2**20
                facts |= {
                    f"peak_share_{dtype}": facts["peak_mib"] / (logits * b) for dtype, b in (("bf16", 2), ("fp32", 4))
                }
    facts |= clock.time(call, gpu.SECONDS if clock.cuda else 0.02)
    seconds = facts["median_ms"] / 1e3
    if hasattr(x, "shape"):
        products = 2 if not entry.gradients else 8 if entry.provider == "bare 8NDV" else 6
        facts["tflops"] = products * x.shape.n * x.shape.d * x.shape.v / seconds / 1e12
    else:
        moved = facts["bytes"] if provider.name != "large copy" else 2 * step_kto_inputs.large_copy(x.device)
        facts["bytes"], facts["gb_per_s"] = moved, moved / seconds / 1e9
    return facts | {"status": "ok"}


def attempt(entry: gpu.Entry, *others) -> dict:
    start = time.monotonic()
    try:
        facts = measure(entry, *others)
    except (ImportError, providers.UnsupportedError) as error:
        facts = {"status": "not available", "reason": one_line(error)}
    except Exception as error:  # whatever a provider does, the next one runs
        facts = {"status": "failed", "reason": f"{type(error).__name__}: {one_line(error)}"}
    return facts | {"seconds": round(time.monotonic() - start, 2)}


def shown(key: str, facts: dict) -> str:
    if facts["status"] != "ok":
        return f"{key}: {facts['status']}, {facts['reason']}"
    extra = [
        f"{name} {facts[name]:.3g}"
        for name in ("rho", "gradient_error", "peak_share_bf16")
        if facts.get(name) is not None
    ]
    return f"{key}: {facts['median_ms']:.3f} ms +- {facts['iqr_ms'] / 2:.3f}  {'  '.join(extra)}"


def main() -> int:
    path, device_name, deadline, *shapes = sys.argv[1:]
    device = torch.device(device_name)
    results = gpu.Results(Path(path))
    done = {gpu.key_of(item) for item in results.data["items"]}
    make, clock = head_inputs.Maker(device, "" if device.type == "cuda" else "tiny"), Clock(device)
    tokens: list[step_kto_inputs.Tokens] = []

    def objective() -> step_kto_inputs.Tokens:
        if not tokens:
            size = {} if clock.cuda else {"n": 4000}
            tokens.append(step_kto_inputs.Tokens(device, **size))
        return tokens[0]

    for entry in gpu.plan(shapes):
        if entry.key in done:
            continue
        left = float(deadline) - time.time()
        untrained = entry.shape == "lm" and not any(shape.name == "lm" for shape, _ in make.known)
        if left < 0 or (clock.cuda and untrained and left < LM_SECONDS):
            break
        if fatal := gpu.gave_up(results.data, entry):
            results.finish(entry, status="failed", reason=f"not tried again: {fatal}")
            continue
        provider = providers.PROVIDERS.get(entry.provider)
        limit = LM_LIMIT if entry.shape == "lm" else LIMITS[bool(provider and provider.compiles)]
        results.begin(entry, limit)
        facts = attempt(entry, make, objective, clock)
        results.finish(entry, **facts)
        print(shown(entry.key, facts), flush=True)
        gc.collect()
        if clock.cuda:
            with contextlib.suppress(Exception):
                torch.cuda.empty_cache()
            try:
                torch.cuda.synchronize()
            except Exception:  # such an error stays with the process
                results.finish(entry, **facts, fatal=True)
                return gpu.STOPPED
    return 0


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
