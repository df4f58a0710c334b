"""What a run starts from: problems, the policy M_0, the sampler, and its progress, fresh or from a checkpoint."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import ranks
from .adapters import WithoutAdapters, attach_adapters, count_parameters, require_adapters
from .checkpointing import checkpoint_activations
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
from .sharding import shard
from .task import Problems, Task
from .token_budget import automatic_budget
from .warm_start import examples, fine_tune


def derived_seed(recipe: Recipe, *purpose: object) -> int:
    """A seed for one purpose: the same in a resumed run, another for every purpose."""
    return zlib.crc32(repr((recipe.seed, *purpose)).encode())


def make_initial_policy(
    recipe: Recipe, task: Task, problems: Problems, on_step: Callable[[int, float], None]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """M_0 where the recipe names no model: a small Llama fine-tuned on the task's demonstrations.

    `on_step(step, loss in nats)` is told of every supervised step.
    """
    shown = task.demonstrations(problems)
    model = build_policy(
        shown.tokenizer, hidden_size=recipe.hidden_size, layers=recipe.num_layers, heads=recipe.num_heads,
        max_length=recipe.context_length, seed=derived_seed(recipe, "policy"),
    ).to(open_device(recipe.device))  # fmt: skip
    fine_tune(
        model, examples(task, shown), steps=recipe.warm_start_steps, batch_size=recipe.warm_start_batch_size,
        learning_rate=recipe.warm_start_learning_rate, seed=str(recipe.seed), on_step=on_step,
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
    initial: PreTrainedModel  # M_0; with lora_merge end the policy without its adapters
    test: list[Asked]  # held-out problems
    seed: list[Asked]  # those that the PRM head is fitted on
    train: list[list[Asked]]  # of each iteration
    prm_rows: Labelled | None  # prm_dataset, where the recipe has one


def open_session(recipe: Recipe, task: Task) -> tuple[Session, PreTrainedModel]:
    """Opens the run directory, makes or loads M_0, starts the sampler. Also returns the policy to go on with: M_0, or
    with `resume` the M_t of the newest checkpoint."""
    # Whatever can be wrong is found out before anything on the disk is touched.
    require_labels(recipe, task)
    require_ranks(recipe)
    step_style(recipe.step_style, recipe.step_pattern)
    device, problems, prm_rows = open_device(recipe.device), task.problems(), None
    if recipe.prm_dataset is not None:
        prm_rows = read_labelled(
            recipe.prm_dataset, format=recipe.labelled_format, split=recipe.labelled_split,
            neutral=recipe.labelled_neutral,
        )  # fmt: skip
    require_weights_of_its_own(recipe, require_engine(recipe))
    require_report(recipe)
    require_adapters(recipe)
    given = load_policy(recipe.model) if recipe.model is not None else None
    run = RunDirectory(recipe)
    newest = run.newest_checkpoint()
    progress = run.load_progress(newest) if newest else Progress()
    recorder = Recorder(recipe, run, progress)
    say_complaints(recorder.console, problems.complaints, "rows")
    if newest is None:
        model, words = given or (None, None)
        if model is None and ranks.is_main():
            with recorder.bar("warm_start", "making M_0 from demonstrations") as advance:
                model, words = make_initial_policy(
                    recipe, task, problems,
                    on_step=lambda step, loss: advance(step, recipe.warm_start_steps, f"loss {loss:.3f}"),
                )  # fmt: skip
        run.save_policy(model, words, progress)
        del model
    del given
    policy, tokenizer = open_policy(run, progress, recipe, device)
    through = recipe.lora_rank and recipe.lora_merge == "end"
    initial = WithoutAdapters(policy) if through else open_frozen(run, 0, recipe, device)
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
    recipe = resolved(recipe, policy, device, progress, recorder.say)
    at = f"M_{progress.iteration}" + (f" (update step {progress.step})" if progress.step else "")
    recorder.say(
        f"{recipe.name}: {count_parameters(policy) / 1e6:.2f} M parameters on {device}, sampled by "
        f"{sampler.name}, from {at} to M_{recipe.iterations}, in {run.path}"
    )
    return Session(
        recipe, task, run, progress, recorder, sampler, tokenizer, initial, test, seed, train, prm_rows
    ), policy


def open_policy(
    run: RunDirectory, progress: Progress, recipe: Recipe, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The policy as it was in M_t, from the run's checkpoints, to be trained: with the adapters that live through the
    run, sharded where there are several ranks, with its activations checkpointed where the recipe asks for it."""
    place = _loading_place(device)
    if recipe.lora_rank and recipe.lora_merge == "end":
        policy, tokenizer = run.load_model(0, place)
        attach_adapters(policy, recipe, derived_seed(recipe, "adapters"))
        run.load_adapters(policy, progress)
    else:
        policy, tokenizer = run.load_model(progress.iteration, place)
    if recipe.gradient_checkpointing:
        checkpoint_activations(policy)
    shard(policy, bf16=recipe.bf16, device=device)
    return policy, tokenizer


def open_frozen(run: RunDirectory, iteration: int, recipe: Recipe, device: torch.device) -> PreTrainedModel:
    """M_iteration from its checkpoint, to be read, sharded where there are several ranks."""
    model, _ = run.load_model(iteration, _loading_place(device))
    model.requires_grad_(False)
    shard(model, bf16=recipe.bf16, device=device)
    return model


def _loading_place(device: torch.device) -> torch.device:
    """A model that is going to be sharded need not fit on one device."""
    return device if ranks.size() == 1 else torch.device("cpu")


def resolved(
    recipe: Recipe, policy: PreTrainedModel, device: torch.device, progress: Progress, say: Callable[[str], None]
) -> Recipe:
    """The recipe with the micro-batches that fit: the planner's for `max_tokens_per_micro_batch: 0`, once all models
    are in memory, or those that a resumed run had, as long as what they depend on in the recipe is the same."""
    wanted = recipe.max_tokens_per_micro_batch
    decided_by = f"{wanted} tokens, gradient_checkpointing {recipe.gradient_checkpointing}, {ranks.size()} ranks"
    if progress.fitting_tokens_of != decided_by:
        progress.fitting_tokens_of = decided_by
        progress.fitting_tokens = wanted or automatic_budget(recipe, policy, device)
    if progress.fitting_tokens != wanted:
        say(f"micro-batches of {progress.fitting_tokens:,} tokens: as many as fit")
    return replace(recipe, max_tokens_per_micro_batch=progress.fitting_tokens)


def require_ranks(recipe: Recipe) -> None:
    """RunError when the recipe asks for something that one rank alone can do."""
    if ranks.size() == 1:
        return
    if recipe.lora_rank and recipe.lora_merge == "iteration":
        raise RunError(f"lora_merge iteration runs on one rank, and there are {ranks.size()}: set lora_merge to end")
    if recipe.prm_trunk == "trained":
        raise RunError(f"prm_trunk trained runs on one rank, and there are {ranks.size()}: set prm_trunk to initial")


def require_weights_of_its_own(recipe: Recipe, engine: str) -> None:
    """RunError where engine transformers, which samples from the trainer's own model, cannot do what is asked."""
    if engine != "transformers":
        return
    if recipe.max_staleness:
        raise RunError(
            "max_staleness 1 samples while the update runs, and engine transformers samples from the very weights that "
            "it moves: take engine vllm, or set max_staleness to 0"
        )
    if ranks.size() > 1:
        raise RunError(
            f"engine transformers samples on one rank, and there are {ranks.size()}: take engine vllm (pip install "
            "'stepkto-fast[vllm]')"
        )


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
