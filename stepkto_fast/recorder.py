"""What a run says while it runs: metrics.jsonl, TensorBoard or Weights & Biases, and the terminal."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress as Bar, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .errors import RunError
from .recipe import Recipe
from .run_directory import Progress, RunDirectory


class Recorder:
    """Writes each metric where the recipe wants it, and times the phases into `progress.seconds`."""

    def __init__(self, recipe: Recipe, run: RunDirectory, progress: Progress):
        self.console = Console(highlight=False)
        self._progress, self._path = progress, run.metrics
        with open(self._path, "ab") as file:
            file.truncate(progress.metrics_bytes)
        self._tensorboard = self._wandb = None
        if recipe.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(run.path / "tensorboard"), purge_step=progress.global_step + 1)
        elif recipe.report_to == "wandb":
            try:
                import wandb
            except ImportError as error:
                raise RunError("report_to wandb: it is not installed; pip install 'stepkto-fast[wandb]'") from error
            self._wandb = wandb.init(project="stepkto-fast", name=recipe.name, dir=str(run.path))

    def scalars(self, metrics: dict, prefix: str = "train") -> None:
        """Records one line of metrics at the current global step. Non-finite numbers become null in the JSON."""
        step = self._progress.global_step
        line = {"step": step, "iteration": self._progress.iteration, **metrics}
        text = json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()})
        with open(self._path, "ab") as file:
            file.write(text.encode() + b"\n")
            self._progress.metrics_bytes = file.tell()
        numbers = {f"{prefix}/{k}": v for k, v in metrics.items() if isinstance(v, (int, float))}
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def say(self, text: str) -> None:
        """A line on the terminal; `text` is printed as it is, never as markup."""
        self.console.print(text, markup=False)

    @contextmanager
    def phase(self, name: str, text: str) -> Iterator[None]:
        """Times a phase and shows that it is going on."""
        start = time.monotonic()
        with self.console.status(text):
            yield
        self._progress.seconds[name] = self._progress.seconds.get(name, 0.0) + time.monotonic() - start

    @contextmanager
    def bar(self, name: str, text: str, total: int) -> Iterator:
        """Times a phase with a progress bar; yields advance(done, note)."""
        start = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Bar(*columns, TextColumn("{task.fields[note]}"), console=self.console, transient=True) as bar:
            task = bar.add_task(text, total=total, note="")
            yield lambda done, note="": bar.update(task, completed=done, note=note)
        self._progress.seconds[name] = self._progress.seconds.get(name, 0.0) + time.monotonic() - start

    def results(self) -> None:
        """The table of all iterations so far."""
        table = Table(title="held-out problems")
        columns = ["pass@1", "maj@8", "flawed_correct", "step_accuracy", "prm_f1", "weight_sync_max_abs_logp_diff"]
        for name in ["model", *columns]:
            table.add_column(name.replace("weight_sync_max_abs_logp_diff", "sync diff"), justify="right")
        for record in self._progress.records:
            cells = ["-" if record[c] is None else f"{record[c]:.1%}" for c in columns[:-1]]
            table.add_row(f"M_{record['iteration']}", *cells, f"{record[columns[-1]]:.1e}")
        self.console.print(table)

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
