"""An end to what hangs in this process, where no time-out reaches: the process ends itself.

No thread can stop a call of another one that does not return. So the process says what it waited for, writes the stacks
of all threads to a log, and exits with code 1. What is on the disk is whole, and `--resume true` goes on from there.
"""

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

EXIT_CODE = 1
LOOKS = 20  # at whether there was a sign of life, in every time-out
STDERR = 2


@contextmanager
def watchdog(timeout: float, what: str, log: Path | None = None) -> Iterator[Callable[[], None]]:
    """Ends the process when the block gives no sign of life for `timeout` seconds: it neither ends nor calls what it
    was given.

    `what` is named in the message ("vLLM, while sampling"); the stacks go to `log`, or to stderr without one. A call
    that does not let other threads run gets twice the time, and no message but the stacks. One block at a time.
    """
    last, over = time.monotonic(), threading.Event()
    file = STDERR if log is None else os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def alive() -> None:
        nonlocal last
        last = time.monotonic()

    def watch() -> None:
        while not over.wait(timeout / LOOKS):
            if time.monotonic() - last >= timeout:
                _end(timeout, what, log, file)
            later()

    def later() -> None:
        # faulthandler waits in C: it ends even a process whose threads all stand still, `watch` among them.
        faulthandler.dump_traceback_later(2 * timeout, exit=True, file=file)

    later()
    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield alive
    finally:
        over.set()
        thread.join()
        faulthandler.cancel_dump_traceback_later()
        if log is not None:
            os.close(file)


def _end(timeout: float, what: str, log: Path | None, file: int) -> None:
    where = "" if log is None else f" {log} says where it stands."
    message = (
        f"error: {what}: no sign of life for {timeout:g} s (vllm_timeout). This process ends.{where} Continue with "
        "--resume true, and a longer --vllm_timeout where it was at work\n"
    )
    os.write(STDERR, message.encode())
    faulthandler.dump_traceback(file, all_threads=True)
    os._exit(EXIT_CODE)
