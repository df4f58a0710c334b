"""Functions on several processes of a gloo group, from one import of what they need."""

import os
import pickle
import socket
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

NEEDED = ["torch.distributed.fsdp", "stepkto_fast.objective", "peft", "pytest", "hypothesis"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def join_gloo():
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))  # ranks out of step end with an error


def on_ranks(ranks, function, *arguments, join=join_gloo):
    """What `function(rank, *arguments)` returns on each of `ranks` processes, whose environment is torchrun's.

    join: what makes them a process group.
    """
    # Starting a process takes seconds of imports: one server imports once, and each process is a fork of it.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(NEEDED)
    with context.Manager() as manager:
        found = manager.dict()
        mp.start_processes(
            _rank, (ranks, free_port(), found, function, arguments, join), nprocs=ranks, start_method="forkserver"
        )
        return [pickle.loads(found[rank]) for rank in range(ranks)]


def _rank(rank, ranks, port, found, function, arguments, join):
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    torch.set_num_threads(1)
    join()
    try:
        found[rank] = pickle.dumps(function(rank, *arguments))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
