"""The training loop: `python -m stepkto_fast.train [recipe.yaml] [--key value ...]`.

M_0 is made or loaded; then, for each iteration: hand the weights to the sampler, fit the PRM head, evaluate; sample
rollouts, label outcomes and steps; update by Step-KTO. Read `train` first: it is the whole loop.
"""

import copy
import logging
import sys
import time

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from .collect import Asked, ask, check_sync, label_steps, sample_rollouts, usable
from .errors import RunError
from .evaluation import evaluate
from .prm import PRM, audit, fit_prm
from .recipe import Recipe, parse_recipe
from .recorder import Recorder
from .report import write_report
from .rollout import Rollout, read_rollouts, write_rollouts
from .run_directory import Progress, RunDirectory
from .sampler import Sampler, open_sampler
from .setup_run import Problems, derived_seed, device_of, load_problems, make_initial_policy, resume_point
from .update import update


def train(recipe: Recipe) -> dict:
    """Runs the recipe and returns what summary.json holds. RunError for everything the user can mend."""
    device, problems = device_of(recipe), load_problems(recipe)
    run = RunDirectory(recipe)
    resumed = resume_point(run, recipe)
    progress = resumed or Progress()
    recorder = Recorder(recipe, run, progress)
    if resumed is None:
        policy, tokenizer = make_initial_policy(recipe, problems, recorder)
        run.save_policy(policy, tokenizer, progress)
    initial, tokenizer = run.load_model(0, device)
    policy, _ = run.load_model(progress.iteration, device)
    test, skipped_test = ask(problems.test, tokenizer, policy, recipe)
    with recorder.phase("engine", "starting the sampler"):
        sampler = open_sampler(recipe, policy, tokenizer, str(run.policy_of(0)))
    _announce(recipe, problems, skipped_test, policy, sampler, progress, recorder)

    prm = None
    while True:
        t = progress.iteration
        if progress.step == 0:
            sampler.sync(policy)
            prm = _fit(prm, policy, initial, sampler, problems, tokenizer, recipe, run, progress, recorder)
            with recorder.phase("evaluation", f"evaluating M_{t} on {len(test)} held-out problems"):
                record, tokens = evaluate(
                    sampler, policy, initial, prm, test, tokenizer, recipe, iteration=t,
                    seed=derived_seed(recipe, "evaluation", t), solutions=run.evaluations / f"iteration_{t}.parquet",
                )  # fmt: skip
            progress.records.append(record)
            _count_tokens(progress, "evaluation", tokens)
            recorder.scalars({k: v for k, v in record.items() if k not in ("prm", "iteration")}, prefix="eval")
            recorder.results()
            if t == recipe.iterations:
                break
        path = run.rollouts / f"iteration_{t}.parquet"
        if progress.step == 0 and not path.exists():
            asked, skipped = ask(problems.train[t], tokenizer, policy, recipe)
            rollouts = _collect(sampler, policy, initial, prm, asked, tokenizer, recipe, progress, recorder)
            progress.counts["skipped_train_prompts"] = progress.counts.get("skipped_train_prompts", 0) + skipped
            write_rollouts(rollouts, path)
        rollouts = read_rollouts(path)
        reference, state = _reference(recipe, initial, policy), None
        if progress.step:
            state = run.load_step(run.newest_checkpoint(), policy)
        update(policy, reference, rollouts, recipe, run, progress, recorder, state)
        progress.iteration, progress.step = t + 1, 0
        progress.lagged = type(progress.lagged)()
        run.save_policy(policy, tokenizer, progress)

    run.save_model(policy, tokenizer, prm)
    summary = _summary(recipe, sampler, policy, len(test), progress)
    run.write_summary(summary)
    recorder.close()
    report = write_report(run.path)
    recorder.say(f"model: {run.path / 'model'}   summary: {run.path / 'summary.json'}   report: {report}")
    return summary


def _fit(prm, policy, initial, sampler, problems: Problems, tokenizer, recipe, run, progress, recorder) -> PRM:
    """The PRM head for the current policy; its seed set is sampled from M_0 once and labelled by the exact checker."""
    if prm is not None and recipe.prm_trunk == "initial":
        return prm
    path = run.rollouts / "seed.parquet"
    if not path.exists():
        if progress.iteration:
            raise RunError(f"{path} is gone: it holds the PRM head's seed set, sampled from M_0; start the run anew")
        asked, _ = ask(problems.seed, tokenizer, policy, recipe)
        with recorder.phase("rollout", f"sampling the PRM head's seed set ({len(asked)} problems)"):
            write_rollouts(
                usable(
                    sample_rollouts(
                        sampler, asked, tokenizer, recipe, n=recipe.prm_seed_generations,
                        temperature=recipe.temperature, seed=derived_seed(recipe, "seed set"),
                    )
                ),
                path,
            )  # fmt: skip
    seed_set = read_rollouts(path)
    if not seed_set:
        raise RunError("M_0 wrote no text for any seed problem: raise warm_start_steps or give another model")
    trunk = initial if recipe.prm_trunk == "initial" else policy
    with recorder.bar("prm", f"fitting the PRM head on M_{progress.iteration}", 1) as advance:
        return fit_prm(
            trunk, seed_set, recipe, derived_seed(recipe, "prm", 0 if trunk is initial else progress.iteration),
            on_step=lambda step, total: advance(step / total),
        )  # fmt: skip


def _collect(
    sampler: Sampler, policy, initial, prm: PRM, asked: list[Asked], tokenizer, recipe: Recipe, progress, recorder
) -> list[Rollout]:
    """One iteration's rollouts, complete: sampled, judged, labelled, with reference log-probs."""
    t = progress.iteration
    with recorder.phase("rollout", f"sampling {recipe.num_generations} completions of {len(asked)} prompts from M_{t}"):
        everything = sample_rollouts(
            sampler, asked, tokenizer, recipe, n=recipe.num_generations, temperature=recipe.temperature,
            seed=derived_seed(recipe, "rollout", t),
        )  # fmt: skip
    rollouts = usable(everything)
    if not rollouts:
        raise RunError(f"M_{t} wrote no text for any of {len(asked)} prompts: the policy has collapsed")
    _count_tokens(progress, "rollout", sum(len(r.completion_ids) for r in everything))
    dropped = len(everything) - len(rollouts)
    progress.counts["rollouts_without_steps"] = progress.counts.get("rollouts_without_steps", 0) + dropped
    with recorder.phase("prm", f"labelling the steps of {len(rollouts)} completions"):
        label_steps(rollouts, prm, recipe)
    with recorder.phase("reference", "reference log-probs"):
        own, difference = check_sync(policy, rollouts, recipe)
        reference = own if recipe.reference == "previous" else _log_probs_of(initial, rollouts, recipe)
        for r, logp in zip(rollouts, reference, strict=True):
            r.ref_logps = logp.tolist()
    view = audit(
        [p for r in rollouts for p in r.step_probs], [x for r in rollouts for x in r.checker_labels],
        float(prm.head.threshold),
    )  # fmt: skip
    recorder.scalars(
        {
            "accuracy": sum(r.label for r in rollouts) / len(rollouts),
            "truncated": sum(not r.finished for r in rollouts) / len(rollouts),
            "steps": sum(len(r.step_ends) for r in rollouts) / len(rollouts),
            "step_labels/right": sum(x == 1 for r in rollouts for x in r.step_labels) / len(
                [x for r in rollouts for x in r.step_labels]
            ),
            "without_steps": dropped,
            "weight_sync_max_abs_logp_diff": difference,
            **{f"prm/{k}": view[k] for k in ("f1", "precision", "recall", "auroc", "ece")},
        },
        prefix="rollout",
    )  # fmt: skip
    return rollouts


def _log_probs_of(model, rollouts, recipe):
    from .objective import log_probs

    return log_probs(model, rollouts, recipe)


def _reference(recipe: Recipe, initial: PreTrainedModel, policy: PreTrainedModel) -> PreTrainedModel | None:
    """The reference as a model, where an estimator needs more of it than its log-probs."""
    if recipe.reference_points not in ("exact", "mismatched"):
        return None
    return initial if recipe.reference == "initial" else copy.deepcopy(policy).requires_grad_(False)


def _count_tokens(progress: Progress, name: str, tokens: int) -> None:
    progress.tokens[name] = progress.tokens.get(name, 0) + tokens


def _announce(recipe, problems: Problems, skipped_test: int, policy, sampler, progress, recorder) -> None:
    for complaint in problems.complaints:
        recorder.say(f"skipped {complaint}")
    progress.counts["skipped_rows"] = len(problems.complaints)
    progress.counts["skipped_test_prompts"] = skipped_test
    size = sum(p.numel() for p in policy.parameters()) / 1e6
    recorder.say(
        f"{recipe.name}: {size:.2f} M parameters on {policy.device}, sampled by {sampler.name}, "
        f"from M_{progress.iteration}{f' step {progress.step}' if progress.step else ''} to M_{recipe.iterations}"
    )


def _summary(recipe: Recipe, sampler: Sampler, policy: PreTrainedModel, test_problems: int, progress: Progress) -> dict:
    seconds, tokens = progress.seconds, progress.tokens
    sampled = tokens.get("rollout", 0)
    return {
        "recipe": recipe.name,
        "engine": sampler.name,
        "seconds": sum(seconds.values()),
        "tokens_per_second": {
            "rollout": sampled / seconds["rollout"] if sampled else None,
            "train": tokens["train"] / seconds["update"] if tokens.get("train") else None,
        },
        "iterations": progress.records,
        "seed": recipe.seed,
        "phase_seconds": seconds,
        "model_parameters": sum(p.numel() for p in policy.parameters()),
        "held_out_problems": test_problems,
        "counts": progress.counts,
    }


def main(argv: list[str]) -> int:
    """The command line. 0 when the run ended well, 1 with one message where the user can mend something."""
    start = time.monotonic()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.captureWarnings(True)
    try:
        train(parse_recipe(argv))
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"done in {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")
    sys.exit(main(sys.argv[1:]))
