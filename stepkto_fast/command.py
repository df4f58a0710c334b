"""What the stand-alone commands share: quiet libraries, errors as one line, a progress bar, the device."""

import errno
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers.utils import logging as transformers_logging

from . import ranks
from .errors import RunError

_RESUME = "then start again, a training run with --resume true"
_DISK = {
    errno.ENOSPC: f"free some space, {_RESUME}",
    errno.EDQUOT: f"free some space or have the quota raised, {_RESUME}",
    errno.EFBIG: f"have the limit on the size of files raised (ulimit -f), {_RESUME}",
    errno.EACCES: f"allow this user to read and write there, {_RESUME}",
    errno.EPERM: f"allow this user to read and write there, {_RESUME}",
    errno.EROFS: f"mount it for writing, {_RESUME}",
    errno.EIO: f"the disk or its file system is damaged: move what is left to another one, {_RESUME}",
    errno.EMFILE: f"have the limit on open files raised (ulimit -n), {_RESUME}",
    errno.ENFILE: f"close other programs: the machine has too many open files, {_RESUME}",
    errno.ENOTDIR: "something on the way there is a file: give another directory",
    errno.ENAMETOOLONG: "give a shorter path",
}
# What torch says of memory on a CPU, and gloo or NCCL of a rank that is gone, are RuntimeErrors without a class of
# their own.
_NO_MEMORY = re.compile(r"can't allocate memory|out of memory|cannot allocate memory", re.IGNORECASE)
_RANK_GONE = re.compile(r"gloo|NCCL|ProcessGroup|Connection (closed|reset) by peer|TCPStore")


def run_command(action: Callable[[], object]) -> int:
    """Runs a command line's work. 0 when it ended well; 1 with one message where the user, or who keeps the machine,
    can mend something; 130 after Ctrl-C. What is a mistake of this program keeps its traceback."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.captureWarnings(True)
    torch.set_float32_matmul_precision("highest")
    try:
        action()
    except KeyboardInterrupt:
        print(f"interrupted: what was written is whole; {_RESUME.removeprefix('then ')}", file=sys.stderr)
        return 130
    except Exception as error:
        message = str(error) if isinstance(error, RunError) else machine_message(error)
        if message is None:
            raise
        place = f" on rank {ranks.rank()}" if ranks.rank() else ""
        print(f"error{place}: {message}", file=sys.stderr)
        return 1
    return 0


def machine_message(error: Exception) -> str | None:
    """What to say of an error that disk, memory or another rank made, with the remedy; None for any other."""
    if isinstance(error, OSError) and error.errno in _DISK:
        return f"{error.filename or 'a file'}: {error.strerror}; {_DISK[error.errno]}"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))
    ):
        return (
            f"out of memory ({(str(error) or type(error).__name__).splitlines()[0]}): lower max_tokens_per_micro_batch "
            f"(0: as many as fit) or vllm_memory, or take gradient_checkpointing, {_RESUME}"
        )
    if ranks.started() and (isinstance(error, dist.DistError) or _RANK_GONE.search(str(error))):
        return (
            f"another rank ended, or did not answer within distributed_timeout ({str(error).splitlines()[0]}): its own "
            f"message says why; {_RESUME.removeprefix('then ')}"
        )
    return None


def open_device(name: str | None) -> torch.device:
    """The device of that name (None: cuda where there is one, else the CPU); RunError when it is not there."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise RunError(
            f"device {name!r} is not available here ({str(error).splitlines()[0]}); use --device cpu"
        ) from error


@contextmanager
def progress_bar(console: Console, text: str) -> Iterator[Callable[..., None]]:
    """A bar on a terminal, which goes when the block ends; yields advance(done, total, note)."""
    if not console.is_terminal:
        yield lambda done, total, note="": None
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(text, total=None, note="")
        yield lambda done, total, note="": bar.update(task, completed=done, total=total, note=note)


def say_complaints(console: Console, complaints: list[str], what: str) -> None:
    """How many `what` were left out, and why the first few were."""
    for complaint in complaints[:3]:
        console.print(f"skipped {complaint}", markup=False, soft_wrap=True)
    if len(complaints) > 3:
        console.print(f"skipped {len(complaints) - 3} more {what}", markup=False, soft_wrap=True)
