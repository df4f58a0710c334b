"""The update M_t -> M_{t+1}: Step-KTO, or what it is compared with, over one iteration's rollouts."""

import math
import random
import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel, get_scheduler

from .baselines import baseline_batches, units
from .errors import RunError
from .objective import BatchResult, accumulate_gradients, class_weights, estimate_points
from .recipe import Recipe
from .recorder import Recorder
from .rollout import Rollout
from .run_directory import Progress, RunDirectory
from .sharding import clip_gradients
from .token_budget import TokenBudget, with_retry
from .watch import act, stop_on_nonfinite, watch_step


def update(
    policy: PreTrainedModel,
    reference: PreTrainedModel | None,
    rollouts: Sequence[Rollout],
    recipe: Recipe,
    run: RunDirectory,
    progress: Progress,
    recorder: Recorder,
) -> None:
    """Trains `policy` in place from step `progress.step` to the end of the iteration, saving as it goes.

    In the middle of an iteration weights and optimizer are those of the checkpoint at `progress`.

    `reference` is needed by the estimators `exact` and `mismatched` only. The order of the batches depends on the
    seed and the iteration alone. A loss or gradient that is not finite stops the run before the optimizer moves:
    RunError, with the batch saved beside the checkpoints. Out of memory, a step is repeated with smaller micro-batches.
    """
    batches = batch_order(rollouts, recipe, progress.iteration)
    weights = class_weights(rollouts, recipe)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=recipe.learning_rate, betas=(recipe.adam_beta1, recipe.adam_beta2),
        weight_decay=recipe.weight_decay,
    )  # fmt: skip
    schedule = get_scheduler(
        recipe.lr_scheduler_type,
        optimizer,
        num_warmup_steps=recipe.warmup_steps,
        num_training_steps=len(batches),
    )
    if progress.step:
        run.load_step(progress, policy, optimizer)
    with warnings.catch_warnings():  # torch warns of a schedule that runs ahead of a (restored) optimizer
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(progress.step):
            schedule.step()
    longest = max(len(unit) for batch in batches for unit in units(batch, recipe))
    budget = TokenBudget(progress.fitting_tokens or recipe.max_tokens_per_micro_batch, longest)
    warned = False
    policy.train()
    with recorder.bar("update", f"updating M_{progress.iteration} by {len(batches)} steps") as advance:
        for batch in batches[progress.step :]:
            seed = recipe.seed * 1_000_003 + progress.global_step

            def gradients(
                tokens: int, batch: list[Rollout] = batch, seed: int = seed
            ) -> tuple[tuple[float, float], BatchResult]:
                fitting = replace(recipe, max_tokens_per_micro_batch=tokens)
                found = estimate_points(policy, reference, batch, fitting, progress.lagged, seed)
                return found, accumulate_gradients(policy, batch, fitting, weights, found)

            try:
                points, result = with_retry(gradients, budget, optimizer.zero_grad, recorder.say)
            except ValueError as error:
                raise RunError(f"iteration {progress.iteration}, step {progress.step}: {error}") from error
            progress.fitting_tokens = budget.tokens
            norm = clip_gradients(trained, recipe.max_grad_norm)
            if not (math.isfinite(result.loss) and math.isfinite(norm)):
                stop_on_nonfinite(policy, result, norm, batch, recipe, weights, points, run, progress)
            if not warned and (warnings_found := watch_step(result, batch, recipe)):
                act(warnings_found, recipe, recorder.say)
                warned = True  # once an update: what is too far stays so
            rate = schedule.get_last_lr()[0]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.lagged.update(float(result.log_ratios.mean()), float(result.step_log_ratios.mean()))
            progress.step += 1
            progress.global_step += 1
            progress.add("tokens", "train", sum(len(r) for r in batch))
            if progress.step % recipe.logging_steps == 0:
                recorder.scalars(_metrics(result, batch, recipe, points, norm, rate))
            if progress.step % recipe.save_steps == 0 and progress.step < len(batches):
                run.save_step(policy, optimizer, progress)
            advance(progress.step, len(batches), f"loss {result.loss:.3f}")
    policy.eval()


def batch_order(rollouts: Sequence[Rollout], recipe: Recipe, iteration: int) -> list[list[Rollout]]:
    """The optimizer batches of an iteration, shuffled anew in each epoch.

    The last one of an epoch may be smaller; below half a batch it joins the one before it. Objectives other than
    step_kto have as many batches of as many completions, of those that they learn from (`baseline_batches`).
    """
    rng = random.Random(f"batch_order {recipe.seed} {iteration}")
    batches = []
    for _ in range(recipe.num_train_epochs):
        order = rng.sample(list(rollouts), len(rollouts))
        epoch = [order[k : k + recipe.train_batch_size] for k in range(0, len(order), recipe.train_batch_size)]
        if len(epoch) > 1 and 2 * len(epoch[-1]) < recipe.train_batch_size:
            short = epoch.pop()
            epoch[-1] = epoch[-1] + short
        batches += epoch
    if recipe.objective != "step_kto":
        return baseline_batches(rollouts, map(len, batches), recipe, iteration)
    return batches


def _metrics(
    result: BatchResult,
    batch: list[Rollout],
    recipe: Recipe,
    points: tuple[float, float],
    norm: float,
    rate: float,
) -> dict:
    """TRL's names, with `step_` twins. Rewards are beta times the log-ratio; kl is the unclamped reference point."""
    right = torch.tensor([r.label for r in batch])
    steps = torch.tensor([x for r in batch for x in r.step_labels])
    metrics: dict[str, float] = {
        "loss": result.loss, "loss/outcome": result.outcome_loss, "loss/step": result.step_loss,
        "kl": points[0], "step_kl": points[1], "grad_norm": norm, "learning_rate": rate,
        "num_tokens": sum(len(r) for r in batch),
    }  # fmt: skip
    # The micro-batches pack in batch order, so the results line up with it.
    for prefix, ratios, chosen, rejected, beta in (
        ("", result.log_ratios, right, ~right, recipe.beta),
        ("step_", result.step_log_ratios, steps == 1, steps == 0, recipe.step_beta),
    ):
        for name, mask in (("chosen", chosen), ("rejected", rejected)):
            if mask.any():
                metrics[f"{prefix}rewards/{name}"] = beta * float(ratios[mask].mean())
        if chosen.any() and rejected.any():
            metrics[f"{prefix}rewards/margins"] = (
                metrics[f"{prefix}rewards/chosen"] - metrics[f"{prefix}rewards/rejected"]
            )
    for name, mask in (("chosen", right), ("rejected", ~right)):
        if mask.any():
            metrics[f"logps/{name}"] = float(result.sequence_logps[mask].mean())
    return metrics
