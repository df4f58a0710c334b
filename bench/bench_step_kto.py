"""step_kto, forward and backward: the C++ kernel, the reference backend, and plain torch with autograd.

GB/s count what the result needs: two log-probs read and one gradient written per token, 12 bytes in fp32.
"""

import functools

import pytest
import torch
from stepkto_kernels import backend, backends, step_kto
from stepkto_kernels.step_kto import reference as truth

# (completions, steps a completion, tokens a step)
SHAPES = [(64, 8, 32), (32, 16, 256), (512, 64, 1), (1, 1, 100_000), (500, 100, 20)]


def ours(name):
    def function(batch):
        with backend(name):
            return step_kto(**batch, kl=0.1, step_kl=0.05).loss

    return function


def plain_torch(batch):
    """What one would write by hand: segment sums by index_add, sigmoid, means."""
    d = batch["logp"] - batch["ref_logp"]
    r_B, r_S = (
        d.new_zeros(len(cu) - 1).index_add(0, torch.arange(len(cu) - 1).repeat_interleave(cu.diff()), d)
        for cu in (batch["cu_seqlens"], batch["cu_steps"])
    )
    sign = batch["labels"] * 2.0 - 1
    outcome = 1 - torch.sigmoid(0.1 * sign * (r_B - 0.1))
    labelled = batch["step_labels"] != -1
    step_sign = (batch["step_labels"] == 1) * 2.0 - 1
    step = (1 - torch.sigmoid(0.1 * step_sign * (r_S - 0.05))) * labelled
    sequence = torch.searchsorted(batch["cu_seqlens"], batch["cu_steps"][:-1], right=True) - 1
    counts = d.new_zeros(len(r_B)).index_add(0, sequence, labelled.to(d.dtype))
    step_means = d.new_zeros(len(r_B)).index_add(0, sequence, step) / counts.clamp(min=1)
    return outcome.mean() + step_means.sum() / (counts > 0).sum().clamp(min=1)


PROVIDERS = {
    "ours, native": ours("native"),
    "ours, reference": ours("reference"),
    "plain torch": plain_torch,
}


@functools.cache
def problem(shape):
    """A packed batch, and the fp64 truth of its loss and gradient."""
    completions, steps, tokens = shape
    n = completions * steps * tokens
    generator = torch.Generator().manual_seed(0)
    ref_logp = -torch.rand(n, generator=generator)
    batch = {
        "logp": ref_logp + 0.1 * torch.randn(n, generator=generator),
        "ref_logp": ref_logp,
        "cu_seqlens": torch.arange(0, n + 1, steps * tokens, dtype=torch.int32),
        "cu_steps": torch.arange(0, n + 1, tokens, dtype=torch.int32),
        "labels": torch.rand(completions, generator=generator) < 0.5,
        "step_labels": torch.randint(-1, 2, (completions * steps,), generator=generator).to(torch.int8),
    }
    exact = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    logp = exact["logp"].requires_grad_()
    # the truth walks over all steps for each completion: too slow for many of both
    slow = completions * steps > 2048
    loss = plain_torch(exact) if slow else truth.step_kto(**exact, kl=0.1, step_kl=0.05)["loss"]
    return batch, loss.detach(), torch.autograd.grad(loss, logp)[0]


@pytest.mark.parametrize("who", PROVIDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_backward(benchmark, shape, who):
    if who == "ours, native" and backends.why_not("step_kto", "native"):
        pytest.skip(backends.why_not("step_kto", "native"))
    batch, exact, exact_gradient = problem(shape)
    logp = batch["logp"].clone().requires_grad_()
    function = PROVIDERS[who]

    def run():
        loss = function(batch | {"logp": logp})
        return loss, torch.autograd.grad(loss, logp)[0]

    loss, gradient = run()
    error = (loss.double() - exact).abs().item()
    # plain torch sums in fp32, one token after the other: 100,000 of them cost it four digits
    assert error <= (1e-3 if who == "plain torch" else 1e-6)
    assert (gradient.double() - exact_gradient).norm() <= (
        1e-2 if who == "plain torch" else 1e-5
    ) * exact_gradient.norm()

    benchmark.group = f"step_kto forward and backward (completions, steps, tokens) = {shape}"
    benchmark.pedantic(run, rounds=30, warmup_rounds=3)
    benchmark.extra_info.update(shape=str(shape), dtype="fp32", loss_error=f"{error:.1e}")
    if benchmark.stats is not None:  # None under --benchmark-disable
        gigabytes = 12 * len(logp) / 1e9
        benchmark.extra_info["GB/s"] = round(gigabytes / benchmark.stats.stats.median, 3)
