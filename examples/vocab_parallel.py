"""An LM head whose vocabulary is sharded over two processes: the log-probabilities and gradients of the whole head."""

import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from stepkto_kernels import linear_logp, linear_logp_parallel

REQUIRES = ()

RANKS, TOKENS, HIDDEN, VOCABULARY = 2, 256, 128, 32_001  # a vocabulary that the ranks cannot share evenly


def work(rank: int, port: int) -> None:
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    torch.manual_seed(0)  # the same tokens on every rank, as in tensor parallelism
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    whole = torch.randn(VOCABULARY, HIDDEN) / HIDDEN**0.5
    target = torch.randint(VOCABULARY, (TOKENS,))
    shard = whole.chunk(RANKS)[rank].clone().requires_grad_()

    logp = linear_logp_parallel(hidden, shard, target, group=dist.group.WORLD)
    logp.sum().backward()

    alone, head = hidden.detach().clone().requires_grad_(), whole.requires_grad_()
    expected = linear_logp(alone, head, target)
    expected.sum().backward()
    pairs = {
        "log-probability": (logp, expected),
        "gradient of hidden": (hidden.grad, alone.grad),
        "gradient of the shard": (shard.grad, head.grad.chunk(RANKS)[rank]),
    }
    differences = [f"{name} {(a - b).abs().max():.1e}" for name, (a, b) in pairs.items()]
    print(f"rank {rank} has {len(shard)} of {VOCABULARY} rows; differences: {', '.join(differences)}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    mp.spawn(work, (free,), nprocs=RANKS)
