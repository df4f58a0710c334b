"""What a run starts from: problems, the policy M_0, the sampler, and its progress, fresh or from a checkpoint."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .adapters import require_adapters
from .collect import Asked, ask
from .command import open_device, say_complaints
from .errors import RunError
from .labelled import Labelled, read_labelled
from .policy import build_policy, load_policy
from .prm_files import CONFIG as PRM_CONFIG
from .recipe import Recipe, needs_seed
from .recorder import Recorder, require_report
from .run_directory import Progress, RunDirectory
from .sampler import Sampler, open_sampler, require_engine
from .segmentation import step_style
from .task import Problems, Task
from .warm_start import examples, fine_tune


def derived_seed(recipe: Recipe, *purpose: object) -> int:
    """A seed for one purpose: the same in a resumed run, another for every purpose."""
    return zlib.crc32(repr((recipe.seed, *purpose)).encode())


def make_initial_policy(
    recipe: Recipe, task: Task, problems: Problems, recorder: Recorder
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """M_0 where the recipe names no model: a small Llama fine-tuned on the task's demonstrations."""
    shown = task.demonstrations(problems)
    model = build_policy(
        shown.tokenizer, hidden_size=recipe.hidden_size, layers=recipe.num_layers, heads=recipe.num_heads,
        max_length=recipe.context_length, seed=derived_seed(recipe, "policy"),
    ).to(open_device(recipe.device))  # fmt: skip
    with recorder.bar("warm_start", "making M_0 from demonstrations") as advance:
        fine_tune(
            model, examples(task, shown), steps=recipe.warm_start_steps, batch_size=recipe.warm_start_batch_size,
            learning_rate=recipe.warm_start_learning_rate, seed=str(recipe.seed),
            on_step=lambda step, loss: advance(step, recipe.warm_start_steps, f"loss {loss:.3f}"),
        )  # fmt: skip
    return model, shown.tokenizer


@dataclass
class Session:
    """An open run: what every phase of the loop needs besides the policy it works on."""

    recipe: Recipe
    task: Task
    run: RunDirectory
    progress: Progress
    recorder: Recorder
    sampler: Sampler
    tokenizer: PreTrainedTokenizerBase
    initial: PreTrainedModel  # M_0
    test: list[Asked]  # held-out problems
    seed: list[Asked]  # those that the PRM head is fitted on
    train: list[list[Asked]]  # of each iteration
    prm_rows: Labelled | None  # prm_dataset, where the recipe has one


def open_session(recipe: Recipe, task: Task) -> tuple[Session, PreTrainedModel]:
    """Opens the run directory, makes or loads M_0, starts the sampler. Also returns the policy to go on with: M_0, or
    with `resume` the M_t of the newest checkpoint."""
    # Whatever can be wrong is found out before anything on the disk is touched.
    require_labels(recipe, task)
    step_style(recipe.step_style, recipe.step_pattern)
    device, problems, prm_rows = open_device(recipe.device), task.problems(), None
    if recipe.prm_dataset is not None:
        prm_rows = read_labelled(
            recipe.prm_dataset, format=recipe.labelled_format, split=recipe.labelled_split,
            neutral=recipe.labelled_neutral,
        )  # fmt: skip
    require_engine(recipe)
    require_report(recipe)
    require_adapters(recipe)
    given = load_policy(recipe.model) if recipe.model is not None else None
    run = RunDirectory(recipe)
    newest = run.newest_checkpoint()
    progress = run.load_progress(newest) if newest else Progress()
    recorder = Recorder(recipe, run, progress)
    say_complaints(recorder.console, problems.complaints, "rows")
    if newest is None:
        run.save_policy(*(given or make_initial_policy(recipe, task, problems, recorder)), progress)
    initial, tokenizer = run.load_model(0, device)
    policy, _ = run.load_model(progress.iteration, device)
    progress.counts["skipped_rows"] = len(problems.complaints)

    def asked(which: str, wanted: Sequence[Any]) -> list[Asked]:
        found, complaints = ask(task, wanted, tokenizer, policy, recipe)
        name = f"skipped_{which}_prompts"
        progress.counts[name] = progress.counts.get(name, 0) + len(complaints)
        say_complaints(recorder.console, [f"{which} {complaint}" for complaint in complaints], f"{which} prompts")
        return found

    counted = ("skipped_held-out_prompts", "skipped_seed_prompts", "skipped_training_prompts")
    progress.counts |= dict.fromkeys(counted, 0)  # a resumed run counts them anew
    test = asked("held-out", problems.test)
    seed = asked("seed", problems.seed) if problems.seed else []
    train = [asked("training", wanted) for wanted in problems.train]
    with recorder.phase("engine", "starting the sampler"):
        sampler = open_sampler(recipe, policy, tokenizer, run.policy_of(0), run.path / "engine.log")
    at = f"M_{progress.iteration}" + (f" (update step {progress.step})" if progress.step else "")
    recorder.say(
        f"{recipe.name}: {sum(p.numel() for p in policy.parameters()) / 1e6:.2f} M parameters on {device}, sampled by "
        f"{sampler.name}, from {at} to M_{recipe.iterations}, in {run.path}"
    )
    return Session(
        recipe, task, run, progress, recorder, sampler, tokenizer, initial, test, seed, train, prm_rows
    ), policy


def require_labels(recipe: Recipe, task: Task) -> None:
    """RunError when nothing can give the step labels that the recipe asks for."""
    if recipe.prm is not None and not (Path(recipe.prm) / PRM_CONFIG).is_file():
        raise RunError(f"prm {recipe.prm!r} holds no {PRM_CONFIG}: give a directory that train_prm wrote")
    if task.exact_steps:
        return
    if recipe.label_source == "checker":
        raise RunError(
            f"label_source checker: task {task.name} has no exact checker of steps; take head, monte_carlo or consensus"
        )
    if needs_seed(recipe) and recipe.prm_labels == "checker":
        raise RunError(
            f"prm_labels checker: task {task.name} has no exact checker of steps to fit the PRM head with; set "
            "prm_labels to monte_carlo, prm_dataset to step-labelled data, or prm to a head that train_prm wrote"
        )
