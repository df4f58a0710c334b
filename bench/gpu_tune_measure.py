"""What gpu_tune.py times: a candidate in place of its module's config, the parts of a backward, its workspaces."""

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import gpu_measure
import head_inputs
import providers
import torch
from gpu_tune_candidates import KERNELS, configured, replaced
from stepkto_kernels.linear_logp import triton_backward, triton_forward, triton_route
from stepkto_kernels.linear_logp.op import FILTER_EPS_16_BIT
from stepkto_kernels.linear_logp_kl import triton_forward as triton_kl

LAUNCHED: dict[Any, tuple[str, ...]] = {
    triton_forward: ("linear_logp_tiles", "linear_logp_rows"),
    triton_route: ("route_rows", "tile_popularity", "rarest_tiles", "route_pairs"),
    triton_backward: ("list_rows", "pair_gradients", "weight_gradients", "hidden_gradients"),
    triton_kl: ("linear_logp_kl_tiles", "linear_logp_kl_rows"),
}
WORKSPACES = range(25, 30)  # powers of 2, bytes
SECONDS = 0.3  # of timed calls a candidate,
ROUNDS = 3  # at least, and at most three times as many
AHEAD = 20_000_000  # clock cycles that the device waits for the host: about 11 ms
VALUES, GRADIENTS = 1e-4, 1e-2  # a candidate's largest difference from the shipped one: nats, of a gradient's norm


class Clock:
    """Marks in the device's time."""

    def __init__(self, device: torch.device):
        self.cuda, self.flush = device.type == "cuda", gpu_measure.Clock(device).flush

    def begin(self) -> None:
        """The L2 is flushed, and the device waits until the host has launched a call's work."""
        self.flush.zero_()
        if self.cuda:
            torch.cuda._sleep(AHEAD)

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def between(self, start: Any, stop: Any) -> float:
        """Milliseconds."""
        return start.elapsed_time(stop) if self.cuda else (stop - start) * 1e3


class Spy:
    """Stands in a module for one of its kernels, and marks each launch."""

    def __init__(self, kernel: Any, clock: Clock):
        self.kernel, self.clock, self.compiled = kernel, clock, None
        self.marks: list[tuple] = []

    def __getitem__(self, grid: Any):
        def launch(*arguments, **options):
            start = self.clock.mark()
            self.compiled = self.kernel[grid](*arguments, **options)
            self.marks.append((start, self.clock.mark()))

        return launch

    def each(self) -> list[float]:
        return [self.clock.between(*marks) for marks in self.marks]


class Problem:
    """The calls of a set of inputs. What they return is compared: log-probabilities, or gradients."""

    def __init__(self, x: Any):
        self.x, self.options = x, (1.0, x.shape.softcap, 1.0, -100)
        self.other_head = None
        self.saved = triton_forward.linear_logp_forward(x.hidden, x.weight, x.target, None, *self.options, False)

    def forward(self) -> tuple:
        x = self.x
        return triton_forward.linear_logp_forward(x.hidden, x.weight, x.target, None, *self.options, False)[:1]

    def backward(self) -> tuple:
        x, options = self.x, (*self.options, FILTER_EPS_16_BIT)
        inputs = x.slope, x.hidden, x.weight, x.target, *self.saved, None
        return triton_backward.linear_logp_backward(*inputs, *options, True, True, False)[:2]

    def kl(self, ref_weight: Any) -> tuple:
        x = self.x
        heads = x.hidden, x.weight, x.ref_hidden, ref_weight
        return triton_kl.linear_logp_kl_forward(*heads, x.target, None, None, *self.options)[:3]

    def one_head(self) -> tuple:
        return self.kl(self.x.weight)

    def two_heads(self) -> tuple:
        self.other_head = self.x.weight.clone() if self.other_head is None else self.other_head
        return self.kl(self.other_head)


class Idle:
    """Stands for a kernel while another is compiled."""

    def __getitem__(self, grid: Any):
        return lambda *arguments, **options: None


class Compiler(Idle):
    def __init__(self, kernel: Any):
        self.kernel = kernel

    def __getitem__(self, grid: Any):
        return lambda *arguments, **options: self.kernel.warmup(*arguments, grid=grid, **options)


def compile_ahead(name: str, values: tuple[int, ...], shape: head_inputs.Shape, device: str) -> None:
    """Into Triton's cache on disk, in a process of its own: one call with every launch left out."""
    new, kernel = torch.empty, KERNELS[name]
    hidden, weight = (new(size, shape.d, dtype=torch.bfloat16, device=device) for size in (shape.n, shape.v))
    target, slope = torch.zeros(shape.n, dtype=torch.int64, device=device), torch.ones(shape.n, device=device)
    x = SimpleNamespace(hidden=hidden, weight=weight, ref_hidden=hidden, target=target, slope=slope, shape=shape)
    compiler = Compiler(getattr(kernel.module, kernel.function))
    with contextlib.ExitStack() as stack:
        for module, names in LAUNCHED.items():
            stack.enter_context(replaced(module, **dict.fromkeys(names, Idle())))
        problem = Problem(x)
        stack.enter_context(configured(kernel, values))
        stack.enter_context(replaced(kernel.module, **{kernel.function: compiler}))
        getattr(problem, kernel.call)()


def rounds(call: Callable, clock: Clock, spies: list[Spy], read: Callable) -> list:
    """What `read` finds after each of some calls; their first is for warming up."""
    found: list = []
    call()
    stop = time.monotonic() + SECONDS
    while len(found) < ROUNDS or (len(found) < 3 * ROUNDS and time.monotonic() < stop):
        for spy in spies:
            spy.marks = []
        clock.begin()
        start, before = clock.mark(), time.perf_counter()
        call()
        host, end = (time.perf_counter() - before) * 1e3, clock.mark()
        clock.wait()
        found.append(read(start, end, host))
    return found


def difference(found: tuple, wanted: tuple, gradients: bool) -> float:
    def one(a: Any, b: Any) -> torch.Tensor:
        norm = torch.linalg.vector_norm
        if gradients:
            return norm(a - b, dtype=torch.float32) / norm(b, dtype=torch.float32)
        return (a - b).abs().max()

    return torch.stack([one(a, b) for a, b in zip(found, wanted, strict=True)]).max().item()  # NaN stays NaN


def attempt(name: str, values: tuple[int, ...], problem: Problem, clock: Clock, wanted: dict[str, tuple]) -> dict:
    """`wanted` holds the results of the shipped configurations, by call."""
    kernel = KERNELS[name]
    spy, call = Spy(getattr(kernel.module, kernel.function), clock), getattr(problem, kernel.call)
    gradients = kernel.call == "backward"
    facts: dict = {}
    try:
        if kernel.call not in wanted:
            wanted[kernel.call] = call()
        with configured(kernel, values), replaced(kernel.module, **{kernel.function: spy}):
            facts["difference"] = difference(call(), wanted[kernel.call], gradients)
            if not facts["difference"] <= (limit := GRADIENTS if gradients else VALUES):  # NaN, too
                reason = f"{facts['difference']:.2g} from the shipped one's result, beyond {limit:g}"
                return facts | {"status": "wrong", "reason": reason}
            times = rounds(call, clock, [spy], lambda *_: sum(spy.each()))
    except Exception as error:  # whatever a candidate does, the next one runs
        return facts | {"status": "failed", "reason": f"{type(error).__name__}: {providers.one_line(error)}"}
    resources = {field: getattr(spy.compiled, field, None) for field in ("n_regs", "n_spills")}
    q1, median, q3 = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return facts | resources | {"status": "ok", "ms": median, "q1_ms": q1, "q3_ms": q3, "rounds": len(times)}


def work(problem: Problem, routes: Any) -> dict[str, float]:
    """Useful operations of each kernel; of the backward's, where its routes are known."""
    shape, block = problem.x.shape, triton_route.BLOCK
    product = 2.0 * shape.n * shape.d * shape.v
    found = {"forward": product, "kl": 2 * product, "kl one head": 2 * product}
    if routes is None:
        return found
    pairs, blocks = (routes.rank >= 0).sum().item(), routes.active_before[:, -1].sum().item()
    visited = 2.0 * shape.d * block * pairs
    return found | {"pair": visited, "weight": visited, "hidden": 2.0 * shape.d * block * block * blocks}


def parts(problem: Problem, clock: Clock) -> tuple[list[dict], dict[str, float]]:
    """Where the time of a backward goes, and the operations of every kernel."""
    spies = {name: Spy(getattr(triton_backward, name), clock) for name in LAUNCHED[triton_backward]}
    routed: list = []

    def route(*arguments):
        routed[:] = [shipped(*arguments)]
        return routed[0]

    def read(start: Any, end: Any, host: float) -> dict[str, float]:
        tiles = routed[0].first_tile.tolist()
        empty = [c for c, (a, b) in enumerate(itertools.pairwise(tiles)) if a >= b]
        each = {name: spy.each() for name, spy in spies.items()}
        found = {"routing": clock.between(start, spies["list_rows"].marks[0][0])}
        found |= {name: sum(x for c, x in enumerate(times) if c not in empty) for name, times in each.items()}
        found[f"{len(empty)} empty of {len(tiles) - 1} chunks"] = sum(
            times[c] for times in each.values() for c in empty
        )
        return found | {"all of it": clock.between(start, end), "host": host}

    shipped = triton_backward.route
    with replaced(triton_backward, **spies, route=route):
        found = rounds(problem.backward, clock, list(spies.values()), read)
    operations = work(problem, routed[0])
    of = {KERNELS[name].function: operations[name] for name in ("pair", "weight", "hidden")}
    rows = []
    for part in found[0]:
        ms = statistics.median(each[part] for each in found)
        rows.append({"part": part, "ms": ms} | ({"tflops": of[part] / ms / 1e9} if part in of else {}))
    wall = gpu_measure.Clock(problem.x.device).time(problem.backward, SECONDS)["median_ms"]
    return [*rows, {"part": "host and device, as gpu.py times it", "ms": wall}], operations


def workspaces(problem: Problem, clock: Clock) -> list[dict]:
    found = []
    for power in WORKSPACES:
        try:
            with replaced(triton_backward, WORKSPACE_BYTES=2**power):
                times = rounds(problem.backward, clock, [], lambda start, end, host: (clock.between(start, end), host))
                call = lambda: providers.Found(None, *problem.backward())  # noqa: E731
                mib = gpu_measure.peak(call, gpu_measure.Clock(problem.x.device))
            device, host = (statistics.median(column) for column in zip(*times, strict=True))
            found.append({"bytes": f"2^{power}", "ms": device, "host_ms": host, "peak_mib": mib})
        except Exception as error:
            found.append({"bytes": f"2^{power}", "reason": f"{type(error).__name__}: {providers.one_line(error)}"})
    return found
