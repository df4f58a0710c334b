"""Step labels: the PRM head for M_t, and who says which steps of its rollouts are right (`label_source`)."""

import random
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from . import ranks
from .answers import Verdict
from .collect import Asked, sample_rollouts, usable
from .command import say_complaints
from .errors import RunError
from .labelled import labelled_rollouts
from .monte_carlo import agreement, consensus, estimate_cost, labels_of, monte_carlo_values
from .prm import PRM, calibrates, fit_prm, fits, seed_generations
from .prm_files import load_prm
from .recipe import Recipe
from .rollout import UNLABELLED, Rollout, read_rollouts, write_rollouts
from .run_directory import on_main
from .sampler import context_length
from .sampling_shards import SHARDS, weights_digest
from .segmentation import step_style
from .setup_run import Session, derived_seed
from .task import asked_rows


def fit_head(s: Session, policy: PreTrainedModel, fitted: PRM | None) -> PRM | None:
    """The PRM head for `policy` = M_t; None where the recipe has no use for one (or no audit: `prm_audit`).

    It is read from `prm`, or fitted on `prm_dataset`, or on a seed set: M_0's completions of the seed problems, half of
    them at a higher temperature, labelled by `prm_labels` and kept in rollouts/seed.parquet. With `prm_trunk: initial`
    it is fitted once, on M_0.
    """
    recipe = s.recipe
    if recipe.prm is not None:
        return fitted or load_prm(recipe.prm, s.initial.device, s.tokenizer)
    if not recipe.prm_audit and recipe.label_source not in ("head", "consensus"):
        return None
    frozen = recipe.prm_trunk == "initial"
    if frozen and fitted is not None:
        return fitted
    if not (recipe.prm_dataset or s.seed):
        return None
    fitting, calibrating = _labelled_data(s) if recipe.prm_dataset else _seed_set(s)
    classes = {x for r in fitting for x in r.step_labels} - {UNLABELLED}
    if len(classes) < 2 and recipe.label_source not in ("head", "consensus"):
        s.recorder.say(f"no PRM head to be audited: the steps it would be fitted on have the labels {sorted(classes)}")
        return None
    with s.recorder.bar("prm", f"fitting the PRM head on M_{s.progress.iteration}") as advance:
        seed = derived_seed(recipe, "prm", 0 if frozen else s.progress.iteration)
        prm = fit_prm(
            s.initial if frozen else policy, fitting, calibrating, recipe, seed,
            on_step=lambda step, total, loss: advance(step, total, f"loss {loss:.3f}"),
        )  # fmt: skip
    if ranks.size() > 1:  # the same labels everywhere, whatever the last bits of each rank's fit
        prm.head.load_state_dict(ranks.from_main(prm.head.state_dict))
    if not prm.calibrated:
        s.recorder.say(
            "warning: the PRM head is not calibrated and its threshold is 0.5, since the steps to calibrate it on are "
            "all right or all wrong: raise prm_seed_problems"
        )
    return prm


def _labelled_data(s: Session) -> tuple[list[Rollout], list[Rollout]]:
    recipe = s.recipe
    found = s.prm_rows
    assert found is not None
    longest = context_length(recipe, s.initial)
    rollouts, complaints = labelled_rollouts(
        asked_rows(found.rows, recipe, s.tokenizer), s.tokenizer, max_length=longest,
        style=step_style(recipe.step_style, recipe.step_pattern), on_note=s.recorder.say,
    )  # fmt: skip
    if "skipped_prm_rows" not in s.progress.counts:
        say_complaints(s.recorder.console, found.complaints + complaints, "rows of prm_dataset")
    s.progress.counts["skipped_prm_rows"] = found.skipped + len(complaints)
    s.progress.counts["cut_prm_rows"] = sum(not r.finished for r in rollouts)
    return [r for r in rollouts if fits(r)], [r for r in rollouts if not fits(r)]


def _seed_set(s: Session) -> tuple[list[Rollout], list[Rollout]]:
    path = s.run.rollouts / "seed.parquet"
    # A run that was killed before M_1 counts anew what went into the seed set; from its shards that takes no time.
    if s.progress.iteration == 0 or not path.exists():
        _sample_seed_set(s, path)
    seed_set = read_rollouts(path)
    return [r for r in seed_set if fits(r)], [r for r in seed_set if calibrates(r, s.recipe)]


def _sample_seed_set(s: Session, path: Path) -> None:
    if s.progress.iteration:
        raise RunError(f"{path} is gone: it holds the PRM head's seed set, sampled from M_0; start the run anew")
    (natural, hot), weights = seed_generations(s.recipe), weights_digest(s.initial)
    text = f"sampling the PRM head's seed set from M_0 ({len(s.seed)} problems)"
    with s.recorder.bar("seed_set", text) as advance:
        drawn = [
            sample_rollouts(
                s.sampler, s.task, s.seed, s.tokenizer, s.recipe, n=n, temperature=temperature,
                seed=derived_seed(s.recipe, "seed set", kind), on_progress=advance,
                folder=s.run.rollouts / SHARDS / "seed" / kind, weights=weights, say=s.recorder.say,
            )
            for kind, n, temperature in (
                ("natural", natural, s.recipe.temperature), ("hot", hot, s.recipe.prm_seed_temperature),
            )
            if n
        ]  # fmt: skip
    for r in drawn[1] if hot else ():
        r.sample += natural
    seed_set = usable([r for rollouts in drawn for r in rollouts])
    if {fits(r) for r in seed_set if fits(r) or calibrates(r, s.recipe)} != {True, False}:
        raise RunError(
            f"M_0 wrote text for {len({r.problem_id for r in seed_set})} of {len(s.seed)} seed problems, too few to "
            "fit and calibrate the PRM head: raise warm_start_steps or prm_seed_problems, or give another model"
        )
    if s.recipe.prm_labels == "monte_carlo":
        _continue_steps(s, s.seed, seed_set, "seed", weights)
    for r in seed_set:
        r.step_labels = labels_of(r.step_values, s.recipe) if r.step_values else list(r.checker_labels)
    on_main(lambda: write_rollouts(seed_set, path))


def label_steps(s: Session, rollouts: Sequence[Rollout], prm: PRM | None, weights: str) -> dict[str, float]:
    """Fills step_probs, step_values and step_labels of M_t's rollouts by the recipe's label source.

    `weights` stands for M_t (`weights_digest`). Returns how far continuations and the head agree
    (`monte_carlo.agreement`), empty without both.
    """
    source = s.recipe.label_source
    if prm is not None:
        with s.recorder.phase("prm", f"judging the steps of {len(rollouts)} completions"):
            for r, probabilities in zip(rollouts, prm.score(rollouts, s.recipe), strict=True):
                r.step_probs = probabilities
    if source in ("monte_carlo", "consensus"):
        t = s.progress.iteration
        _continue_steps(s, s.train[t], rollouts, f"iteration_{t}", weights)
    for r in rollouts:
        continued = labels_of(r.step_values, s.recipe)
        if source == "monte_carlo":
            r.step_labels = continued
        elif source == "checker":
            r.step_labels = list(r.checker_labels)
        else:
            assert prm is not None
            r.step_labels = prm.label(r.step_probs)
            if source == "consensus":
                r.step_labels = consensus(continued, r.step_labels)
    both: dict[str, float] = {}
    if prm is not None and source in ("monte_carlo", "consensus"):
        both = agreement(
            [x for r in rollouts for x in labels_of(r.step_values, s.recipe)],
            [x for r in rollouts for x in prm.label(r.step_probs)],
        )
    flip_labels(rollouts, s.recipe, s.progress.iteration)
    if s.recipe.objective == "step_kto" and all(x == UNLABELLED for r in rollouts for x in r.step_labels):
        s.recorder.say(f"warning: no step of M_{s.progress.iteration}'s rollouts has a label; only outcomes are learnt")
    return both


def flip_labels(rollouts: Sequence[Rollout], recipe: Recipe, iteration: int) -> None:
    """Flips each step label of `rollouts` with probability `step_label_noise`; steps without one stay so.

    Which ones depends on seed, iteration, problem, sample and the step's place alone; a higher share flips those of a
    lower one and more.
    """
    for r in rollouts if recipe.step_label_noise else ():
        rng = random.Random(f"step_label_noise {recipe.seed} {iteration} {r.problem_id} {r.sample}")
        flipped = [rng.random() < recipe.step_label_noise for _ in r.step_labels]
        r.step_labels = [
            1 - x if flip and x != UNLABELLED else x for x, flip in zip(r.step_labels, flipped, strict=True)
        ]


def _continue_steps(s: Session, asked: Sequence[Asked], rollouts: Sequence[Rollout], name: str, weights: str) -> None:
    """Fills step_values by continuations, in resumable chunks under rollouts/monte_carlo_{name}."""
    problems = {a.problem_id: a.problem for a in asked}
    tokens, seconds = s.progress.tokens.get("rollout"), s.progress.seconds.get("rollout")
    cost = estimate_cost(rollouts, s.recipe, tokens_per_second=tokens / seconds if tokens and seconds else None)
    s.recorder.say(f"step labels of {len(rollouts)} completions: {cost.text()}")

    def judge(ids: Sequence[int], completions: Sequence[str], finished: Sequence[bool]) -> list[Verdict]:
        return s.task.judge([problems[n] for n in ids], completions, finished)

    with s.recorder.bar("monte_carlo", f"{cost.continuations:,} continuations for step labels") as advance:
        work = monte_carlo_values(
            rollouts, s.sampler, judge, s.tokenizer, s.recipe, seed=derived_seed(s.recipe, "monte carlo", name),
            folder=s.run.rollouts / f"monte_carlo_{name}", weights=weights, on_progress=advance,
        )  # fmt: skip
    s.progress.add("tokens", "monte_carlo", work.tokens)
    s.progress.add("counts", "unverified_continuations", work.unverified)
    if work.damaged:
        s.recorder.say(f"{work.damaged} chunks of continuations were damaged or of other rollouts, and sampled again")
