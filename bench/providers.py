"""Who is timed: ours and the bare products here, the peers in peers.py, all with one signature.

`start(inputs, gradients)` returns a call without arguments, and that returns Found(value, dhidden, dweight), the last
two None where no gradients were asked for. `kind` says what the value is and how the gradients came about:

    logp    (N,) log-probabilities; gradients of sum_n inputs.slope_n * logp_n
    kl      logp, and the exact KL beside it; gradients of logp as above
    entropy, stats      logp, and the entropy and more beside it; gradients of logp as above
    mean    a scalar, -mean(logp), and its gradients: for peers that are at their best that way
    kto, kto with reference, kto exact      the objective's loss and its gradients
    none    a product: nothing to check

A peer that is not importable, or cannot do what the inputs ask for, raises in `start`; so may anything.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import stepkto_kernels as sk
import torch
from head_inputs import Inputs
from torch import Tensor

BETA = 0.02  # small, so that bf16's rounding of 512 summed log-probabilities moves the slopes by a few per cent only


# relative, or nats: (of values, of gradients). bf16 logits cost peers several hundredths of a nat, and gradients summed
# in bf16 several per cent; beyond this something else is wrong. Ours never round logits.
TOLERANCE = {"ours": (5e-3, 0.02), "peers": (0.5, 0.12)}


SLOPED = ("logp", "kl", "entropy", "stats")  # kinds whose gradients are those of sum_n slope_n * logp_n


class Found(NamedTuple):
    value: Any = None
    dhidden: Tensor | None = None
    dweight: Tensor | None = None


class Provider(NamedTuple):
    name: str
    start: Callable[[Any, bool], Callable[[], Found]]
    kind: str = "logp"
    op: str = ""  # ours: whose backend is recorded; peers have none
    compiles: bool = False  # or tunes itself, at its first call: it may take minutes to start


class UnsupportedError(Exception):
    """Why a provider cannot take these inputs."""


def require(condition: bool, reason: str) -> None:
    if not condition:
        raise UnsupportedError(reason)


def differentiated(function: Callable, kind: str, x: Inputs, gradients: bool) -> Callable[[], Found]:
    """`function(hidden, weight)` returns what `kind` says; the gradients are taken of it by autograd."""
    if not gradients:

        @torch.no_grad()
        def forward() -> Found:
            return Found(function(x.hidden, x.weight))

        return forward
    leaves = [x.hidden.detach().requires_grad_(), x.weight.detach().requires_grad_()]

    def both() -> Found:
        value = function(*leaves)
        first = value[0] if isinstance(value, tuple) else value
        slope = x.slope.to(first.dtype) if kind in SLOPED else None
        gradients = torch.autograd.grad(first, leaves, slope)
        value = tuple(v.detach() for v in value) if isinstance(value, tuple) else value.detach()
        return Found(value, *gradients)

    return both


PROVIDERS: dict[str, Provider] = {}


def provider(name: str, kind: str = "logp", op: str = "", compiles: bool = False) -> Callable:
    """Registers `make(inputs)`, which returns the function that `differentiated` describes."""

    def add(make: Callable[[Inputs], Callable]) -> Callable:
        def start(x: Inputs, gradients: bool) -> Callable[[], Found]:
            return differentiated(make(x), kind, x, gradients)

        PROVIDERS[name] = Provider(name, start, kind, op, compiles)
        return make

    return add


def bare(x: Inputs, forwards: int, backwards: int) -> Callable[[], Found]:
    """The head's products alone, into buffers that exist: what no exact method can be faster than."""
    h, w = x.hidden, x.weight
    z = h @ w.T
    dh, dw = torch.empty_like(h), torch.empty_like(w)

    def products() -> Found:
        for _ in range(forwards):
            torch.mm(h, w.T, out=z)
        for _ in range(backwards):
            torch.mm(z, w, out=dh)
            torch.mm(z.T, h, out=dw)
        return Found()

    return products


PROVIDERS["bare 2NDV"] = Provider("bare 2NDV", lambda x, _: bare(x, 1, 0), kind="none")
PROVIDERS["bare 6NDV"] = Provider("bare 6NDV", lambda x, _: bare(x, 1, 1), kind="none")
PROVIDERS["bare 8NDV"] = Provider("bare 8NDV", lambda x, _: bare(x, 2, 1), kind="none")


@provider("ours", op="linear_logp")
def linear_logp(x, **options):
    return lambda h, w: sk.linear_logp(h, w, x.target, softcap=x.shape.softcap, **options)


@provider("ours, exact", op="linear_logp")
def linear_logp_exact(x):
    return linear_logp(x, filter_eps=0)


def logp_kl(x: Inputs, ref_weight: Tensor | None, **options) -> Callable:
    options |= {"softcap": x.shape.softcap}

    def function(h, w):
        head = w.detach() if ref_weight is None else ref_weight
        out = sk.linear_logp_kl(h, w, x.ref_hidden, head, x.target, **options)
        return out.logp, out.kl

    return function


@provider("ours, linear_logp_kl", kind="kl", op="linear_logp_kl")
def linear_logp_kl(x, **options):
    return logp_kl(x, x.weight.clone(), **options)


@provider("ours, linear_logp_kl with one head", kind="kl", op="linear_logp_kl")
def linear_logp_kl_one_head(x):
    return logp_kl(x, None)


def unreferenced_point(x: Inputs) -> float:
    """A reference point for a KTO without a reference model that leaves the losses unsaturated."""
    return x.truth.logp.sum().item() / len(x.batch["labels"])


@provider("ours, linear_step_kto", kind="kto", op="linear_logp")
def linear_step_kto(x, **options):
    zeros = torch.zeros(x.shape.n, device=x.device)
    point = torch.tensor(unreferenced_point(x), device=x.device)
    options |= {"kl": point, "beta": BETA, "step_weight": 0.0, "softcap": x.shape.softcap}
    return lambda h, w: sk.linear_step_kto(h, w, x.target, zeros, **x.batch, **options).loss


@provider("ours, linear_step_kto after the reference's linear_logp", kind="kto with reference", op="linear_logp")
def linear_step_kto_with_reference(x, **options):
    options |= {"beta": BETA, "step_weight": 0.0, "softcap": x.shape.softcap}

    def function(h, w):
        with torch.no_grad():
            ref_logp = sk.linear_logp(x.ref_hidden, x.weight, x.target, softcap=x.shape.softcap)
        return sk.linear_step_kto(h, w, x.target, ref_logp, **x.batch, **options).loss

    return function


@provider("ours, linear_step_kto_exact", kind="kto exact", op="linear_logp_kl")
def linear_step_kto_exact(x, **options):
    options |= {"beta": BETA, "softcap": x.shape.softcap}
    return lambda h, w: sk.linear_step_kto_exact(h, w, x.ref_hidden, x.weight, x.target, **x.batch, **options).loss


def errors(x: Inputs, provider: Provider, found: Found) -> tuple[float, float | None]:
    """Of the value (nats for log-probabilities, else relative) and, relative, of the gradients."""
    kind, value = provider.kind, found.value
    slope = x.slope
    if kind in SLOPED:
        logp = value if kind == "logp" else value[0]
        deviations = [logp.double() - x.truth.logp]
        if kind != "logp":
            deviations.append(value[1].double() - (x.kl if kind == "kl" else x.truth.entropy))
        error = torch.stack(deviations).abs().max().item()
    else:
        if kind == "mean":
            wanted, slope = -x.truth.logp.mean().item(), torch.full_like(slope, -1 / x.shape.n)
        elif kind == "kto":
            zeros = torch.zeros(x.shape.n)
            wanted, slope = x.objective(zeros, kl=unreferenced_point(x), beta=BETA, step_weight=0.0)
        elif kind == "kto with reference":
            wanted, slope = x.objective(x.ref_truth.logp, beta=BETA, step_weight=0.0)
        else:
            points = sk.reference_points(x.kl, x.batch["cu_seqlens"], x.batch["cu_steps"]).points()
            kl, step_kl = (point.item() for point in points)
            wanted, slope = x.objective(x.ref_truth.logp, kl=kl, step_kl=step_kl, beta=BETA)
        error = abs(value.item() - wanted) / abs(wanted)
    if found.dhidden is None or found.dweight is None:
        return error, None
    return error, x.gradient_error(slope, found.dhidden, found.dweight)


def gradient_bytes(found: Found) -> int:
    """What the caller asked for, and so is nobody's overhead."""
    return sum(g.nbytes for g in (found.dhidden, found.dweight) if g is not None)


def records(call: Callable) -> dict:
    """What `stepkto_kernels.watch` tells of the backward of one call."""
    watch = getattr(sk, "watch", None)
    if watch is None:
        return {}
    with watch() as calls:
        call()
    if not calls:
        return {}
    last = calls[-1]
    numbers = ((name, getattr(last, name, None)) for name in ("rho", "rho_blocks", "dropped_max", "dropped_mean"))
    return {name: float(n) for name, n in numbers if n is not None} | {"path": str(getattr(last, "path", ""))}


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
