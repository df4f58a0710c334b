"""Offline training: Step-KTO on a dataset of labelled completions, with no rollouts and no sampling engine.

M_0 is the given model and the reference; `num_train_epochs` passes over the data make M_1. Every tenth prompt is held
out, and says how well the log-ratios tell right from wrong completions and steps.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import ranks
from .adapters import add_adapters, count_parameters, require_adapters
from .command import open_device, say_complaints
from .errors import RunError
from .labelled import labelled_rollouts, read_labelled
from .labelling import flip_labels
from .objective import log_probs
from .policy import load_policy
from .policy_views import frozen
from .prm_metrics import auroc
from .recipe import Recipe
from .recorder import Recorder, require_report
from .report import write_report
from .rollout import UNLABELLED, Rollout, read_rollouts, write_rollouts
from .run_directory import Progress, RunDirectory, on_main
from .sampler import context_length
from .segmentation import step_statistics, step_style, style_warning
from .setup_run import derived_seed, open_policy, require_ranks, resolved
from .task import asked_rows
from .update import update

HELD_OUT = 10  # every tenth prompt is never trained on


def train_offline(recipe: Recipe) -> dict:
    """Trains on `recipe.labelled_dataset` and returns what summary.json holds; RunError for what the user can mend."""
    if recipe.model is None:
        raise RunError("label_source dataset trains a given model: set model to a directory or a hub name")
    device = open_device(recipe.device)
    require_report(recipe)
    require_ranks(recipe)
    require_adapters(recipe)
    model, tokenizer = load_policy(recipe.model)
    rollouts, complaints, notes = read_data(recipe, model, tokenizer)
    run = RunDirectory(recipe)
    newest = run.newest_checkpoint()
    progress = run.load_progress(newest) if newest else Progress()
    recorder = Recorder(recipe, run, progress)
    say_complaints(recorder.console, complaints, "rows")
    progress.counts["skipped_rows"] = len(complaints)
    if warning := style_warning(step_statistics(rollouts), recipe.step_style):
        notes.append(warning)
    for note in notes:
        recorder.say(f"warning: {note}")
    if newest is None:
        run.save_policy(model, tokenizer, progress)
    del model
    policy, _ = open_policy(run, progress, recipe, device)
    recipe = resolved(recipe, policy, device, progress, recorder.say)
    training, held_out = (run.rollouts / "iteration_0.parquet", run.rollouts / "held_out.parquet")
    if progress.iteration == 0 and progress.step == 0:
        with recorder.phase("reference", f"reference log-probs of {len(rollouts)} completions"):
            for r, logp in zip(rollouts, log_probs(policy, rollouts, recipe), strict=True):
                r.ref_logps = logp.tolist()
        parts: dict[Path, list[Rollout]] = {training: [], held_out: []}
        for r in rollouts:
            parts[training if r.problem_id % HELD_OUT else held_out].append(r)
        flip_labels(parts[training], recipe, 0)
        for path, part in parts.items():
            on_main(partial(write_rollouts, part, path))
        _record(policy, read_rollouts(held_out), recipe, progress, recorder)
    if progress.iteration == 0:
        merge = add_adapters(policy, recipe, derived_seed(recipe, "adapters", 0))
        reference = frozen(policy) if recipe.reference_points in ("exact", "mismatched") else None
        update(policy, reference, read_rollouts(training), recipe, run, progress, recorder)
        merge()
        progress.next_iteration()
        _record(policy, read_rollouts(held_out), recipe, progress, recorder)
        run.save_policy(policy, tokenizer, progress)
    return _finish(policy, tokenizer, recipe, run, progress, recorder)


def read_data(
    recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Rollout], list[str], list[str]]:
    """The dataset's completions with a known outcome, what was wrong with the rows left out, and what else to know."""
    source = recipe.labelled_dataset
    assert source is not None
    longest, notes = context_length(recipe, model), list[str]()
    found = read_labelled(
        source, format=recipe.labelled_format, split=recipe.labelled_split, neutral=recipe.labelled_neutral
    )
    rollouts, complaints = labelled_rollouts(
        asked_rows(found.rows, recipe, tokenizer), tokenizer, max_length=longest,
        style=step_style(recipe.step_style, recipe.step_pattern), on_note=notes.append,
    )  # fmt: skip
    complaints = found.complaints + complaints
    complaints += [
        f"{row['where']}: column 'label', the outcome, is missing: the row serves train_prm alone"
        for row in found.rows
        if "label" not in row
    ]
    judged = [r for r in rollouts if r.verified]
    # What was judged is the whole completion: of one that is cut off nobody knows whether it is right.
    whole = [r for r in judged if r.finished]
    if len(whole) < len(judged):
        complaints += [
            f"{source}: a completion is longer than context_length ({longest} tokens) with its prompt: raise it"
        ] * (len(judged) - len(whole))
    numbers: dict[int, int] = {}
    for r in whole:
        r.problem_id = numbers.setdefault(r.problem_id, len(numbers))
    if len(numbers) < 2:
        raise RunError(
            f"{source!r} has whole completions with an outcome of {len(numbers)} prompts: one is held out, so give at "
            f"least two; first complaint: {(complaints or ['none'])[0]}"
        )
    return whole, complaints, notes


def _record(
    policy: PreTrainedModel, held_out: Sequence[Rollout], recipe: Recipe, progress: Progress, recorder: Recorder
) -> None:
    """How M_t's log-ratios (nats, against M_0) tell right from wrong on the held-out completions."""
    with recorder.phase("evaluation", f"evaluating M_{progress.iteration} on {len(held_out)} held-out completions"):
        ratios = [
            logp - torch.tensor(r.ref_logps)
            for r, logp in zip(held_out, log_probs(policy, held_out, recipe), strict=True)
        ]
    outcomes = [(float(d.sum()), r.label) for r, d in zip(held_out, ratios, strict=True)]
    steps = [
        (float(d[a:b].sum()), label == 1)
        for r, d in zip(held_out, ratios, strict=True)
        for (a, b), label in zip(pairwise([0, *r.step_ends]), r.step_labels, strict=True)
        if label != UNLABELLED
    ]
    record: dict[str, float | None] = {"iteration": progress.iteration, "held_out_completions": len(held_out)}
    record["held_out_right"] = sum(r.label for r in held_out)
    for prefix, pairs, beta in (("", outcomes, recipe.beta), ("step_", steps, recipe.step_beta)):
        right, wrong = ([beta * d for d, x in pairs if x is which] for which in (True, False))
        record[f"{prefix}rewards/chosen"] = sum(right) / len(right) if right else None
        record[f"{prefix}rewards/rejected"] = sum(wrong) / len(wrong) if wrong else None
        record[f"{prefix}auroc"] = auroc(np.array([d for d, _ in pairs]), np.array([x for _, x in pairs], dtype=bool))
    progress.records.append(record)
    recorder.scalars({k: v for k, v in record.items() if k != "iteration"}, prefix="eval")


def _finish(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, run: RunDirectory, progress: Progress,
    recorder: Recorder,
) -> dict:  # fmt: skip
    run.save_model(policy, tokenizer, None)
    for name, key in (("completions", "auroc"), ("steps", "step_auroc")):
        values = ["-" if r[key] is None else f"{r[key]:.3f}" for r in progress.records]
        recorder.say(f"held-out {name}: AUROC of the log-ratios, right against wrong: {' -> '.join(values)}")
    summary = {
        "recipe": recipe.name,
        "engine": None,
        "seconds": sum(progress.seconds.values()),
        "tokens_per_second": {"train": progress.tokens["train"] / progress.seconds["update"]},
        "iterations": progress.records,
        "seed": recipe.seed,
        "phase_seconds": progress.seconds,
        "model_parameters": count_parameters(policy),
        "held_out_completions": progress.records[0]["held_out_completions"],
        "held_out_right": progress.records[0]["held_out_right"],
        "label_source": recipe.label_source,
        "counts": progress.counts,
    }
    run.write_summary(summary)
    recorder.close()
    report = ranks.from_main(lambda: write_report(run.path))
    recorder.say(f"model    {run.path / 'model'}\nsummary  {run.path / 'summary.json'}\nreport   {report}")
    return summary
