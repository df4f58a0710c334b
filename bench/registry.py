"""Every op that is timed: its useful operations and least bytes as formulas, its inputs, and who provides it.

N tokens, D hidden size, V vocabulary; `itemsize` bytes an element of hidden states and head. Operations and bytes count
what the result needs and nothing that a method adds, so that recomputing or storing more does not look like speed:

    op                      operations: forward, with backward   bytes: forward, with backward
    linear_logp             2 NDV       6 NDV                    (N + V) D      3 (N + V) D     elements, and 4 N
    linear_logp_entropy     2 NDV       6 NDV                    as above, and 8 N
    linear_logp_stats       2 NDV       6 NDV                    as above, and 17 N
    linear_logp_kl          4 NDV       8 NDV                    2 (N + V) D    4 (N + V) D     elements, and 12 N
    linear_step_kto         2 NDV       6 NDV                    as linear_logp
      with its reference    4 NDV       8 NDV                    (2 N + V) D    (4 N + 3 V) D   elements
    linear_step_kto_exact   4 NDV       8 NDV                    as linear_logp_kl
    step_kto                                                     12 N with its backward: two log-probs in, a slope out
    reference_points                                             4 N

Heads are bound by operations and held against the bare matrix products; the last two are bound by bytes, and held
against a copy of as many. `make` gives a set of inputs with its fp64 truth, `errors` compares with that.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import peers
import providers
import step_kto_inputs
import stepkto_kernels as sk
import torch
from head_inputs import Inputs, Maker, Shape
from providers import Found, Provider, UnsupportedError, differentiated, require
from stepkto_kernels import backends
from stopwatch import Stopwatch
from torch import Tensor
from torch.nn import functional as F

FILTER_EPS = 2.0**-9  # for both dtypes: "auto" leaves out nothing in fp32
BACKENDS = ("native", "triton", "reference")
BARE = "bare products"
COPY = "copy of its bytes"


class Op(NamedTuple):
    name: str
    providers: dict[str, Provider]
    products: tuple[int, int]  # NDV: forward, with backward
    errors: Callable[[Any, Provider, Found], tuple[float, float | None]]
    elements: Callable[[int, int, bool], float] = lambda n, v, gradients: 0.0  # over D; itemsize bytes each
    per_token: Callable[[bool], int] = lambda gradients: 0  # bytes

    def operations(self, shape: Shape, gradients: bool) -> int:
        return self.products[gradients] * shape.n * shape.d * shape.v

    def bytes(self, shape: Shape, gradients: bool) -> int:
        itemsize = getattr(torch, shape.dtype).itemsize
        weights = self.elements(shape.n, shape.v, gradients) * shape.d * itemsize
        return int(weights) + self.per_token(gradients) * shape.n


def on(backend: str, op: str, kind: str, function: Callable[..., Callable], **options) -> Provider:
    """Ours on one backend, which says itself why it cannot run. `function(inputs, **options)` gives what is called."""

    def start(x: Any, gradients: bool) -> Callable[[], Found]:
        reason = backends.why_not(op, backend)
        require(reason is None, f"{op}, backend {backend}: {reason}")
        require(backend != "native" or x.device.type == "cpu", "the C++ kernels are for CPUs")
        require(backend != "triton" or x.device.type == "cuda", "Triton's kernels need a GPU")
        inner = function(x, **options)

        def run(*tensors: Tensor):
            with sk.backend(backend):
                return inner(*tensors)

        if isinstance(x, Inputs):
            return differentiated(run, kind, x, gradients)
        return step_kto_inputs.both(run, x) if kind == "objective" else lambda: Found(run(x.logp))

    return Provider(f"ours, {backend}", start, kind, op=op)


def ours(op: str, kind: str, function: Callable[..., Callable], suffix: str = "", **options) -> dict[str, Provider]:
    found = {f"ours, {name}{suffix}": on(name, op, kind, function, **options) for name in BACKENDS}
    return {name: provider._replace(name=name) for name, provider in found.items()}


FASTER: dict[tuple, str] = {}  # of two ways to multiply, which depends on dtype, shapes and transposition


def product(watch: Stopwatch, a: Tensor, b: Tensor, out: Tensor) -> tuple[str, Callable]:
    """a @ b by the way that is faster here, and its name."""
    ways = {
        "mm(out=)": functools.partial(torch.mm, a, b, out=out),
        "F.linear": functools.partial(F.linear, a, b.T),
    }
    key = a.dtype, a.shape, a.stride(), b.shape, b.stride()
    if key not in FASTER:
        calls = list(ways.values())
        for call in calls:
            call()
        seconds = [min(found) for found in watch.interleaved(calls, [3, 3])]
        FASTER[key] = min(zip(seconds, ways, strict=True))[1]
    return FASTER[key], ways[FASTER[key]]


def bare(forwards: int) -> Provider:
    """The head's products alone, into buffers that exist: what no exact method can be faster than. `forwards` heads are
    multiplied forward and one backward; the value says how."""

    def start(x: Inputs, gradients: bool) -> Callable[[], Found]:
        h, w = x.hidden, x.weight
        z = h @ w.T
        watch = stopwatch(x.device)
        products = [product(watch, h, w.T, z)] * forwards
        if gradients:
            products += [product(watch, z, w, torch.zeros_like(h)), product(watch, z.T, h, torch.zeros_like(w))]

        def run() -> Found:
            for _, call in products:
                call()
            return Found(", ".join(name for name, _ in products))

        return run

    return Provider(BARE, start, kind="none")


@functools.cache
def stopwatch(device: torch.device) -> Stopwatch:
    return Stopwatch(device)


@functools.cache
def maker(device: torch.device) -> Maker:
    return Maker(device, keep=1 if device.type == "cuda" else 4)  # the fp64 truth is slow to come by on a CPU


def peers_of(*kinds: str) -> dict[str, Provider]:
    return {
        name: each
        for name, each in providers.PROVIDERS.items()
        if each.kind in kinds and not each.op and not name.startswith("bare")
    }


def entropy(x: Inputs, **options) -> Callable:
    return lambda h, w: tuple(sk.linear_logp_entropy(h, w, x.target, softcap=x.shape.softcap, **options))


def stats(x: Inputs, **options) -> Callable:
    return lambda h, w: tuple(sk.linear_logp_stats(h, w, x.target, softcap=x.shape.softcap, **options))


def full_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logp_nv = torch.log_softmax((hidden @ weight.T).float(), -1)
    return logp_nv.gather(1, target[:, None]).squeeze(1), -(logp_nv.exp() * logp_nv).sum(-1)


def full_stats(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    z_nv = (hidden @ weight.T).float()
    logp_nv = torch.log_softmax(z_nv, -1)
    logp, entropy = logp_nv.gather(1, target[:, None]).squeeze(1), -(logp_nv.exp() * logp_nv).sum(-1)
    return logp, entropy, (2 * logp_nv).logsumexp(-1), z_nv.mean(-1), z_nv.argmax(-1) == target


def full_kl(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logp_nv = torch.log_softmax((hidden @ weight.T).float(), -1)
    with torch.no_grad():
        ref_logp_nv = torch.log_softmax((ref_hidden @ weight.T).float(), -1)
        kl_n = (logp_nv.exp() * (logp_nv - ref_logp_nv)).sum(-1)
    return logp_nv.gather(1, target[:, None]).squeeze(1), kl_n


def plain(kind: str, function: Callable, *names: str, compiles: bool = False) -> Provider:
    """Plain torch with all logits, given the inputs' tensors of these names behind hidden states and head."""

    def start(x: Inputs, gradients: bool) -> Callable[[], Found]:
        require(x.shape.softcap is None, "written without a softcap")
        if compiles:
            peers.start_compiler(x)
        inner = torch.compile(function, dynamic=False, fullgraph=True) if compiles else function
        others = [getattr(x, name) for name in names]
        return differentiated(lambda h, w: inner(h, w, *others), kind, x, gradients)

    return Provider("full logits" + ", torch.compile" * compiles, start, kind, compiles=compiles)


def plain_pair(kind: str, function: Callable, *names: str) -> dict[str, Provider]:
    pair = (plain(kind, function, *names, compiles=compiles) for compiles in (False, True))
    return {each.name: each for each in pair}


def ours_of_step_kto(x: step_kto_inputs.Tokens) -> Callable:
    return x.fused


def compiled(function: Callable) -> Callable:
    def start(x: step_kto_inputs.Tokens, gradients: bool) -> Callable[[], Found]:
        peers.require_compiler(x.device)
        return function(torch.compile(x.by_hand, dynamic=False), x)

    return start


def points(x: step_kto_inputs.Tokens) -> Callable:
    return lambda values: sk.reference_points(values, x.batch["cu_seqlens"], x.batch["cu_steps"]).points()


def points_by_hand(values: Tensor, cu_seqlens: Tensor, cu_steps: Tensor) -> list[Tensor]:
    """What one would write: the mean over segments of their sums."""
    running = torch.cat([values.new_zeros(1), values.cumsum(0)])
    return [running[cu].diff().mean().clamp(min=0) for cu in (cu_seqlens.long(), cu_steps.long())]


def plain_points(compiles: bool) -> Provider:
    def start(x: step_kto_inputs.Tokens, gradients: bool) -> Callable[[], Found]:
        if compiles:
            peers.require_compiler(x.device)
        inner = torch.compile(points_by_hand, dynamic=False, fullgraph=True) if compiles else points_by_hand
        boundaries = x.batch["cu_seqlens"], x.batch["cu_steps"]
        return lambda: Found(inner(x.logp, *boundaries))

    return Provider("plain torch" + ", torch.compile" * compiles, start, "points", compiles=compiles)


def points_errors(x: step_kto_inputs.Tokens, provider: Provider, found: Found) -> tuple[float, None]:
    """The sums of all segments of a kind are the sum of all tokens."""
    total = x.logp.double().sum()
    wanted = [(total / (len(x.batch[name]) - 1)).clamp(min=0).item() for name in ("cu_seqlens", "cu_steps")]
    pairs = zip(found.value, wanted, strict=True)
    return max((abs(value.item() - true) / max(abs(true), 1e-30) for value, true in pairs), default=0.0), None


def copies(bytes_a_token: int) -> Provider:
    def start(x: step_kto_inputs.Tokens, gradients: bool) -> Callable[[], Found]:
        return step_kto_inputs.copy(x, bytes_a_token * x.n // 2)

    return Provider(COPY, start, "none")


def head(name: str, found: dict[str, Provider], forwards: int, elements: Callable, outputs: int) -> Op:
    everyone = {BARE: bare(forwards)} | found
    products = 2 * forwards, 2 * forwards + 4
    return Op(name, everyone, products, providers.errors, elements, lambda gradients: outputs)


STEP_KTO = step_kto_inputs.PROVIDERS
GRAPHS = ("ours, as a CUDA graph", "plain torch", "plain torch, as a CUDA graph")
OPS = {
    op.name: op
    for op in (
        head(
            "linear_logp",
            ours("linear_logp", "logp", providers.linear_logp, filter_eps=FILTER_EPS)
            | {
                f"ours, {name}, exact": on(name, "linear_logp", "logp", providers.linear_logp, filter_eps=0.0)
                for name in ("native", "triton")
            }
            | peers_of("logp", "mean"),
            1,
            lambda n, v, gradients: (3 if gradients else 1) * (n + v),
            4,
        ),
        head(
            "linear_logp_entropy",
            ours("linear_logp_entropy", "entropy", entropy, filter_eps=FILTER_EPS)
            | plain_pair("entropy", full_entropy, "target")
            | peers_of("entropy"),
            1,
            lambda n, v, gradients: (3 if gradients else 1) * (n + v),
            8,
        ),
        head(
            "linear_logp_stats",
            ours("linear_logp_stats", "stats", stats, filter_eps=FILTER_EPS)
            | plain_pair("stats", full_stats, "target")
            | peers_of("stats"),
            1,
            lambda n, v, gradients: (3 if gradients else 1) * (n + v),
            17,
        ),
        head(
            "linear_logp_kl",
            ours("linear_logp_kl", "kl", providers.linear_logp_kl, filter_eps=FILTER_EPS)
            | plain_pair("kl", full_kl, "ref_hidden", "target"),
            2,
            lambda n, v, gradients: (4 if gradients else 2) * (n + v),
            12,
        ),
        head(
            "linear_step_kto",
            ours("linear_step_kto", "kto", providers.linear_step_kto, ", linear_step_kto", filter_eps=FILTER_EPS)
            | peers_of("kto"),
            1,
            lambda n, v, gradients: (3 if gradients else 1) * (n + v),
            4,
        ),
        head(
            "linear_step_kto with its reference",
            ours(
                "linear_step_kto", "kto with reference", providers.linear_step_kto_with_reference,
                ", linear_step_kto with its reference", filter_eps=FILTER_EPS,
            )
            | peers_of("kto with reference"),
            2,
            lambda n, v, gradients: 4 * n + 3 * v if gradients else 2 * n + v,
            8,
        ),
        head(
            "linear_step_kto_exact",
            ours("linear_step_kto_exact", "kto exact", providers.linear_step_kto_exact, filter_eps=FILTER_EPS),
            2,
            lambda n, v, gradients: (4 if gradients else 2) * (n + v),
            12,
        ),
        Op(
            "step_kto",
            {COPY: copies(12)}
            | ours("step_kto", "objective", ours_of_step_kto)
            | {name: STEP_KTO[name] for name in GRAPHS}
            | {
                "plain torch, torch.compile": Provider(
                    "plain torch, torch.compile", compiled(step_kto_inputs.both), "objective", compiles=True
                )
            },
            (0, 0),
            step_kto_inputs.errors,
            per_token=lambda gradients: 12,
        ),
        Op(
            "reference_points",
            {COPY: copies(4)}
            | ours("reference_points", "points", points)
            | {each.name: each for each in (plain_points(False), plain_points(True))},
            (0, 0),
            points_errors,
            per_token=lambda gradients: 4,
        ),
    )
}  # fmt: skip


def role(provider: str) -> str:
    """ours, bare (products or copies), torch (plain torch, as anyone would write it) or peer (a library's function)."""
    if provider.startswith("ours"):
        return "ours"
    if provider in (BARE, COPY):
        return "bare"
    return "torch" if provider.startswith(("full logits", "plain torch", "chunked logits")) else "peer"


def inputs_of(op: Op, shape: Shape, name: str, device: torch.device) -> Any:
    if op.products[1]:
        return maker(device)(shape, name)
    return tokens(device, shape.n, shape.completion)


@functools.lru_cache(maxsize=1)
def tokens(device: torch.device, n: int, completion: int) -> step_kto_inputs.Tokens:
    return step_kto_inputs.Tokens(device, n, completion)


__all__ = ["BARE", "COPY", "OPS", "Op", "UnsupportedError", "inputs_of", "role", "stopwatch"]
