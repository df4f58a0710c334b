"""The ranks of a run: one process under `python`, several under `torchrun`.

Without a process group every function here does what it does for one rank: nothing is sent, nobody is waited for.
Objects are sent by pickle between ranks of one run, which trust each other; nothing is ever read from a file that way.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from .errors import RunError

T = TypeVar("T")


def started() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if started() else 0


def size() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if started() else 1


def is_main() -> bool:
    """Whether this is rank 0, which alone writes to the run directory."""
    return rank() == 0


def open_ranks(timeout: float) -> None:
    """Joins the ranks that torchrun started, if it did; a rank that waits longer than `timeout` seconds fails.

    Every rank with a GPU takes the one of its local rank. Raises RunError where there are more ranks than GPUs, or
    where not all ranks come in time.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or started():
        return
    backend = "gloo"
    if torch.cuda.is_available():
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise RunError(
                f"torchrun started local rank {local} on a machine with {torch.cuda.device_count()} GPUs: give "
                "--nproc-per-node at most as many"
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    except dist.DistError as error:
        raise RunError(
            f"rank {os.environ['RANK']} could not join the {os.environ['WORLD_SIZE']} ranks within distributed_timeout "
            f"({timeout:g} s): {str(error).splitlines()[0]}; look at what the other ranks say, and start all of them "
            "with the same torchrun command"
        ) from error


def close_ranks() -> None:
    """Leaves the process group, if there is one."""
    if started():
        dist.destroy_process_group()


def gather(value: T) -> list[T]:
    """Every rank's `value`, in the order of the ranks, on every rank."""
    if size() == 1:
        return [value]
    found: list = [None] * size()
    dist.all_gather_object(found, value)
    return found


def from_main(action: Callable[[], T]) -> T:
    """What `action` returns on rank 0, on every rank; it runs there alone.

    A RunError of it is raised on all ranks. Any other exception is raised on rank 0, and a RunError that names it on
    the others, so that nobody waits for what does not come.
    """
    if size() == 1:
        return action()
    sent: list = [None, None]
    own: Exception | None = None
    if is_main():
        try:
            sent[0] = action()
        except Exception as error:
            own = error
            sent[1] = str(error) if isinstance(error, RunError) else f"rank 0 failed: {type(error).__name__}: {error}"
    dist.broadcast_object_list(sent, src=0)
    if own is not None:
        raise own
    if sent[1] is not None:
        raise RunError(sent[1])
    return sent[0]


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of every rank's `values`, which have one shape and dtype; `values` itself may be overwritten."""
    if size() > 1:
        dist.all_reduce(values)
    return values


def barrier() -> None:
    """Waits for all ranks."""
    if size() > 1:
        dist.barrier()
