"""Every op on a GPU against its fp64 truth on the CPU: what `make gpu` runs first. Skipped without a GPU."""

import pytest
import stepkto_kernels as sk
import torch
from stepkto_kernels.linear_logp import reference as linear_logp_truth

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")

N, D, V = 47, 64, 1009


def inputs(dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    target = torch.randint(V, (N,), generator=generator)
    target[5] = -100
    batch = {
        "cu_seqlens": torch.tensor([0, 20, 21, N], dtype=torch.int32),
        "cu_steps": torch.tensor([0, 7, 20, 21, 40, N], dtype=torch.int32),
        "labels": torch.tensor([True, False, True]),
        "step_labels": torch.tensor([1, 0, -1, 0, 1], dtype=torch.int8),
    }
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    return draw(N, D), draw(V, D) / 8, target.to(device), batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_logp_and_its_gradients(dtype):
    """Both sides see the same rounded inputs; what is left is fp32 accumulation (and the gradients' own dtype)."""
    h, w, target, _ = inputs(dtype, "cuda")
    h64, w64 = (x.double().cpu().requires_grad_() for x in (h, w))
    h.requires_grad_()
    w.requires_grad_()
    logp = sk.linear_logp(h, w, target, filter_eps=0)
    truth = linear_logp_truth.linear_logp(h64, w64, target.cpu())
    torch.testing.assert_close(logp.double().cpu(), truth, atol=1e-5, rtol=1e-5)
    slope = torch.linspace(-1, 1, N, dtype=torch.float64)
    (logp * slope.float().cuda()).sum().backward()
    (truth * slope).sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    for mine, expected in ((h.grad, h64.grad), (w.grad, w64.grad)):
        atol = tolerance * float(expected.abs().max())
        torch.testing.assert_close(mine.double().cpu(), expected, atol=atol, rtol=tolerance)


def test_the_whole_objective_and_exact_reference_points():
    results = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        h, w, target, batch = inputs(dtype, device)
        h.requires_grad_()
        out = sk.linear_step_kto_exact(h, w, h.detach() * 0.9, w * 1.1, target, **batch, beta=0.3)
        out.loss.backward()
        results.append([x.detach().double().cpu() for x in (*out, h.grad)])
    for expected, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, atol=2e-4, rtol=2e-4)


def test_the_same_bits_every_time():
    grads = []
    for _ in range(2):
        h, w, target, batch = inputs(torch.float32, "cuda")
        h.requires_grad_()
        w.requires_grad_()
        sk.linear_step_kto(h, w, target, torch.full((N,), -7.0, device="cuda"), **batch).loss.backward()
        grads.append((h.grad, w.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_triton_is_what_auto_takes():
    assert (
        sk.backends.choose("linear_logp", torch.zeros(1, device="cuda"))
        is sk.backends._KERNELS["linear_logp"]["triton"]
    )


@pytest.mark.parametrize("exact_points", [False, True], ids=["given points", "exact points"])
def test_captured_in_a_cuda_graph(exact_points):
    """No host sync anywhere: the whole loss with its backward is captured, and replayed on other values."""
    h, w, target, batch = inputs(torch.bfloat16, "cuda")
    h.requires_grad_()
    w.requires_grad_()
    ref_h, ref_w, ref_logp = h.detach().clone(), w.detach() * 0.9, torch.full((N,), -7.0, device="cuda")

    def run():
        if exact_points:
            out = sk.linear_step_kto_exact(h, w, ref_h, ref_w, target, **batch)
        else:
            out = sk.linear_step_kto(h, w, target, ref_logp, **batch)
        return out.loss, *torch.autograd.grad(out.loss, (h, w))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        h.copy_(h.flip(0) * 1.5)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))


def test_the_host_never_waits():
    h, w, target, batch = inputs(torch.bfloat16, "cuda")
    h.requires_grad_()
    w.requires_grad_()
    ref_logp = torch.full((N,), -7.0, device="cuda")

    def run():
        sk.linear_step_kto(h, w, target, ref_logp, **batch).loss.backward()
        sk.linear_step_kto_exact(h, w, h.detach(), w.detach(), target, **batch).loss.backward()
        logp, entropy = sk.linear_logp_entropy(h, w, target)
        (logp.sum() + entropy.sum()).backward()

    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
