"""The run directory: what is on the disk, written whole or not at all, and where a resumed run goes on.

config.yaml  metrics.jsonl  summary.json  report.html
rollouts/iteration_{t}.parquet        what M_t sampled, labelled (seed.parquet: the PRM head's seed set)
evaluations/iteration_{t}.parquet     greedy solutions of the held-out problems
checkpoints/iteration_{t}/            M_t, and the run's progress when it was made
checkpoints/iteration_{t}_step_{k}/   in the middle of the update of M_t: weights, optimizer, progress
model/                                the last M_t with its PRM head

Every checkpoint has a manifest of its files; one that is damaged is found before it is loaded and kept aside as
`.damaged-...`, and the run goes on from the one before, with the same bits in the end. Under several ranks rank 0
writes, the others wait; all of them must see the same directory.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
import yaml
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import ranks
from .adapters import load_adapters, save_adapters
from .atomic import (
    MANIFEST,
    begin_folder,
    damage,
    finish_folder,
    hold,
    naming,
    read_manifest,
    recover,
    remove_folder,
    replacing,
    replacing_folder,
    set_aside,
    sync,
    write_manifest,
)
from .checkpoint import (
    ADAPTERS,
    SHARDS,
    has_adapters,
    load_trained,
    plain_state,
    save_pretrained,
    save_trained,
)
from .command import machine_message
from .errors import RunError
from .objective import LaggedPoints
from .policy import load_policy
from .prm import PRM
from .prm_files import save_prm
from .recipe import Recipe, write_recipe
from .sharding import is_sharded, save_sharded

T = TypeVar("T")

# What may change when a run is resumed: what does not touch the result, and what a failed run may have to lower.
FREE_ON_RESUME = {
    "resume", "overwrite", "output_dir", "report_to", "logging_steps", "save_steps", "name", "learning_rate",
    "max_grad_norm", "max_tokens_per_micro_batch", "gradient_checkpointing", "vllm_memory", "vllm_sleep",
    "vllm_timeout", "vllm_server_url", "vllm_sync", "ray_address", "distributed_timeout", "watch", "watch_log_ratio",
    "watch_kl",
}  # fmt: skip
# Settings that may name a path.
INPUTS = ["model", "train_dataset", "test_dataset", "labelled_dataset", "prm", "prm_dataset"]
CHECKPOINT = re.compile(r"iteration_(\d+)(?:_step_(\d+))?")


@dataclass
class Progress:
    """Where a run stands: everything besides weights and optimizer that a resumed run needs."""

    iteration: int = 0  # the policy is M_iteration, or on its way from it
    step: int = 0  # optimizer steps done in this iteration's update
    global_step: int = 0
    metrics_bytes: int = 0  # length of metrics.jsonl; what lies behind belongs to work that was lost
    lagged: LaggedPoints = field(default_factory=LaggedPoints)
    records: list[dict] = field(default_factory=list)  # summary.json's iterations
    seconds: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    fitting_tokens: int = 0  # of a micro-batch: what the recipe says, or the planner, or half of it that fitted
    fitting_tokens_of: str = ""  # what that depends on
    seconds_beside: float = 0.0  # of sampling while an update ran
    ahead: str = ""  # digest of the weights that the next iteration's rollouts are sampled from (`max_staleness: 1`)

    def add(self, what: str, name: str, amount: float) -> None:
        """Adds to one entry of `seconds`, `tokens` or `counts`."""
        entries = getattr(self, what)
        entries[name] = entries.get(name, 0) + amount

    def next_iteration(self) -> None:
        self.iteration, self.step, self.lagged = self.iteration + 1, 0, LaggedPoints()


class RunDirectory:
    """One run on the disk. Opening it decides between a fresh start, an overwrite and a resume.

    One process (or one torchrun) at a time has it open. Raises RunError for what the user can mend, on every rank.
    """

    def __init__(self, recipe: Recipe):
        self.path = Path(recipe.output_dir)
        self.rollouts, self.evaluations = self.path / "rollouts", self.path / "evaluations"
        self.checkpoints, self.metrics = self.path / "checkpoints", self.path / "metrics.jsonl"
        on_main(lambda: self._open(recipe))

    def _open(self, recipe: Recipe) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"output_dir {recipe.output_dir!r} cannot be made: {error}") from error
        if not hold(self.path):
            raise RunError(f"another process is at work in {self.path}: wait for its end, or give another output_dir")
        if recipe.resume:
            self._check_same_recipe(recipe)
        elif recipe.overwrite:
            # An --overwrite that was killed may have left the run's files without its checkpoints.
            if self.checkpoints.exists() or (self.path / "config.yaml").exists():
                self._empty(recipe)
        elif self.checkpoints.is_dir() and any(self.checkpoints.iterdir()):
            raise RunError(
                f"output_dir {recipe.output_dir!r} already holds a run: continue it with --resume true, replace it "
                "with --overwrite true, or choose another directory"
            )
        self.checkpoints.mkdir(exist_ok=True)
        for folder in (self.path, self.checkpoints, self.evaluations, self.rollouts, *self.rollouts.glob("**/")):
            recover(folder)
        write_recipe(recipe, self.path / "config.yaml")

    def _empty(self, recipe: Recipe) -> None:
        for key in INPUTS:
            if (given := getattr(recipe, key)) and Path(given).resolve().is_relative_to(self.path.resolve()):
                raise RunError(f"{key} {given!r} lies in output_dir, which --overwrite true would empty: move it")
        for name in ("checkpoints", "rollouts", "evaluations", "model", "tensorboard"):
            if (self.path / name).exists():
                remove_folder(self.path / name)
        for pattern in ("metrics.jsonl", "summary.json", "report.html", "nonfinite_*.parquet"):
            for file in self.path.glob(pattern):
                file.unlink()

    def _check_same_recipe(self, recipe: Recipe) -> None:
        before = self.path / "config.yaml"
        if not before.exists():
            raise RunError(f"nothing to resume: {before} does not exist; start without --resume")
        try:
            saved = yaml.safe_load(before.read_text(encoding="utf-8")) or {}
            if not isinstance(saved, dict):
                raise ValueError(f"it holds a {type(saved).__name__}")
        except (yaml.YAMLError, ValueError) as error:
            raise RunError(
                f"{before} is damaged ({error}): put the recipe that the run was started with in its place"
            ) from error
        for key, value in asdict(recipe).items():
            if key not in FREE_ON_RESUME and key in saved and saved[key] != value:
                raise RunError(
                    f"cannot resume {self.path}: {key} was {saved[key]!r} and is now {value!r}; "
                    f"resume with the run's own settings ({before}) or start a new run"
                )

    # ---- checkpoints ----

    def newest_checkpoint(self, say: Callable[[str], None] = print) -> Path | None:
        """The checkpoint that is furthest along among whole ones, or None.

        Those that are damaged, or rest on something that is, are kept aside as `.damaged-...`, and `say` is told. What
        was done since an older one is done again, with the same result. Raises RunError where M_0 is damaged and later
        checkpoints are not: M_0 cannot be made from them.
        """
        return on_main(lambda: self._newest_whole(say))

    def _newest_whole(self, say: Callable[[str], None]) -> Path | None:
        found = [
            (int(m[1]), int(m[2] or 0), p) for p in self.checkpoints.iterdir() if (m := CHECKPOINT.fullmatch(p.name))
        ]
        for iteration, step, place in sorted(found, reverse=True):
            if wrong := self._wrong(place, iteration, step):
                if (rollouts := self.rollouts / f"iteration_{iteration}.parquet") in dict(wrong) and rollouts.exists():
                    set_aside(rollouts)
                aside = set_aside(place)
                what = "; ".join(f"{path}: {reason}" for path, reason in wrong)
                say(f"warning: checkpoint {place} cannot be used ({what}). It is kept as {aside.name}; the run goes on "
                    "from the one before, or from its start")  # fmt: skip
                continue
            if lost := damage(first) if (first := self.policy_of(0)).is_dir() else [(first, "it is missing")]:
                raise RunError(
                    f"checkpoint {first}, M_0, is damaged ({lost[0][0]}: {lost[0][1]}): the run is measured against "
                    "it. Put it back from a copy, or start anew with --overwrite true"
                )
            self._compare(place, say)
            self._drop_steps(keep=place.name)  # older ones that a killed process had not come to
            return place
        return None

    def _wrong(self, place: Path, iteration: int, step: int) -> list[tuple[Path, str]]:
        """What is wrong with a checkpoint and, in the middle of an update, with the M_t and the rollouts of it."""
        wrong = damage(place)
        if step and not wrong:
            base = self.policy_of(iteration)
            wrong = damage(place, "needs") + (damage(base) if base.is_dir() else [(base, "it is missing")])
        return wrong

    def _compare(self, place: Path, say: Callable[[str], None]) -> None:
        before = (read_manifest(place) or {}).get("ranks", ranks.size())
        if before != ranks.size():
            say(f"warning: {place} was written by {before} ranks and is read by {ranks.size()}: from here on the run "
                "is as before to rounding, not to the bit")  # fmt: skip
        short = self.load_progress(place).metrics_bytes - (self.metrics.stat().st_size if self.metrics.exists() else 0)
        if short > 0:
            say(f"warning: {self.metrics} lacks {short} bytes that {place} knows of: those lines are lost, the weights "
                "are not")  # fmt: skip

    def policy_of(self, iteration: int) -> Path:
        """Where M_iteration lies."""
        return self.checkpoints / f"iteration_{iteration}"

    def save_policy(
        self, model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None, progress: Progress
    ) -> None:
        """Writes M_t (t = progress.iteration), then drops the checkpoints of the update that led to it.

        Every rank calls it; where rank 0 holds the whole model, the others may pass None.
        """
        state = plain_state(model) if model is not None else None

        def together(folder: Path) -> None:
            if model is not None and has_adapters(model):
                save_adapters(model, folder / ADAPTERS if ranks.is_main() else None)

        def alone(folder: Path) -> None:
            assert model is not None
            assert tokenizer is not None
            save_pretrained(model, tokenizer, folder, state)

        self._write(self.policy_of(progress.iteration), progress, together, alone)
        on_main(self._drop_steps)

    def save_step(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Writes a checkpoint in the middle of an update, then drops the one before it."""
        target, sharded, t = self._step_folder(progress), is_sharded(model), progress.iteration

        def together(folder: Path) -> None:
            if sharded:
                save_sharded(model, optimizer, folder / SHARDS)

        def alone(folder: Path) -> None:
            if not sharded:
                save_trained(model, optimizer, folder)

        needs = [self.policy_of(t) / MANIFEST, self.rollouts / f"iteration_{t}.parquet"]
        self._write(target, progress, together, alone, needs)
        on_main(lambda: self._drop_steps(keep=target.name))

    def load_step(self, progress: Progress, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
        """Loads the weights and the optimizer of the checkpoint that `save_step` wrote at `progress`."""
        folder = self._step_folder(progress)
        with _readable(folder):
            load_trained(model, optimizer, folder)

    def load_adapters(self, model: PreTrainedModel, progress: Progress) -> None:
        """Loads the adapters that live through the run as they were in M_t; those of M_0 are as they were made."""
        if progress.iteration:
            load_adapters(model, self.policy_of(progress.iteration) / ADAPTERS)

    def load_progress(self, folder: Path) -> Progress:
        with _readable(folder):
            saved = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
            return Progress(**{**saved, "lagged": LaggedPoints(**saved["lagged"])})

    def load_model(self, iteration: int, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        model, tokenizer = load_policy(str(self.policy_of(iteration)))
        return model.to(device).eval(), tokenizer

    def _step_folder(self, progress: Progress) -> Path:
        return self.checkpoints / f"iteration_{progress.iteration}_step_{progress.step}"

    def _drop_steps(self, keep: str | None = None) -> None:
        for place in self.checkpoints.glob("iteration_*_step_*"):
            if place.name != keep:
                remove_folder(place)

    def _write(
        self, target: Path, progress: Progress, together: Callable[[Path], None], alone: Callable[[Path], None],
        needs: Sequence[Path] = (),
    ) -> None:  # fmt: skip
        """A checkpoint of what all ranks write `together` and rank 0 `alone`, with the progress and a manifest."""

        def finish() -> None:
            with naming(target):
                alone(unfinished)
                (unfinished / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")
                if self.metrics.exists():  # the progress counts its bytes
                    sync(self.metrics)
                write_manifest(unfinished, [path for path in needs if path.exists()], ranks=ranks.size())
                finish_folder(unfinished, target)

        unfinished = on_main(lambda: begin_folder(target))
        try:
            on_all(lambda: together(unfinished), target)
            on_main(finish)
        except BaseException:
            if ranks.is_main():
                shutil.rmtree(unfinished, ignore_errors=True)
            raise

    # ---- results ----

    def save_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prm: PRM | None) -> None:
        """Writes model/: the final policy for transformers and vLLM, with the PRM head, if any, beside it.

        Every rank calls it.
        """
        state = plain_state(model)

        def write() -> None:
            with replacing_folder(self.path / "model") as folder:
                save_pretrained(model, tokenizer, folder, state)
                if prm is not None:
                    save_prm(prm, folder, tokenizer, beside=model)

        on_main(write)

    def write_summary(self, summary: dict) -> None:
        def write() -> None:
            with replacing(self.path / "summary.json") as unfinished:
                unfinished.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")

        on_main(write)


def on_main(action: Callable[[], T]) -> T:
    """`ranks.from_main`, where what disk or memory refuse to rank 0 is a RunError on every rank."""

    def explained() -> T:
        try:
            return action()
        except (OSError, MemoryError) as error:
            if (message := machine_message(error)) is None:
                raise
            raise RunError(message) from error

    return ranks.from_main(explained)


def on_all(action: Callable[[], None], path: Path) -> None:
    """`action`, which writes under `path`, on every rank; what the disk refuses to one is a RunError on all."""
    problem = None
    try:
        with naming(path):
            action()
    except OSError as error:
        problem = machine_message(error) or str(error)
    if problems := [text for text in ranks.gather(problem) if text]:
        raise RunError(problems[0])


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise RunError(f"checkpoint {folder} is damaged ({error}): delete it to go back to the one before") from error
