"""What the stand-alone commands share: quiet libraries, errors as one line, a progress bar, the device."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers.utils import logging as transformers_logging

from .errors import RunError


def run_command(action: Callable[[], object]) -> int:
    """Runs a command line's work. 0 when it ended well, 1 with one message where the user can mend something."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.captureWarnings(True)
    torch.set_float32_matmul_precision("highest")
    try:
        action()
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


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
