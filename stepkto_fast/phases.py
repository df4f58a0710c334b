"""The phases of an iteration around the update: fit the PRM head, evaluate, collect rollouts; and how a run ends."""

import copy
from pathlib import Path

from transformers import PreTrainedModel

from .collect import ask, check_sync, label_steps, sample_rollouts, usable
from .errors import RunError
from .evaluation import evaluate
from .objective import log_probs
from .prm import PRM, audit, calibrates, fit_prm, seed_generations
from .report import write_report
from .rollout import Rollout, read_rollouts, write_rollouts
from .setup_run import Session, derived_seed, say_skipped


def fit_head(s: Session, policy: PreTrainedModel, fitted: PRM | None) -> PRM:
    """The PRM head for `policy` = M_t, fitted on the seed set; with `prm_trunk: initial` fitted once, on M_0.

    The seed set is sampled from M_0 once, half of it at a higher temperature, labelled by the exact checker, and kept
    in rollouts/seed.parquet.
    """
    frozen = s.recipe.prm_trunk == "initial"
    if frozen and fitted is not None:
        return fitted
    path = s.run.rollouts / "seed.parquet"
    if not path.exists():
        _sample_seed_set(s, path)
    with s.recorder.bar("prm", f"fitting the PRM head on M_{s.progress.iteration}") as advance:
        seed = derived_seed(s.recipe, "prm", 0 if frozen else s.progress.iteration)
        return fit_prm(s.initial if frozen else policy, read_rollouts(path), s.recipe, seed, on_step=advance)


def _sample_seed_set(s: Session, path: Path) -> None:
    if s.progress.iteration:
        raise RunError(f"{path} is gone: it holds the PRM head's seed set, sampled from M_0; start the run anew")
    asked, complaints = ask(s.problems.seed, s.tokenizer, s.initial, s.recipe)
    say_skipped("seed", complaints, s.progress, s.recorder)
    natural, hot = seed_generations(s.recipe)
    text = f"sampling the PRM head's seed set from M_0 ({len(asked)} problems)"
    with s.recorder.bar("seed_set", text) as advance:
        drawn = [
            sample_rollouts(
                s.sampler, asked, s.tokenizer, s.recipe, n=n, temperature=temperature,
                seed=derived_seed(s.recipe, "seed set", kind), on_progress=advance,
            )
            for kind, n, temperature in (
                ("natural", natural, s.recipe.temperature), ("hot", hot, s.recipe.prm_seed_temperature),
            )
            if n
        ]  # fmt: skip
    for r in drawn[1] if hot else ():
        r.sample += natural
    seed_set = usable([r for rollouts in drawn for r in rollouts])
    if {calibrates(r, s.recipe) for r in seed_set} != {True, False}:
        raise RunError(
            f"M_0 wrote text for {len({r.problem_id for r in seed_set})} of {len(asked)} seed problems, too few to fit "
            "and calibrate the PRM head: raise warm_start_steps or prm_seed_problems, or give another model"
        )
    write_rollouts(seed_set, path)


def judge(s: Session, policy: PreTrainedModel, prm: PRM) -> None:
    """Evaluates `policy` = M_t on the held-out problems and records the result."""
    t = s.progress.iteration
    with s.recorder.bar("evaluation", f"evaluating M_{t} on {len(s.test)} held-out problems") as advance:
        record, tokens = evaluate(
            s.sampler, policy, s.initial, prm, s.test, s.tokenizer, s.recipe, iteration=t,
            seed=derived_seed(s.recipe, "evaluation", t), solutions=s.run.evaluations / f"iteration_{t}.parquet",
            on_progress=advance,
        )  # fmt: skip
    s.progress.records.append(record)
    s.progress.add("tokens", "evaluation", tokens)
    s.recorder.scalars({k: v for k, v in record.items() if k not in ("prm", "iteration")}, prefix="eval")
    s.recorder.results()


def collect(s: Session, policy: PreTrainedModel, prm: PRM, path: Path) -> None:
    """Samples M_t's rollouts, judges outcomes, labels steps, adds reference log-probs, and stores them in `path`."""
    t, recipe = s.progress.iteration, s.recipe
    asked, complaints = ask(s.problems.train[t], s.tokenizer, policy, recipe)
    say_skipped("training", complaints, s.progress, s.recorder)
    text = f"sampling {recipe.num_generations} completions of {len(asked)} prompts from M_{t}"
    with s.recorder.bar("rollout", text) as advance:
        sampled = sample_rollouts(
            s.sampler, asked, s.tokenizer, recipe, n=recipe.num_generations, temperature=recipe.temperature,
            seed=derived_seed(recipe, "rollout", t), on_progress=advance,
        )  # fmt: skip
    s.progress.add("tokens", "rollout", sum(len(r.completion_ids) for r in sampled))
    rollouts = usable(sampled)
    if dropped := len(sampled) - len(rollouts):
        s.recorder.say(f"skipped {dropped} completions of M_{t} without any text: they have no step to learn from")
    s.progress.add("counts", "rollouts_without_steps", dropped)
    if not rollouts:
        raise RunError(
            f"M_{t} wrote no text for any of {len(asked)} prompts: lower learning_rate, or give another model"
        )
    with s.recorder.phase("prm", f"labelling the steps of {len(rollouts)} completions"):
        label_steps(rollouts, prm, recipe)
    with s.recorder.phase("reference", "reference log-probs"):
        own, difference = check_sync(policy, rollouts, recipe)
        reference = own if recipe.reference == "previous" else log_probs(s.initial, rollouts, recipe)
        for r, logp in zip(rollouts, reference, strict=True):
            r.ref_logps = logp.tolist()
    s.recorder.scalars(_rollout_metrics(rollouts, prm, difference), prefix="rollout")
    write_rollouts(rollouts, path)


def _rollout_metrics(rollouts: list[Rollout], prm: PRM, sync_difference: float) -> dict:
    labels = [x for r in rollouts for x in r.step_labels]
    view = audit(
        [p for r in rollouts for p in r.step_probs], [x for r in rollouts for x in r.checker_labels],
        float(prm.head.threshold),
    )  # fmt: skip
    return {
        "accuracy": sum(r.label for r in rollouts) / len(rollouts),
        "truncated": sum(not r.finished for r in rollouts) / len(rollouts),
        "completions/mean_length": sum(len(r.completion_ids) for r in rollouts) / len(rollouts),
        "completions/mean_steps": len(labels) / len(rollouts),
        "step_labels/right": labels.count(1) / len(labels),
        "weight_sync_max_abs_logp_diff": sync_difference,
        **{f"prm/{k}": view[k] for k in ("f1", "precision", "recall", "auroc", "ece")},
    }


def frozen_copy(s: Session, policy: PreTrainedModel) -> PreTrainedModel | None:
    """The reference as a model, where the reference points need more of it than its log-probs."""
    if s.recipe.reference_points not in ("exact", "mismatched"):
        return None
    return s.initial if s.recipe.reference == "initial" else copy.deepcopy(policy).requires_grad_(False)


def finish(s: Session, policy: PreTrainedModel, prm: PRM) -> dict:
    """Writes model/, summary.json and report.html; returns the summary."""
    s.run.save_model(policy, s.tokenizer, prm)
    seconds, tokens = s.progress.seconds, s.progress.tokens
    summary = {
        "recipe": s.recipe.name,
        "engine": s.sampler.name,
        "seconds": sum(seconds.values()),
        "tokens_per_second": {
            "rollout": tokens["rollout"] / seconds["rollout"],
            "train": tokens["train"] / seconds["update"],
        },
        "iterations": s.progress.records,
        "seed": s.recipe.seed,
        "phase_seconds": seconds,
        "model_parameters": sum(p.numel() for p in policy.parameters()),
        "held_out_problems": len(s.test),
        "counts": s.progress.counts,
    }
    s.run.write_summary(summary)
    s.recorder.close()
    report = write_report(s.run.path)
    s.recorder.say(f"model    {s.run.path / 'model'}\nsummary  {s.run.path / 'summary.json'}\nreport   {report}")
    return summary
