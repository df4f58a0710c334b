"""What a run says while it runs: metrics.jsonl, TensorBoard or Weights & Biases, and the terminal."""

import importlib.util
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from rich.console import Console
from rich.table import Table

from . import ranks
from .command import progress_bar
from .errors import RunError
from .recipe import Recipe
from .run_directory import Progress, RunDirectory


def require_report(recipe: Recipe) -> None:
    """RunError when the package that `report_to` needs is not installed."""
    if recipe.report_to != "none" and importlib.util.find_spec(recipe.report_to) is None:
        raise RunError(
            f"report_to {recipe.report_to}: it is not installed; pip install {recipe.report_to}, or --report_to none"
        )


class Recorder:
    """Writes each metric where the recipe wants it, and times the phases into `progress.seconds`. Of several ranks the
    main one alone writes and prints."""

    def __init__(self, recipe: Recipe, run: RunDirectory, progress: Progress):
        self.console = Console(highlight=False, quiet=not ranks.is_main())
        self._progress, self._path = progress, run.metrics
        self._tensorboard = self._wandb = None
        if not ranks.is_main():
            return
        with open(self._path, "ab") as file:
            file.truncate(min(file.tell(), progress.metrics_bytes))
        if recipe.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(run.path / "tensorboard"), purge_step=progress.global_step + 1)
        elif recipe.report_to == "wandb":
            import wandb

            self._wandb = wandb.init(project="stepkto-fast", name=recipe.name, dir=str(run.path))

    def scalars(self, metrics: dict, prefix: str = "train") -> None:
        """Records one line of metrics at the current global step. Non-finite numbers become null in the JSON."""
        if not ranks.is_main():
            return
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
        with self.console.status(text) if self.console.is_terminal and ranks.is_main() else nullcontext():
            yield
        self._done(name, text, start)

    @contextmanager
    def bar(self, name: str, text: str) -> Iterator[Callable[..., None]]:
        """Times a phase with a progress bar; yields advance(done, total, note)."""
        start = time.monotonic()
        with progress_bar(self.console, text) as advance:
            yield advance
        self._done(name, text, start)

    def _done(self, name: str, text: str, start: float) -> None:
        seconds = time.monotonic() - start
        self._progress.add("seconds", name, seconds)
        self.say(f"{seconds:6.1f} s  {text}")

    def results(self) -> None:
        """The table of all iterations so far."""
        table = Table(title="held-out problems")
        rates = [k for k in self._progress.records[0] if "@" in k] + [
            "flawed_correct",
            "step_accuracy",
            "prm_f1",
        ]
        for name in ["model", *rates, "sync diff"]:
            table.add_column(name, justify="right")
        for record in self._progress.records:
            cells = ["-" if record[c] is None else f"{record[c]:.1%}" for c in rates]
            table.add_row(f"M_{record['iteration']}", *cells, f"{record['weight_sync_max_abs_logp_diff']:.1e}")
        self.console.print(table)

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
