"""The phases of an iteration around the update: evaluate, collect rollouts; and how a run ends."""

from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from . import ranks
from .adapters import WithoutAdapters, count_parameters
from .ahead import rollout_shards, staleness
from .checkpoint import has_adapters
from .collect import check_sync, has_text, sample_rollouts, usable
from .errors import TrainingError
from .evaluation import audit_head, evaluate
from .importance import importance_weights
from .labelling import label_steps
from .objective import log_probs
from .policy_views import frozen
from .prm import PRM
from .report import write_report
from .rollout import UNLABELLED, Rollout, write_rollouts
from .run_directory import on_main
from .sampling_shards import SHARDS, drop_shards, weights_digest
from .segmentation import step_statistics, style_warning
from .setup_run import Session, derived_seed, open_frozen
from .sharding import is_sharded
from .watch import act, same_outcomes, watch_evaluation, watch_rollouts

SYNC = "weight_sync_max_abs_logp_diff"


def judge(s: Session, policy: PreTrainedModel, prm: PRM | None) -> None:
    """Evaluates `policy` = M_t on the held-out problems and records the result."""
    t = s.progress.iteration
    with s.recorder.bar("evaluation", f"evaluating M_{t} on {len(s.test)} held-out problems") as advance:
        record, tokens = evaluate(
            s.sampler, s.task, policy, s.initial, prm, s.test, s.tokenizer, s.recipe, iteration=t,
            seed=derived_seed(s.recipe, "evaluation", t), solutions=s.run.evaluations / f"iteration_{t}.parquet",
            shards=s.run.rollouts / SHARDS / f"iteration_{t}", on_progress=advance,
        )  # fmt: skip
    s.progress.records.append(record)
    s.progress.add("tokens", "evaluation", tokens)
    act(watch_evaluation(record, s.recipe), s.recipe, s.recorder.say)
    shown = {k: v for k, v in record.items() if k not in ("prm", "iteration", "steps")}
    s.recorder.scalars(shown | {f"steps/{k}": v for k, v in record["steps"].items()}, prefix="eval")
    s.recorder.results()


def collect(s: Session, policy: PreTrainedModel, prm: PRM | None, path: Path) -> None:
    """Samples the rollouts of iteration t, judges outcomes, labels steps, adds reference log-probs, and stores all in
    `path`. They are M_t's, or M_{t-1}'s where `max_staleness` let them be sampled ahead."""
    t, recipe = s.progress.iteration, s.recipe
    asked, weights, stale = s.train[t], weights_digest(policy), staleness(s, t)
    text = f"sampling {recipe.num_generations} completions of {len(asked)} prompts from M_{t - stale}"
    generator = policy if not stale else open_frozen(s.run, t - stale, recipe, policy.device)
    if stale:  # what was sampled ahead is there already; what is damaged or gone is sampled again
        s.sampler.sync(generator)
    with s.recorder.bar("rollout", text) as advance:
        sampled = sample_rollouts(
            s.sampler, s.task, asked, s.tokenizer, recipe, n=recipe.num_generations, temperature=recipe.temperature,
            seed=derived_seed(recipe, "rollout", t), on_progress=advance,
            folder=rollout_shards(s, t), weights=s.progress.ahead if stale else weights, say=s.recorder.say,
        )  # fmt: skip
    if stale:
        s.sampler.sync(policy)
    s.progress.add("tokens", "rollout", sum(len(r.completion_ids) for r in sampled))
    rollouts = usable(sampled)
    unverified = sum(not r.verified for r in sampled)
    empty = sum(not has_text(r) for r in sampled)
    if empty:
        s.recorder.say(f"skipped {empty} completions of M_{t} without any text: they have no step to learn from")
    if unverified:
        s.recorder.say(f"skipped {unverified} completions of M_{t} whose answers could not be compared: unverified")
    s.progress.add("counts", "rollouts_without_steps", empty)
    s.progress.add("counts", "unverified_rollouts", unverified)
    if not rollouts:
        raise TrainingError(
            f"M_{t} wrote no text, or no answer that could be compared, for any of {len(asked)} prompts: lower "
            "learning_rate, or give another model"
        )
    if warning := style_warning(step_statistics(rollouts), recipe.step_style):
        s.recorder.say(f"warning: {warning}")
    agreement = label_steps(s, rollouts, prm, weights)
    if agreement:
        s.progress.records[-1]["step_label_agreement"] = agreement
    with s.recorder.phase("reference", "reference log-probs"):
        own, difference = check_sync(generator, rollouts, recipe)
        reference = own if recipe.reference == "previous" else log_probs(s.initial, rollouts, recipe)
        for r, logp in zip(rollouts, reference, strict=True):
            r.ref_logps = logp.tolist()
        now = log_probs(policy, rollouts, recipe) if stale else own
        importance, mismatch = importance_weights(now, rollouts, recipe)
        for r, of_tokens in zip(rollouts, importance, strict=True):
            r.importance = of_tokens
    act(watch_rollouts(rollouts, recipe), recipe, s.recorder.say)
    metrics = _rollout_metrics(s, rollouts, prm) | mismatch | {SYNC: difference, "staleness": stale}
    metrics |= {f"agreement/{name}": value for name, value in agreement.items()}
    s.recorder.scalars(metrics, prefix="rollout")
    on_main(lambda: write_rollouts(rollouts, path))


def _rollout_metrics(s: Session, rollouts: list[Rollout], prm: PRM | None) -> dict:
    labels = [x for r in rollouts for x in r.step_labels if x != UNLABELLED]
    steps = step_statistics(rollouts)
    metrics = {
        **same_outcomes(rollouts),
        "accuracy": sum(r.label for r in rollouts) / len(rollouts),
        "truncated": sum(not r.finished for r in rollouts) / len(rollouts),
        "completions/mean_length": sum(len(r.completion_ids) for r in rollouts) / len(rollouts),
        "completions/mean_steps": steps["steps_mean"],
        "completions/single_step": steps["single_step_share"],
        "step_labels/labelled": len(labels) / steps["steps"],
        "step_labels/right": labels.count(1) / len(labels) if labels else None,
    }
    if prm is not None and s.task.exact_steps:
        view = audit_head(prm, rollouts, s.recipe)
        metrics |= {f"prm/{k}": view[k] for k in ("f1", "precision", "recall", "auroc", "ece")}
    return metrics


def reference_model(s: Session, policy: PreTrainedModel) -> PreTrainedModel | None:
    """The reference as a model, where the reference points need more of it than its log-probs."""
    if s.recipe.reference_points not in ("exact", "mismatched"):
        return None
    if s.recipe.reference == "initial":
        return s.initial
    if stale := staleness(s, s.progress.iteration):
        return open_frozen(s.run, s.progress.iteration - stale, s.recipe, policy.device)
    # Adapters of one iteration have just come: without them the policy is M_t.
    return WithoutAdapters(policy) if s.recipe.lora_rank and s.recipe.lora_merge == "iteration" else frozen(policy)


def _with_whole_trunk(s: Session, policy: PreTrainedModel, prm: PRM | None) -> PRM | None:
    """The PRM as rank 0 alone can write it: where its trunk is sharded or adapted, with the one of a checkpoint."""
    if prm is None or not (is_sharded(policy) or has_adapters(policy)) or not ranks.is_main():
        return prm
    for trunk, iteration in ((s.initial, 0), (policy, s.progress.iteration)):
        if prm.trunk is trunk:
            return replace(prm, trunk=s.run.load_model(iteration, torch.device("cpu"))[0])
    return prm


def finish(s: Session, policy: PreTrainedModel, prm: PRM | None) -> dict:
    """Writes model/, summary.json and report.html; returns the summary."""
    s.run.save_model(policy, s.tokenizer, _with_whole_trunk(s, policy, prm))
    seconds, tokens = s.progress.seconds, s.progress.tokens
    summary = {
        "recipe": s.recipe.name,
        "engine": s.sampler.name,
        "seconds": sum(seconds.values()),
        "tokens_per_second": {
            "rollout": tokens["rollout"] / (seconds["rollout"] + s.progress.seconds_beside),
            "train": tokens["train"] / seconds["update"],
        },
        "iterations": s.progress.records,
        "seed": s.recipe.seed,
        "phase_seconds": seconds,
        "model_parameters": count_parameters(policy),
        "held_out_problems": len(s.test),
        "task": s.task.name,
        "label_source": s.recipe.label_source,
        "counts": s.progress.counts,
    }
    s.run.write_summary(summary)
    s.sampler.close()
    s.recorder.close()
    report = ranks.from_main(lambda: write_report(s.run.path))
    drop_shards(s.run.rollouts / SHARDS)
    s.recorder.say(f"model    {s.run.path / 'model'}\nsummary  {s.run.path / 'summary.json'}\nreport   {report}")
    return summary
