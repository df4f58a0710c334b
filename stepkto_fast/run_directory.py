"""The run directory: what is on the disk, written whole or not at all, and where a resumed run goes on.

config.yaml  metrics.jsonl  summary.json  report.html
rollouts/iteration_{t}.parquet        what M_t sampled, labelled (seed.parquet: the PRM head's seed set)
evaluations/iteration_{t}.parquet     greedy solutions of the held-out problems
checkpoints/iteration_{t}/            M_t, and the run's progress when it was made
checkpoints/iteration_{t}_step_{k}/   in the middle of the update of M_t: weights, optimizer, progress
model/                                the last M_t with its PRM head
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .atomic import replacing
from .errors import RunError
from .objective import LaggedPoints
from .policy import load_policy
from .prm import PRM
from .prm_files import save_prm
from .recipe import Recipe, write_recipe

# What may change when a run is resumed: what does not touch the result, and what a failed run may have to lower.
FREE_ON_RESUME = {
    "resume", "overwrite", "output_dir", "report_to", "logging_steps", "save_steps", "name", "learning_rate",
    "max_grad_norm", "max_tokens_per_micro_batch", "vllm_memory",
}  # fmt: skip
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

    def add(self, what: str, name: str, amount: float) -> None:
        """Adds to one entry of `seconds`, `tokens` or `counts`."""
        entries = getattr(self, what)
        entries[name] = entries.get(name, 0) + amount

    def next_iteration(self) -> None:
        self.iteration, self.step, self.lagged = self.iteration + 1, 0, LaggedPoints()


class RunDirectory:
    """One run on the disk. Opening it decides between a fresh start, an overwrite and a resume."""

    def __init__(self, recipe: Recipe):
        self.path = Path(recipe.output_dir)
        self.rollouts, self.evaluations = self.path / "rollouts", self.path / "evaluations"
        self.checkpoints, self.metrics = self.path / "checkpoints", self.path / "metrics.jsonl"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"output_dir {recipe.output_dir!r} cannot be made: {error}") from error
        if recipe.resume:
            self._check_same_recipe(recipe)
        elif self.checkpoints.is_dir() and any(self.checkpoints.iterdir()):
            if not recipe.overwrite:
                raise RunError(
                    f"output_dir {recipe.output_dir!r} already holds a run: continue it with --resume true, replace it "
                    "with --overwrite true, or choose another directory"
                )
            if recipe.model and Path(recipe.model).resolve().is_relative_to(self.path.resolve()):
                raise RunError(
                    f"model {recipe.model!r} lies in output_dir, which --overwrite true would empty: move it"
                )
            for name in ("rollouts", "evaluations", "checkpoints", "model", "tensorboard"):
                shutil.rmtree(self.path / name, ignore_errors=True)
            for name in ("metrics.jsonl", "summary.json", "report.html"):
                (self.path / name).unlink(missing_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        for leftover in self.checkpoints.glob(".unfinished-*"):
            shutil.rmtree(leftover)
        write_recipe(recipe, self.path / "config.yaml")

    def _check_same_recipe(self, recipe: Recipe) -> None:
        before = self.path / "config.yaml"
        if not before.exists():
            raise RunError(f"nothing to resume: {before} does not exist; start without --resume")
        saved = yaml.safe_load(before.read_text(encoding="utf-8")) or {}
        for key, value in asdict(recipe).items():
            if key not in FREE_ON_RESUME and key in saved and saved[key] != value:
                raise RunError(
                    f"cannot resume {self.path}: {key} was {saved[key]!r} and is now {value!r}; "
                    f"resume with the run's own settings ({before}) or start a new run"
                )

    # ---- checkpoints ----

    def newest_checkpoint(self) -> Path | None:
        """The checkpoint that is furthest along, or None."""
        places = [(m, p) for p in self.checkpoints.iterdir() if (m := CHECKPOINT.fullmatch(p.name))]
        return max(places, key=lambda mp: (int(mp[0][1]), int(mp[0][2] or 0)))[1] if places else None

    def policy_of(self, iteration: int) -> Path:
        """Where M_iteration lies."""
        return self.checkpoints / f"iteration_{iteration}"

    def save_policy(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> None:
        """Writes M_t (t = progress.iteration), then drops the checkpoints of the update that led to it."""

        def write(folder: Path) -> None:
            save_pretrained(model, tokenizer, folder)
            _write_progress(progress, folder)

        self._write_folder(self.policy_of(progress.iteration), write)
        self._drop_steps()

    def save_step(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Writes a checkpoint in the middle of an update, then drops the one before it."""

        def write(folder: Path) -> None:
            save_file(_own_memory(_trained(model)), folder / "model.safetensors")
            save_file(_flatten(optimizer), folder / "optimizer.safetensors")
            _write_progress(progress, folder)

        folder = self._step_folder(progress)
        self._write_folder(folder, write)
        self._drop_steps(keep=folder.name)

    def load_step(self, progress: Progress, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Loads the weights of the checkpoint that `save_step` wrote at `progress`; returns the optimizer's tensors."""
        folder = self._step_folder(progress)
        try:
            saved = load_file(folder / "model.safetensors")
            if set(saved) != set(_trained(model)):
                raise ValueError("it holds other tensors than the model trains")
            model.load_state_dict(saved, strict=False)
            return load_file(folder / "optimizer.safetensors")
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            raise RunError(
                f"checkpoint {folder} is damaged ({error}): delete it to go back to the one before"
            ) from error

    def load_progress(self, folder: Path) -> Progress:
        try:
            saved = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
            return Progress(**{**saved, "lagged": LaggedPoints(**saved["lagged"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise RunError(
                f"checkpoint {folder} is damaged ({error}): delete it to go back to the one before"
            ) from error

    def load_model(self, iteration: int, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        model, tokenizer = load_policy(str(self.policy_of(iteration)))
        return model.to(device).eval(), tokenizer

    def _step_folder(self, progress: Progress) -> Path:
        return self.checkpoints / f"iteration_{progress.iteration}_step_{progress.step}"

    def _drop_steps(self, keep: str | None = None) -> None:
        for place in self.checkpoints.glob("iteration_*_step_*"):
            if place.name != keep:
                shutil.rmtree(place)

    def _write_folder(self, target: Path, write: Callable[[Path], None]) -> None:
        unfinished = target.with_name(f".unfinished-{target.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        write(unfinished)
        for file in (f for f in unfinished.rglob("*") if f.is_file()):
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        if target.exists():
            shutil.rmtree(target)
        os.replace(unfinished, target)

    # ---- results ----

    def save_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prm: PRM | None) -> None:
        """Writes model/: the final policy for transformers and vLLM, with the PRM head, if any, beside it."""

        def write(folder: Path) -> None:
            save_pretrained(model, tokenizer, folder)
            if prm is not None:
                save_prm(prm, folder, tokenizer, beside=model)

        self._write_folder(self.path / "model", write)

    def write_summary(self, summary: dict) -> None:
        with replacing(self.path / "summary.json") as unfinished:
            unfinished.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def save_pretrained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Model and tokenizer in the form that transformers and vLLM load."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Puts back the state that `save_step` wrote."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".")
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _trained(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state without frozen parameters: those are in the checkpoint that the iteration began with."""
    frozen = {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def _flatten(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{index}.{name}": tensor.contiguous()
        for index, entries in optimizer.state_dict()["state"].items()
        for name, tensor in entries.items()
    }


def _own_memory(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tied weights share memory, which safetensors refuses: each name gets its own copy."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}


def _write_progress(progress: Progress, folder: Path) -> None:
    (folder / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")
