"""step_kto alone: a million tokens in fifty thousand steps, against the time its bytes take to move.

The floor is 12 bytes a token (two log-probabilities read, one slope written) over the bandwidth of a large copy on the
same device. A call this short mostly waits for the host, so it is timed as a replayed CUDA graph too.
"""

from collections.abc import Callable

import stepkto_kernels as sk
import torch
from head_inputs import batch
from providers import Found, Provider, require
from torch import Tensor

BYTES = 12  # a token


class Tokens:
    """The log-probabilities of one packed batch, and the loss and slopes in fp64."""

    name = "step_kto"

    def __init__(self, device: torch.device, n: int = 1_000_000, completion: int = 400, step: int = 20):
        self.device, self.n = device, n
        generator = torch.Generator().manual_seed(0)
        self.ref_logp = -torch.rand(n, generator=generator).to(device)
        self.logp = self.ref_logp + 0.1 * torch.randn(n, generator=generator).to(device)
        self.batch = batch(n, completion, step, device)
        self.kl, self.step_kl = torch.tensor(0.1, device=device), torch.tensor(0.05, device=device)
        logp = self.logp.double().requires_grad_()
        loss = self.by_hand(logp, self.ref_logp.double())
        self.truth = loss.item(), torch.autograd.grad(loss, logp)[0]

    def by_hand(self, logp: Tensor, ref_logp: Tensor) -> Tensor:
        """What one would write: segment sums by index_add, sigmoids, means."""
        d, b = logp - ref_logp, self.batch
        r_B, r_S = (
            d.new_zeros(len(cu) - 1).index_add(
                0, torch.arange(len(cu) - 1, device=self.device).repeat_interleave(cu.diff(), output_size=self.n), d
            )
            for cu in (b["cu_seqlens"], b["cu_steps"])
        )
        outcome = 1 - torch.sigmoid(0.1 * (b["labels"] * 2.0 - 1) * (r_B - self.kl))
        labelled = b["step_labels"] != -1
        step = (1 - torch.sigmoid(0.1 * ((b["step_labels"] == 1) * 2.0 - 1) * (r_S - self.step_kl))) * labelled
        owner = torch.searchsorted(b["cu_seqlens"], b["cu_steps"][:-1], right=True) - 1
        counts = torch.zeros_like(r_B).index_add(0, owner, labelled.to(d.dtype))
        means = torch.zeros_like(r_B).index_add(0, owner, step) / counts.clamp(min=1)
        return outcome.mean() + means.sum() / (counts > 0).sum().clamp(min=1)

    def fused(self, logp: Tensor, ref_logp: Tensor) -> Tensor:
        return sk.step_kto(logp, ref_logp, **self.batch, kl=self.kl, step_kl=self.step_kl).loss


def both(function: Callable[[Tensor, Tensor], Tensor], x: Tokens) -> Callable[[], Found]:
    logp = x.logp.detach().requires_grad_()

    def call() -> Found:
        loss = function(logp, x.ref_logp)
        return Found(loss.detach(), torch.autograd.grad(loss, logp)[0])

    return call


def graph(call: Callable[[], Found], x: Tokens) -> Callable[[], Found]:
    require(x.device.type == "cuda", "CUDA graphs need a GPU")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        found = call()

    def replay() -> Found:
        captured.replay()
        return found

    return replay


def copy(x: Tokens, size: int) -> Callable[[], Found]:
    source = torch.randint(256, (size,), dtype=torch.uint8, device=x.device)
    target = torch.empty_like(source)

    def call() -> Found:
        target.copy_(source)
        return Found()

    return call


def large_copy(device: torch.device) -> int:
    """Bytes read, and as many written."""
    return 2**30 if device.type == "cuda" else 2**20


PROVIDERS = {
    each.name: each
    for each in (
        Provider("large copy", lambda x, _: copy(x, large_copy(x.device)), "none"),
        Provider("copy of its bytes", lambda x, _: copy(x, BYTES * x.n // 2), "none"),
        Provider("ours", lambda x, _: both(x.fused, x), "objective", "step_kto"),
        Provider("ours, as a CUDA graph", lambda x, _: graph(both(x.fused, x), x), "objective", "step_kto"),
        Provider("plain torch", lambda x, _: both(x.by_hand, x), "objective"),
        Provider("plain torch, as a CUDA graph", lambda x, _: graph(both(x.by_hand, x), x), "objective"),
    )
}


def errors(x: Tokens, provider: Provider, found: Found) -> tuple[float, float]:
    loss, slope = x.truth
    assert found.dhidden is not None
    relative = ((found.dhidden.double() - slope).norm() / slope.norm()).item()
    return abs(found.value.item() - loss) / abs(loss), relative
