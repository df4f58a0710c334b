"""Runs the study: `python -m stepkto_fast.study [file.yaml] [--key value ...]`.

Every run leaves a result file in `results` as soon as it ends; a study that was stopped goes on where it was, killed
runs from their newest checkpoint. At the end docs/study.md and its figures are drawn from the result files.
"""

import os
import sys
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console

from ..atomic import hold
from ..command import run_command
from ..errors import RunError
from ..settings import parse_settings, setting
from .plan import Spec, family_of, is_current, left, ready
from .results import INITIAL, STAGES, counting, load
from .run import end_with, has_initial, logged, prepare_initial, prepare_problems, run

THREADS = "OMP_NUM_THREADS"


@dataclass
class StudySettings:
    """What is run, where, and for how long."""

    family: str = setting("cpu", "the study: cpu, large (one GPU, up to nine minutes a run), or smoke (a few minutes)")
    stages: str = setting(",".join(STAGES), "which of search, main and ablations are run, separated by commas")
    only: str = setting("", "runs whose place (stage/difficulty/name/seed_n) begins with one of these, by commas")
    output_dir: str = setting("", "folder of the runs, of every M_0 and of the problems; empty: runs/study-FAMILY")
    results: str = setting("", "folder of the result files; empty: docs/study/results for cpu, else in output_dir")
    workers: int = setting(2, "runs at a time, each with one thread on a CPU")
    minutes: float | None = setting(None, "minutes after which no new run starts; none: until all are done")
    keep_runs: bool = setting(False, "keep the run directories of runs that have a result")
    list: bool = setting(False, "print what is left to do, and stop")

    def __post_init__(self) -> None:
        family_of(self.family)
        if self.workers < 1:
            raise RunError(f"workers is {self.workers}: give at least 1")
        if unknown := set(self.stages.split(",")) - set(STAGES):
            raise RunError(f"stages names {sorted(unknown)}: give some of {', '.join(STAGES)}, separated by commas")
        self.output_dir = self.output_dir or f"runs/study-{self.family}"
        if not self.results:
            self.results = "docs/study/results" if self.family == "cpu" else f"{self.output_dir}/results"


class Study:
    """A study on the disk: what it has found and what is left to do."""

    def __init__(self, settings: StudySettings):
        self.settings, self.family = settings, family_of(settings.family)
        self.stages, self.console = settings.stages.split(","), Console(highlight=False)
        self.work, self.results = Path(settings.output_dir), Path(settings.results)

    def found(self) -> list[dict[str, Any]]:
        """The results that count."""
        runs = [r for r in counting(load(self.results))[0] if r["stage"] != INITIAL]
        return [r for r in runs if is_current(self.family, r)]

    def ready(self) -> list[Spec]:
        specs = ready(self.family, self.found(), self.stages)
        return [spec for spec in specs if spec.place.startswith(tuple(self.settings.only.split(",")))]

    def left(self) -> str:
        counts = left(self.family, self.found(), self.stages)
        return ", ".join(f"{n} {stage}" for stage, n in counts.items())

    def show(self) -> None:
        """Prints what can start now and how much is left."""
        for spec in self.ready():
            self.console.print(spec.place, markup=False)
        runs = [r for r in load(self.results) if r["stage"] != INITIAL]
        if stale := len(runs) - len(self.found()):
            self.console.print(
                f"{stale} results do not count: their settings, or the M_0 of their seeds, are others now"
            )
        self.console.print(f"left: {self.left()}")

    def run(self) -> None:
        """Runs all that is ready, and what becomes ready by it, until nothing is left or the time is over."""
        settings, start = self.settings, time.monotonic()
        self.work.mkdir(parents=True, exist_ok=True)
        if not hold(self.work):
            raise RunError(f"another study is at work in {self.work}: wait for its end, or give another output_dir")
        prepare_problems(self.family, self.work)
        # What a worker does has one thread, and is as fast as two threads that wait for each other.
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when a worker imports torch
        running: dict[Future[tuple[float, str]], str] = {}
        broken: dict[str, str] = {}
        with ProcessPoolExecutor(
            settings.workers, mp_context=get_context("spawn"), initializer=end_with, initargs=(os.getpid(),)
        ) as pool:
            while True:
                over = settings.minutes is not None and time.monotonic() - start > 60 * settings.minutes
                for spec in [] if over else [*self.ready(), *self._to_come()]:
                    if len(running) >= settings.workers:
                        break
                    name, call = self._next(spec)
                    if name in running.values() or name in broken or not (spec.name or call[0] is prepare_initial):
                        continue
                    running[pool.submit(logged, self.work / "logs", *call)] = name
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    name = running.pop(future)
                    try:
                        seconds, note = future.result()
                    except RunError as error:  # the others go on
                        broken[name] = str(error)
                        self.console.print(f"error: {name}: {error}", markup=False, soft_wrap=True)
                        continue
                    self.console.print(f"{seconds:6.0f} s  {name}  {note}", markup=False, soft_wrap=True)
                    self.console.print(f"          left: {self.left()}", markup=False, soft_wrap=True)
        if broken:
            raise RunError(f"{len(broken)} of the runs could not be done, such as {next(iter(broken))}: see above")

    def _to_come(self) -> list[Spec]:
        """A run without a name for each M_0 that main runs still want: a worker with nothing else to do makes it."""
        done = Counter((r["difficulty"], r["seed"]) for r in self.found() if r["stage"] == "main")
        every = [(d, seed) for seed in self.family.seeds for d in self.family.difficulties]
        wanted = [Spec("main", d, "", "", seed, {}) for d, seed in every if done[d, seed] < len(self.family.arms)]
        return [
            spec
            for spec in wanted
            if "main" in self.stages and spec.place.startswith(tuple(self.settings.only.split(",")))
        ]

    def _next(self, spec: Spec) -> tuple[str, tuple]:
        """What has to be done next for `spec`, the run or first its M_0: its name, and the call that does it."""
        if has_initial(spec, self.family, self.work, self.results):
            return spec.place, (run, spec, self.family.name, self.work, self.results, self.settings.keep_runs)
        name = f"{INITIAL}/{spec.difficulty}/seed_{spec.seed}"
        return name, (prepare_initial, spec, self.family.name, self.work, self.results)


def main(argv: list[str]) -> int:
    """The command line."""

    def action() -> None:
        study = Study(parse_settings(StudySettings, argv, "stepkto_fast.study"))
        if study.settings.list:
            study.show()
        else:
            study.run()

    return run_command(action)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
