"""linear_logp_parallel on 2 and 4 processes (gloo) against the unsharded truth, forward and both gradients."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from on_backends import INTERPRETING, where_it_runs
from stepkto_kernels import backend, backends, linear_logp, linear_logp_entropy_parallel, linear_logp_parallel, watch
from stepkto_kernels.linear_logp import reference as head_truth
from stepkto_kernels.linear_logp_parallel import reference as truth
from test_linear_logp import EVERYTHING, inputs

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
EPS = torch.finfo(torch.float32).eps
NAMES = ("reference", "native", *(["triton"] if INTERPRETING else []))  # the ranks' tensors are on the CPU
ROWS = {2: (130, 71), 4: (128, 1, 0, 72)}  # of the ranks' shards, of 201 in all


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def on_ranks(ranks, function, *arguments):
    """What `function(rank, *arguments)` returns on each of `ranks` processes of a gloo group."""
    with mp.get_context("spawn").Manager() as manager:
        found = manager.dict()
        mp.spawn(_rank, (ranks, free_port(), found, function, arguments), nprocs=ranks)
        return [found[rank] for rank in range(ranks)]


def _rank(rank, ranks, port, found, function, arguments):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    try:
        found[rank] = function(rank, *arguments)
    finally:
        dist.destroy_process_group()


def shard(x, rank, rows):
    first = sum(rows[:rank])
    return x[first : first + rows[rank]].clone()


def everything(rank, ranks, names):
    """In one start of the processes, which takes longer than the calls."""
    found = {name: many_heads(rank, ROWS[ranks], name) for name in names}
    return found | {"dtensors": dtensors(rank, ranks), "dropped": dropped(rank, names)}


def many_heads(rank, rows, name):
    found = {}
    for key, (dtype, head, eps) in CALLS.items():
        hidden, weight, target, bias = inputs((23, 24, 201), dtype)
        hidden = hidden.t().contiguous().t()  # column-major: gradients are added up over the ranks as they lie
        leaves = [hidden.requires_grad_(), *(shard(x, rank, rows).requires_grad_() for x in (weight, bias))]
        with backend("reference" if dtype == torch.float64 else name):
            logp, entropy = linear_logp_entropy_parallel(
                leaves[0], leaves[1], target, group=dist.group.WORLD, bias=leaves[2], filter_eps=eps, **head
            )
            (logp * coefficients(logp)[0] + entropy * coefficients(logp)[1]).sum().backward()
            alone = linear_logp_parallel(
                leaves[0], leaves[1], target, group=dist.group.WORLD, bias=leaves[2], filter_eps=eps, **head
            )
        found[key] = [x.detach() for x in (logp, entropy, alone, *(x.grad for x in leaves))]
    return found


def dropped(rank, names):
    """The largest share of a token's mass that this rank leaves out, by backend that leaves anything out, of a half."""
    hidden, weight, target, _ = inputs((200, 24, 200 * dist.get_world_size()), torch.float32)
    mine = shard(weight, rank, [200] * dist.get_world_size()).requires_grad_()
    found = {}
    for name in set(names) - {"reference"}:
        with backend(name), watch() as calls:
            linear_logp_parallel(hidden, mine, target, group=dist.group.WORLD, filter_eps=0.5).sum().backward()
        found[name] = calls[-1].dropped_max
    return found


def test_the_ranks_together_leave_out_no_more_than_the_filter_allows(of_processes):
    for found in of_processes:
        for name, largest in found["dropped"].items():
            assert 0 < largest <= 0.5 / len(of_processes), name


def coefficients(like):
    return torch.randn(2, 23, generator=torch.Generator().manual_seed(1)).to(like)


CALLS = {
    "fp32": (torch.float32, {}, 0.0),
    "fp32, everything": (torch.float32, EVERYTHING, 0.0),
    "bf16": (torch.bfloat16, {}, 0.0),
    "bf16, filtered": (torch.bfloat16, {"temperature": 0.25}, 2**-9),
    "fp64": (torch.float64, EVERYTHING, 0.0),
}


@pytest.fixture(scope="module", params=ROWS, ids=lambda ranks: f"{ranks} ranks")
def of_processes(request):
    names = [name for name in NAMES if backends.why_not("linear_logp", name) is None]
    return on_ranks(request.param, everything, request.param, names)


@pytest.mark.parametrize("name", [where_it_runs("linear_logp", name) for name in NAMES])
def test_ranks_together_are_the_whole_head(name, of_processes):
    calls = [found[name] for found in of_processes]
    for key, (dtype, head, eps) in CALLS.items():
        operands = inputs((23, 24, 201), dtype)
        target = operands[2]
        leaves = [operands[i].double().requires_grad_() for i in (0, 1, 3)]
        weights, biases = (x.split(ROWS[len(calls)]) for x in leaves[1:])
        logp, entropy = truth.linear_logp_entropy_parallel(leaves[0], weights, target, biases=biases, **head)
        (logp * coefficients(logp)[0] + entropy * coefficients(logp)[1]).sum().backward()
        # sums of 24 products in fp32, and a logit's error where it is the largest
        largest = head_truth.logits(*(x.detach() for x in leaves), **head).abs().max()
        budget = 1e-12 if dtype == torch.float64 else 16 * EPS * (1 + largest)
        of_ranks = [call[key] for call in calls]
        for values in of_ranks:
            for found, exact in zip(values[:3], (logp, entropy, logp), strict=True):
                assert ((found.double() - exact.detach()).abs() <= budget).all(), key
            assert all(torch.equal(a, b) for a, b in zip(values[:4], of_ranks[0][:4], strict=True))
            assert (values[0] <= 0).all()
        rounding = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
        dweight, dbias = (torch.cat([values[i] for values in of_ranks]) for i in (4, 5))
        for found, leaf in zip((of_ranks[0][3], dweight, dbias), leaves, strict=True):
            assert found.dtype == dtype
            assert (found.double() - leaf.grad).norm() <= (rounding + 4 * eps) * leaf.grad.norm(), key


def dtensors(rank, ranks):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    hidden, weight, target, bias = inputs((23, 24, 201), torch.float32)
    mesh = init_device_mesh("cpu", (ranks,))
    weight, bias = (distribute_tensor(x, mesh, [Shard(0)]).requires_grad_() for x in (weight, bias))
    hidden = distribute_tensor(hidden, mesh, [Replicate()]).requires_grad_()
    logp = linear_logp_parallel(hidden, weight, target, bias=bias, validate=True)
    logp.sum().backward()
    refused = []
    for wrong in (
        lambda: linear_logp(hidden.to_local(), weight, target),
        lambda: linear_logp_parallel(hidden, weight.redistribute(mesh, [Replicate()]), target),
        lambda: linear_logp_parallel(hidden, weight, target, bias=bias.full_tensor()),
        lambda: linear_logp_parallel(hidden.redistribute(mesh, [Shard(0)]), weight, target),
        lambda: linear_logp_parallel(hidden, weight.to_local(), target),
        lambda: linear_logp_parallel(hidden, weight.to_local(), target + 1000, group=mesh.get_group()),
        lambda: linear_logp_parallel(
            hidden.to_local()[rank:], weight.to_local(), target[rank:], group=mesh.get_group()
        ),
        lambda: linear_logp_parallel(hidden, weight.to_local(), target.clamp(min=rank), group=mesh.get_group()),
    ):
        try:
            wrong()
            refused.append("nothing")
        except ValueError as error:
            refused.append(str(error))
    return logp.detach(), *(x.grad.full_tensor() for x in (hidden, weight, bias)), refused


def test_dtensors(of_processes):
    operands = inputs((23, 24, 201), torch.float32)
    leaves = [operands[i].double().requires_grad_() for i in (0, 1, 3)]
    exact = truth.linear_logp_parallel(leaves[0], leaves[1:2], operands[2], biases=leaves[2:])
    exact.sum().backward()
    for logp, *gradients, refused in [found["dtensors"] for found in of_processes]:
        torch.testing.assert_close(logp.double(), exact.detach(), rtol=1e-6, atol=1e-5)
        for found, leaf in zip(gradients, leaves, strict=True):
            torch.testing.assert_close(found.double(), leaf.grad, rtol=1e-5, atol=1e-5)
        for said, expected in zip(
            refused,
            (
                "weight is a DTensor of shape (201, 24) with placements (Shard(dim=0),); expected a plain tensor",
                "expected Shard(0), the vocabulary",
                "bias is a plain tensor; expected weight's placements",
                "hidden is a DTensor with placements",
                "group is None; pass the process group",
                "expected values in [0, V=201)",
                "expected the same on all",
                "expected the same on all",
            ),
            strict=True,
        ):
            assert expected in said


def test_a_group_of_one_is_the_whole_head():
    found = on_ranks(1, alone)[0]
    hidden, weight, target, _ = inputs((23, 24, 201), torch.float32)
    torch.testing.assert_close(found, linear_logp(hidden, weight, target))


def alone(rank):
    hidden, weight, target, _ = inputs((23, 24, 201), torch.float32)

    def function(h):
        return 2 * linear_logp_parallel(h, weight, target, group=dist.group.WORLD)

    eager, compiled = (each(hidden.requires_grad_()) for each in (function, torch.compile(function, backend="eager")))
    assert torch.equal(eager, compiled)
    assert torch.equal(*(torch.autograd.grad(x.sum(), hidden)[0] for x in (eager, compiled)))
    return eager.detach() / 2
