"""The head on a CPU: the C++ kernels beside the bare products that any head needs, the reference backend and the peers.

By default on one small shape, the same way; `--goals` takes the two shapes that the goals in native_table.py are stated
for, about half an hour. Inputs, truths and peers are those of the GPU runs (head_inputs.py, peers.py).

filter_eps is 2^-9 in both dtypes ("auto" leaves out nothing in fp32), and 0 for whoever is called exact. Flat inputs
are for ours alone: what a method that visits everything costs does not depend on what it visits.
"""

import ctypes
import functools
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import peers
import providers
import pytest
import stepkto_kernels as sk
import torch
from gpu_measure import TOLERANCE, one_line, records
from head_inputs import Inputs, Maker, Shape
from providers import Found, Provider, UnsupportedError, differentiated, require
from stepkto_kernels import backends
from torch import Tensor
from torch.nn import functional as F

SMALL = (Shape("small", 256, 512, 8192, completion=64),)
GOALS = (Shape("32k", 2048, 1024, 32768), Shape("152k", 4096, 896, 151936))
SHAPES = {shape.name: shape for shape in SMALL + GOALS}
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
PEAKED, FLAT = "peaked 0.6", "flat"
FORWARD, BOTH = "forward", "forward and backward"
NATIVE, FILTER_EPS = "native", 2.0**-9
LARGE = 1e12  # operations: beyond, only what a goal is about, and peers run once
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

make = Maker(torch.device("cpu"))  # keeps one set of inputs, so the order of the cases counts


def ours(function: Callable, backend: str = NATIVE, kind: str = "logp", **options) -> Provider:
    def start(x: Inputs, gradients: bool) -> Callable[[], Found]:
        reason = backends.why_not("linear_logp", backend)
        require(reason is None, f"linear_logp, {backend}: {reason}")
        inner = function(x, **options)

        def run(hidden: Tensor, weight: Tensor):
            with sk.backend(backend):
                return inner(hidden, weight)

        return differentiated(run, kind, x, gradients)

    return Provider(function.__name__, start, kind, op="linear_logp")


def liger_compiled(kind: str, reference: bool) -> Provider:
    """Compiled here too: peers.py does so on a GPU only."""

    def start(x: Inputs, gradients: bool) -> Callable[[], Found]:
        return differentiated(peers.liger_kto(x, reference, compiled=True), kind, x, gradients)

    return Provider("Liger KTO", start, kind, compiles=True)


def seconds_of(call: Callable) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


FASTER: dict[tuple, str] = {}  # of two ways to multiply, which depends on dtype, shapes and transposition


def product(a: Tensor, b: Tensor, out: Tensor) -> tuple[str, Callable]:
    """a @ b by the way that is faster here, and its name."""
    ways = {
        "mm(out=)": functools.partial(torch.mm, a, b, out=out),
        "F.linear": functools.partial(F.linear, a, b.T),
    }
    key = a.dtype, a.shape, a.stride(), b.shape, b.stride()
    if key not in FASTER:
        found = {name: seconds_of(call) for name, call in ways.items()}
        if max(found.values()) < 1:
            found = {name: min(seconds_of(call) for _ in range(3)) for name, call in ways.items()}
        FASTER[key] = min(found, key=lambda name: found[name])
    return FASTER[key], ways[FASTER[key]]


def bare(x: Inputs, gradients: bool) -> Callable[[], Found]:
    """The head's products alone, into buffers that exist; its value is how they were taken."""
    h, w = x.hidden, x.weight
    z = h @ w.T
    products = [product(h, w.T, z)]
    if gradients:
        products += [product(z, w, torch.zeros_like(h)), product(z.T, h, torch.zeros_like(w))]

    def run() -> Found:
        for _, call in products:
            call()
        return Found(", ".join(name for name, _ in products))

    return run


PEERS = {
    name: providers.PROVIDERS[name]
    for name in ("TRL", "torch linear_cross_entropy", "Liger KTO", "Liger KTO with its reference")
} | {
    "Liger KTO, compiled": liger_compiled("kto", reference=False),
    "Liger KTO with its reference, compiled": liger_compiled("kto with reference", reference=True),
}
SIDE = {"ours, reference": ours(providers.linear_logp, "reference")} | {
    name: providers.PROVIDERS[name] for name in ("torch linear_cross_entropy, chunked", "full logits")
}
OURS = {
    "ours, native": ours(providers.linear_logp, filter_eps=FILTER_EPS),
    "ours, native, exact": ours(providers.linear_logp, filter_eps=0.0),
    "ours, native, linear_step_kto": ours(providers.linear_step_kto, kind="kto", filter_eps=FILTER_EPS),
    "ours, native, linear_step_kto with its reference": ours(
        providers.linear_step_kto_with_reference, kind="kto with reference", filter_eps=FILTER_EPS
    ),
}
PROVIDERS = {"bare products": Provider("bare", bare, kind="none")} | OURS | SIDE | PEERS


def cases(shape: Shape) -> list[tuple[str, str, str]]:
    """(inputs, way, provider)"""
    chief = ["bare products", "ours, native"]
    large = is_large(shape)
    return [
        *((PEAKED, FORWARD, who) for who in (chief if large else [*chief, "ours, reference"])),
        *((PEAKED, BOTH, who) for who in PROVIDERS if not (large and who in SIDE)),
        *((FLAT, BOTH, who) for who in chief),
    ]


def is_large(shape: Shape) -> bool:
    return 6 * shape.n * shape.d * shape.v > LARGE


def pytest_generate_tests(metafunc):
    shapes = GOALS if metafunc.config.getoption("--goals") else SMALL
    names = "shape", "dtype", "inputs", "way", "who"
    found = [(shape.name, dtype, *case) for shape in shapes for dtype in DTYPES for case in cases(shape)]
    metafunc.parametrize(names, found, ids=[" - ".join(case) for case in found])


def memory(field: str) -> int:
    lines = STATUS.read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


@contextmanager
def watched_peak() -> Iterator[dict]:
    """Under "bytes" the highest resident memory of the block beyond that before it; nothing where /proc cannot tell.

    Writing 5 to clear_refs resets the high-water mark. glibc keeps what was freed and would hand it out again without
    a trace, so that is returned to the system first. What libraries keep for good after a first call (packing buffers
    of a matrix product, thread pools) counts for those providers alone that run once.
    """
    found: dict = {}
    if not CLEAR.exists():
        yield found
        return
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
    CLEAR.write_text("5")
    before = memory("VmRSS")
    yield found
    found["bytes"] = memory("VmHWM") - before


def check(x: Inputs, provider: Provider, found: Found) -> dict:
    """The errors against the fp64 truth; too large a one means that there is nothing to time."""
    if provider.kind == "none":
        return {"products": found.value}
    names = "logp_error" if provider.kind == "logp" else "value_error", "gradient_error"
    errors = dict(zip(names, providers.errors(x, provider, found), strict=True))
    for (name, error), most in zip(errors.items(), TOLERANCE["ours" if provider.op else "peers"], strict=True):
        assert error is None or error <= most, f"{name} {error:.2g} beyond {most:g}"  # NaN, too
    return {name: error for name, error in errors.items() if error is not None}


def rounds(seconds: float) -> int:
    return 5 if seconds < 1 else 3 if seconds < 5 else 2 if seconds < 12 else 1


def test_head(benchmark, shape, dtype, inputs, way, who):
    provider = PROVIDERS[who]
    x = make(SHAPES[shape]._replace(dtype=DTYPES[dtype]), inputs)
    try:
        call = provider.start(x, way == BOTH)
    except (ImportError, UnsupportedError) as error:
        pytest.skip(f"{who}: {one_line(error)}")
    n, d, v = x.shape.n, x.shape.d, x.shape.v
    facts = {"shape": shape, "size": f"({n}, {d}, {v})", "dtype": dtype, "inputs": inputs, "way": way}
    facts["entropy"] = x.truth.entropy.mean().item()
    last: list[Found] = []

    def run() -> None:
        last.clear()  # two rounds' gradients at once would count as memory
        last.append(call())

    # a peer that takes half a minute runs once, and that result is checked; compiling must not count
    once = who in PEERS and is_large(x.shape) and not provider.compiles
    count, warmup = 1, 0
    if not once:
        start = time.perf_counter()
        facts |= records(run)
        seconds = time.perf_counter() - start
        facts |= check(x, provider, last.pop())
        if provider.compiles and not is_large(x.shape):  # the first call compiled
            seconds = seconds_of(run)
        count, warmup = rounds(seconds), 1 if seconds < 1 else 0
    benchmark.group = f"head {shape} {facts['size']} {dtype} {inputs}, {way}"
    with watched_peak() as peak:
        benchmark.pedantic(run, rounds=count, warmup_rounds=warmup)
    found = last.pop()
    benchmark.has_error = True  # out of the JSON, unless the next lines pass
    facts |= check(x, provider, found)
    benchmark.has_error = False
    if "bytes" in peak:
        kept = sum(g.nbytes for g in (found.dhidden, found.dweight) if g is not None)
        extra = max(0, peak["bytes"] - kept)
        shares = {"peak_share": x.hidden.itemsize, "peak_share_fp32": 4}
        facts |= {"peak_mb": extra / 1e6} | {name: extra / (n * v * size) for name, size in shares.items()}
    if benchmark.stats is not None:  # None under --benchmark-disable
        facts["gflops"] = (2 if way == FORWARD else 6) * n * d * v / benchmark.stats.stats.median / 1e9
    benchmark.extra_info.update({k: float(f"{f:.4g}") if isinstance(f, float) else f for k, f in facts.items()})
