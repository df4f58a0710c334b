"""Runs of the training loop that are killed with SIGKILL, and in what two finished runs differ.

Each run is a fork of one process that has done the imports: a run that is killed early costs a second or two. That
process is not pytest's own, whose threads would not survive a fork.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parent.parent
TIMINGS = ("seconds", "tokens_per_second", "phase_seconds")
EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"}


@dataclass(frozen=True)
class Moment:
    """When a run is killed: at the nth event on its files that matches `event`, just before it takes place, or just
    after it; or after `seconds`.

    An event is Python's audit event with its first two arguments: "os.rename SOURCE TARGET", "open FILE MODE".
    `halve`: the file that the event is about loses its second half, as if the kill had come while it was written.
    `chunk`: continuations that are sampled together.
    """

    event: str = ""
    nth: int = 1
    after: bool = False
    halve: bool = False
    seconds: float | None = None
    chunk: int = 64


@dataclass(frozen=True)
class Outcome:
    """How a run ended. code: its exit code, or minus the signal. phase: what it was last at. log: what it printed."""

    code: int
    phase: str
    seconds: float
    log: str

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL


class Runner:
    """Starts runs, one at a time. A context manager."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def run(self, *arguments: str, moment: Moment | None = None) -> Outcome:
        self._process.stdin.write(json.dumps([arguments, asdict(moment or Moment())]) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))


def differences(run: Path, other: Path) -> list[str]:
    """In which files two run directories differ, timings aside; empty where they are the same to the last bit."""
    found = []
    names = {p.relative_to(top).as_posix() for top in (run, other) for p in top.rglob("*") if p.is_file()}
    for name in sorted(names):
        if re.match(r"engine\.log|tensorboard/|config\.yaml", name):
            continue
        one, two = run / name, other / name
        if not (one.exists() and two.exists()):
            found.append(f"{name}: only in {run if one.exists() else other}")
        elif _content(one) != _content(two):
            found.append(name)
    return found


def _content(path: Path) -> object:
    if path.name in ("report.html", "manifest.json"):  # the first shows timings, the second has checksums of them
        return None
    if path.name in ("summary.json", "progress.json"):
        return {k: v for k, v in json.loads(path.read_text()).items() if k not in TIMINGS}
    return path.read_bytes()


# ---- the process that forks ----


def _serve(folder: Path) -> None:
    from stepkto_fast import train

    for line in sys.stdin:
        arguments, given = json.loads(line)
        moment, start, status = Moment(**given), time.monotonic(), 0
        (folder / "phase").write_text("start")
        child = os.fork()
        if child == 0:
            _child(train.main, arguments, moment, folder)
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            if moment.seconds is not None and time.monotonic() - start > moment.seconds:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.002)
        log, phase = (folder / "log").read_text(errors="replace"), (folder / "phase").read_text()
        outcome = Outcome(os.waitstatus_to_exitcode(status), phase, time.monotonic() - start, log)
        print(json.dumps(asdict(outcome)), flush=True)


def _child(main: Callable[[list[str]], int], arguments: list[str], moment: Moment, folder: Path) -> NoReturn:
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code = 70
    try:
        _note_phases(folder / "phase")
        monte_carlo.CHUNK = moment.chunk
        if moment.event:
            sys.addaudithook(_killer(moment, arguments[arguments.index("--output_dir") + 1]))
        code = main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _note_phases(path: Path) -> None:
    """The recorder's phases, as they begin and end, in a file that outlives the run."""

    def noting(real: Callable) -> Callable:
        @contextmanager
        def noted(recorder: Recorder, name: str, text: str) -> Iterator[Callable[..., None]]:
            path.write_text(name)
            with real(recorder, name, text) as advance:
                yield advance
            path.write_text(f"after {name}")

        return noted

    Recorder.bar, Recorder.phase = noting(Recorder.bar), noting(Recorder.phase)


def _killer(moment: Moment, folder: str) -> Callable[[str, tuple], None]:
    seen, due = 0, False

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen, due
        if due and event != "os.kill":
            os.kill(os.getpid(), signal.SIGKILL)
        # shutil.rmtree removes files by their bare names.
        if event not in EVENTS or (event != "os.remove" and folder not in str(arguments[0])):
            return
        if re.search(moment.event, " ".join([event, *map(str, arguments[:2])])):
            seen += 1
            if seen == moment.nth:
                if moment.halve:
                    os.truncate(arguments[0], os.path.getsize(arguments[0]) // 2)
                due = True
                if not moment.after:
                    os.kill(os.getpid(), signal.SIGKILL)

    return hook


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    from stepkto_fast import monte_carlo
    from stepkto_fast.recorder import Recorder

    _serve(Path(sys.argv[1]))
