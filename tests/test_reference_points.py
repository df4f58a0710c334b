"""reference_points: the sums behind z and z_s."""

import pytest
import torch
from stepkto_kernels import ReferencePoints, backend, backends, reference_points
from stepkto_kernels.reference_points import reference as truth
from stepkto_kernels.reference_points.op import reference_points_forward
from test_step_kto import INTERPRETING, device_of, random_batch, where_it_runs

BACKENDS = [where_it_runs("reference_points", name) for name in ("reference", "native", "triton")]


@pytest.fixture(params=BACKENDS)
def on_backend(request):
    with backend(request.param):
        yield request.param


def points_of(values, cu_seqlens, cu_steps):
    """On the device where the chosen backend takes them; the result is on the CPU."""
    device = device_of(backends.requested())
    points = reference_points(*(x.to(device) for x in (values, cu_seqlens, cu_steps)))
    return ReferencePoints(*(x.cpu() for x in points))


def boundaries(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_by_hand(on_backend):
    values = torch.tensor([1.0, 2.0, 3.0, 6.0])
    points = points_of(values, boundaries(0, 3, 4), boundaries(0, 1, 3, 4))
    assert isinstance(points, ReferencePoints)
    assert [x.item() for x in points] == [12.0, 2.0, 12.0, 3.0]
    assert [x.item() for x in points.points()] == [6.0, 4.0]


def test_means_are_clamped_only_after_averaging():
    points = reference_points(torch.tensor([-5.0, 2.0]), boundaries(0, 1, 2), boundaries(0, 1, 2))
    assert [x.item() for x in points.means()] == [-1.5, -1.5]
    assert [x.item() for x in points.points()] == [0.0, 0.0]
    other = reference_points(torch.tensor([9.0]), boundaries(0, 1), boundaries(0, 1))
    both = ReferencePoints(*(torch.stack(points) + torch.stack(other)))  # what an all-reduce does
    assert [x.item() for x in both.points()] == [2.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_matches_the_truth(dtype, on_backend):
    if dtype == torch.float64 and on_backend == "triton":
        pytest.skip("it computes in float32")
    batch = random_batch(seed=3, completions=40)
    values = batch["logp"].abs().to(dtype)
    found = points_of(values, batch["cu_seqlens"], batch["cu_steps"])
    exact = truth.reference_points(values.double(), batch["cu_seqlens"], batch["cu_steps"])
    for x, y in zip(found, exact, strict=True):
        assert x.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert x.shape == ()
        assert not x.requires_grad
        # summed in fp64 and rounded once
        assert abs(x.item() - float(y)) <= torch.finfo(torch.float32).eps * abs(float(y))


def test_a_long_sum_keeps_its_accuracy(on_backend):
    n = 100_000 if INTERPRETING else 1_000_001
    values = torch.full((n,), 0.1)
    points = points_of(values, boundaries(0, n), boundaries(0, n))
    assert points.outcome_sum.item() == pytest.approx(values[0].double().item() * n, rel=1e-7)


def test_bitwise_reproducible_and_no_uninitialised_memory_is_read(on_backend):
    n = 5000
    values = torch.rand(n, generator=torch.Generator().manual_seed(0)).log()
    cu = boundaries(0, 1, 700, n)
    torch.use_deterministic_algorithms(True)  # fills every torch.empty with NaN
    try:
        first, second = points_of(values, cu, cu), points_of(torch.stack([values, values], 1)[:, 0], cu, cu)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.isfinite(torch.stack(first)).all()
    assert torch.equal(torch.stack(first), torch.stack(second))


def test_empty_batch_gives_zero_points(on_backend):
    points = points_of(torch.zeros(0), boundaries(0), boundaries(0))
    assert [x.item() for x in (*points, *points.points())] == [0.0] * 6


def test_values_are_detached():
    values = torch.ones(2, requires_grad=True)
    assert not any(x.requires_grad for x in reference_points(values, boundaries(0, 2), boundaries(0, 2)))


def test_opcheck(on_backend):
    arguments = [x.to(device_of(on_backend)) for x in (torch.rand(4), boundaries(0, 3, 4), boundaries(0, 1, 3, 4))]
    torch.library.opcheck(reference_points_forward, (*arguments, True))


def test_compiles_without_graph_breaks_and_checks_values_when_it_runs():
    def function(values, cu_seqlens, cu_steps):
        z, z_s = reference_points(values, cu_seqlens, cu_steps).points()
        return z + 2 * z_s

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    arguments = torch.rand(4), boundaries(0, 3, 4), boundaries(0, 1, 3, 4)
    assert torch.equal(compiled(*arguments), function(*arguments))
    with pytest.raises(ValueError, match=r"cu_steps .* lacks the sequence boundary 3"):
        compiled(arguments[0], arguments[1], boundaries(0, 1, 2, 4))


VALUES = torch.zeros(4)
BAD = {
    "start": (ValueError, "cu_seqlens .* starts at 1; expected 0", VALUES, (1, 4), (0, 4)),
    "end": (ValueError, "cu_seqlens .* ends at 3.*N=4", VALUES, (0, 3), (0, 3, 4)),
    "step end": (ValueError, "cu_steps .* ends at 5.*N=4", VALUES, (0, 4), (0, 5)),
    "flat": (
        ValueError,
        "cu_steps .* 2, 2 at positions 1, 2.*strictly ascending",
        VALUES,
        (0, 4),
        (0, 2, 2, 4),
    ),
    "falling": (ValueError, "cu_seqlens .* 3, 1 at positions 1, 2", VALUES, (0, 3, 1, 4), (0, 3, 4)),
    "nesting": (
        ValueError,
        r"cu_steps .* lacks the sequence boundary 2 \(cu_seqlens\[1\]\)",
        VALUES,
        (0, 2, 4),
        (0, 1, 4),
    ),
    "nothing": (ValueError, r"cu_seqlens has shape \(0,\)", VALUES, (), (0, 4)),
    "rank": (ValueError, r"values has shape \(2, 2\)", VALUES.view(2, 2), (0, 4), (0, 4)),
    "dtype": (TypeError, "values has dtype torch.int64", VALUES.long(), (0, 4), (0, 4)),
    "tokens but no completion": (ValueError, "cu_seqlens .* ends at 0", VALUES, (0,), (0, 4)),
}


@pytest.mark.parametrize(("error", "message", "values", "cu_seqlens", "cu_steps"), BAD.values(), ids=BAD)
def test_bad_input_is_refused(error, message, values, cu_seqlens, cu_steps):
    with pytest.raises(error, match=message):
        reference_points(values, boundaries(*cu_seqlens), boundaries(*cu_steps))


def test_boundaries_must_be_int32():
    with pytest.raises(TypeError, match=r"cu_seqlens has dtype torch\.int64.*int32"):
        reference_points(VALUES, boundaries(0, 4).long(), boundaries(0, 4))
