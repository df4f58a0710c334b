"""What heads are timed on: shapes, inputs from flat to peaked, and their fp64 truths.

flat: a random initialisation. Weights N(0, 0.02^2), hidden states N(0, 1), so logits of size 1 and an entropy
near log V: every part of the vocabulary carries probability, nothing can be left out.

peaked: hidden states that know something, made so that the places of the probability mass are those of a language
model. Everything is a direction of the head itself, and the weights stay of ordinary size:

    unigram     p(id) falls as 1/rank up to rank 8000 and as 1/rank^2 beyond, as word frequencies do. Ids follow
                the ranks loosely (a factor exp(0.7 N(0, 1))), as those of byte-pair merges do; in "scattered" inputs
                they are shuffled, so that frequent tokens share no tiles.
    head        W_v = N(0, 0.02^2) + log p(v) / 16 * e, with one unit vector e
    hidden_n    16 e + noise with logits N(0, 1)                the background: the unigram distribution, blurred
                + sum_k (s u_n (6 - log k) - log p(c_k)) W_c_k / |W_c_k|^2       16 candidates c_k from the unigram

so candidate k of row n has a logit of about s u_n (6 - log k) over a background whose log-sum-exp is about 3, and
log-probabilities fall with log k, the slope being the row's own sharpness: u_n is log-normal (0.8), so few rows carry
most of the entropy, as in rollouts: at a mean of 0.3 nats half of the rows have less than 0.01 and a fifth more than
0.6. The one scale s is bisected until the mean entropy is the level that names the inputs. Rows are independent, where
a text's neighbours share words: that makes a tile harder to leave out for many rows at once than it is in a text.

Targets are drawn from the model's own distribution, as those of rollouts are.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
from stepkto_kernels.step_kto import reference as objective_truth
from torch import Tensor

LEVELS = (0.1, 0.3, 0.6, 1.0, 2.0, 4.0)  # nats of mean entropy
CANDIDATES = 16
SPREAD = 0.8
GAMMA = 16.0  # length of the hidden states along e
TILE = 4096  # vocabulary entries of an fp64 tile


class Shape(NamedTuple):
    name: str
    n: int
    d: int
    v: int
    softcap: float | None = None
    completion: int = 512  # tokens of each
    dtype: str = "bfloat16"  # of the hidden states and the head; a name, so that JSON takes it


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("trl", 8192, 4096, 151936),
        Shape("liger", 16384, 1024, 128256),
        Shape("v131072", 8192, 4096, 131072),
        Shape("llama3", 16384, 4096, 128256),
        Shape("gemma2", 8192, 2304, 256000, softcap=30.0),
        Shape("0.5b", 8192, 896, 151936),
        Shape("tiny", 96, 128, 1024, completion=24),
    )
}


def capped(z: Tensor, softcap: float | None) -> Tensor:
    return z if softcap is None else softcap * torch.tanh(z / softcap)


class Truth(NamedTuple):
    """fp64, of `logp` and of its slopes in a few rows of hidden states and of the head."""

    logp: Tensor  # (N,)
    lse: Tensor  # (N,)
    entropy: Tensor  # (N,)
    rows: Tensor  # (R,)
    d_hidden: Tensor  # (R, D): dlogp_n / dhidden_n
    columns: Tensor  # (U,)
    d_logits: Tensor  # (N, U): dlogp_n / d(hidden @ weight.T) of those columns


@torch.no_grad()
def exact(hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None) -> Truth:
    n, v = len(hidden), len(weight)
    h = hidden.double()
    rows = torch.arange(0, n, max(1, n // 64), device=h.device)
    random = torch.randint(v, (32,), generator=torch.Generator().manual_seed(1)).to(h.device)
    columns = torch.cat([target[:: max(1, n // 32)], random]).unique()
    z_target = capped((h * weight[target].double()).sum(-1), softcap)
    lses, means = [], []
    for tile in weight.split(TILE):
        z = capped(h @ tile.double().T, softcap)
        lses.append(z.logsumexp(-1))
        means.append((z.sub_(lses[-1][:, None]).exp() * z).sum(-1) + lses[-1])  # mean logit within the tile
        del z
    lse_nt = torch.stack(lses, -1)
    lse = lse_nt.logsumexp(-1)
    entropy = lse - ((lse_nt - lse[:, None]).exp() * torch.stack(means, -1)).sum(-1)

    def slopes(h: Tensor, w: Tensor, lse: Tensor, hit: Tensor) -> Tensor:
        z = capped(h @ w.double().T, softcap)
        slope = hit.double() - (z - lse[:, None]).exp()
        return slope if softcap is None else slope * (1 - (z / softcap).square())

    d_hidden = h.new_zeros(len(rows), h.shape[1])
    for start in range(0, v, TILE):
        tile = weight[start : start + TILE]
        ids = torch.arange(start, start + len(tile), device=h.device)
        d_hidden += slopes(h[rows], tile, lse[rows], target[rows, None] == ids) @ tile.double()
    d_logits = slopes(h, weight[columns], lse, target[:, None] == columns)
    return Truth(z_target - lse, lse, entropy, rows, d_hidden, columns, d_logits)


class Inputs:
    """One shape's tensors, and what is derived from them when somebody asks."""

    def __init__(self, shape: Shape, name: str, hidden: Tensor, weight: Tensor, target: Tensor | None = None):
        self.shape, self.name, self.hidden, self.weight = shape, name, hidden, weight
        self.target = sample(hidden, weight, shape.softcap) if target is None else target
        self.device = hidden.device
        generator = torch.Generator().manual_seed(2)
        sign = torch.randint(2, (shape.n,), generator=generator) * 2.0 - 1
        self.slope = (sign * (0.5 + torch.rand(shape.n, generator=generator)) / shape.n).to(self.device)
        self.batch = batch(shape.n, shape.completion, max(1, shape.completion // 8), self.device)

    @functools.cached_property
    def truth(self) -> Truth:
        return exact(self.hidden, self.weight, self.target, self.shape.softcap)

    @functools.cached_property
    def ref_hidden(self) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(3)
        noise = torch.randn(self.hidden.shape, generator=generator, device=self.device)
        return (self.hidden + 0.1 * self.hidden.float().std() * noise).to(self.hidden.dtype)

    @functools.cached_property
    def ref_truth(self) -> Truth:
        return exact(self.ref_hidden, self.weight, self.target, self.shape.softcap)

    @functools.cached_property
    def ref_logp(self) -> Tensor:
        return self.ref_truth.logp.float()

    @functools.cached_property
    @torch.no_grad()
    def kl(self) -> Tensor:
        h, h_ref = self.hidden.double(), self.ref_hidden.double()
        kl = torch.zeros_like(self.truth.lse)
        for tile in self.weight.split(TILE):
            w = tile.double().T
            log_p = capped(h @ w, self.shape.softcap) - self.truth.lse[:, None]
            log_q = capped(h_ref @ w, self.shape.softcap) - self.ref_truth.lse[:, None]
            kl += (log_p.exp() * log_q.neg_().add_(log_p)).sum(-1)
        return kl

    def objective(self, ref_logp: Tensor, **options) -> tuple[float, Tensor]:
        """The loss of these tokens and its slope in every log-probability, by the slow truth."""
        fixed: dict[str, Any] = {name: tensor.cpu() for name, tensor in self.batch.items()}
        logp = self.truth.logp.cpu().requires_grad_()
        loss = objective_truth.step_kto(logp, ref_logp.double().cpu(), **fixed, **options)["loss"]
        return loss.item(), torch.autograd.grad(loss, logp)[0].to(self.device)

    def gradient_error(self, slope: Tensor, dhidden: Tensor, dweight: Tensor) -> float:
        """The larger of the two relative errors, |found - wanted| / |wanted|, over the truth's rows and columns."""
        truth = self.truth
        wanted_h = slope[truth.rows, None].double() * truth.d_hidden
        wanted_w = (slope[:, None].double() * truth.d_logits).T @ self.hidden.double()
        pairs = (dhidden[truth.rows], wanted_h), (dweight[truth.columns], wanted_w)
        errors = [(found.double() - wanted).norm() / wanted.norm() for found, wanted in pairs]
        return torch.stack(errors).max().item()  # Python's max would lose a NaN


def batch(n: int, completion: int, step: int, device: torch.device) -> dict[str, Any]:
    """The boundaries and labels of n tokens in equal completions of equal steps."""
    generator = torch.Generator().manual_seed(4)

    def boundaries(size: int) -> Tensor:
        return torch.tensor([*range(0, n, size), n], dtype=torch.int32)

    cu_seqlens = boundaries(completion)
    cu_steps = torch.cat([cu_seqlens, boundaries(step)]).unique()
    found = {
        "cu_seqlens": cu_seqlens,
        "cu_steps": cu_steps,
        "labels": torch.arange(len(cu_seqlens) - 1) % 2 == 0,
        "step_labels": torch.randint(-1, 2, (len(cu_steps) - 1,), generator=generator).to(torch.int8),
    }
    return {name: tensor.to(device) for name, tensor in found.items()}


@torch.no_grad()
def sample(hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    generator = torch.Generator(hidden.device).manual_seed(5)
    blocks = (capped((h @ weight.T).float(), softcap).softmax(-1) for h in hidden.split(512))
    return torch.cat([torch.multinomial(p, 1, generator=generator).squeeze(1) for p in blocks])


def mean_entropy(hidden: Tensor, weight: Tensor, softcap: float | None) -> float:
    log_p = capped((hidden @ weight.T).float(), softcap).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean().item()


class Peaked:
    """The head and the two parts of the hidden states of one shape; `at` gives the inputs of a level."""

    def __init__(self, shape: Shape, device: torch.device, scattered: bool):
        self.shape = shape
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device)

        n, d, v = shape.n, shape.d, shape.v
        frequency = torch.arange(1, v + 1, device=device).log()
        rank = ((100 if scattered else 0.7) * normal(v) + frequency).argsort()
        x = (rank + 2.0).log()
        log_p = -torch.where(rank < 8000, x, 2 * x - math.log(8002))
        log_p = log_p - log_p.max()
        w = normal(v, d) * 0.02
        e = normal(d)
        e /= e.norm()
        flat = torch.multinomial(log_p.exp(), n * CANDIDATES, replacement=True, generator=generator)
        candidate = flat.view(n, CANDIDATES)
        height = 6 - torch.arange(1, CANDIDATES + 1, device=device).log()
        parts = []
        for ids in candidate.split(256):
            unit = w[ids] / w[ids].square().sum(-1, keepdim=True)
            both = torch.stack([height.expand(ids.shape), -log_p[ids]], 1)
            parts.append(both @ unit)  # (n, 2, D)
        self.peak, rest = torch.cat(parts).unbind(1)
        self.rest = rest + GAMMA * e + normal(n, d) / (0.02 * d**0.5)
        self.sharpness = (SPREAD * normal(n)).exp()[:, None]
        w += (log_p / GAMMA)[:, None] * e
        self.weight = w.to(getattr(torch, shape.dtype))

    def hidden(self, scale: float, rows: slice = slice(None)) -> Tensor:
        return (scale * self.sharpness[rows] * self.peak[rows] + self.rest[rows]).to(self.weight.dtype)

    @torch.no_grad()
    def at(self, name: str, level: float) -> Inputs:
        some = slice(None, None, max(1, self.shape.n // 512))
        low, high = math.log(0.01), math.log(100)
        for _ in range(16):
            middle = (low + high) / 2
            entropy = mean_entropy(self.hidden(math.exp(middle), some), self.weight, self.shape.softcap)
            low, high = (middle, high) if entropy > level else (low, middle)
        return Inputs(self.shape, name, self.hidden(math.exp(low)), self.weight)


def flat_inputs(shape: Shape, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    h, w = (torch.randn(size, shape.d, generator=generator, device=device) for size in (shape.n, shape.v))
    dtype = getattr(torch, shape.dtype)
    return Inputs(shape, "flat", h.to(dtype), (w * 0.02).to(dtype))


class Maker:
    """Inputs by name ("flat", "peaked 0.6", "scattered 1.0", "real", "real 0.6"), of which the last `keep` are kept.
    Real ones bring a shape of their own, by `size` (language_model.SIZES): of the one asked for the dtype counts."""

    def __init__(self, device: torch.device, size: str = "", keep: int = 1):
        self.device, self.size, self.keep = device, size, keep
        self.known: dict[tuple[Shape, str], Inputs] = {}  # the last one asked for stands last
        self.family: tuple[tuple, Peaked] | None = None

    def __call__(self, shape: Shape, name: str) -> Inputs:
        key = shape, name
        found = self.known.pop(key, None)
        if found is None:
            for oldest in list(self.known)[: len(self.known) + 1 - self.keep]:
                del self.known[oldest]
            found = self.made(shape, *name.split())
        self.known[key] = found
        return found

    def made(self, shape: Shape, kind: str, level: str = "") -> Inputs:
        if kind not in ("peaked", "scattered"):
            self.family = None
            if kind == "flat":
                return flat_inputs(shape, self.device)
            from language_model import real_inputs

            return real_inputs(self.device, shape.dtype, float(level) if level else None, self.size)
        if self.family is None or self.family[0] != (shape, kind):
            self.family = None
            self.family = (shape, kind), Peaked(shape, self.device, scattered=kind == "scattered")
        return self.family[1].at(f"{kind} {level}", float(level))
