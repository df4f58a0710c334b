"""The sections of the study's page that tell how it was found; `sections.py` has their order."""

from collections.abc import Iterable, Sequence
from typing import Any

from ..recipe import Recipe
from .findings import ARMS, COMMAND, Arm, Page, operations, setting
from .plan import FAMILIES, TUNED_AS
from .results import sampled
from .searched import Tried, found_by_search, pair_text, searched
from .statistics import METRICS, Run, evaluation
from .variants import cost
from .words import (
    bullets,
    capital,
    code,
    counted,
    fixed,
    fold,
    listed,
    paragraph,
    settings_text,
    table,
)  # fmt: skip

SAME_START = 0.99  # of M_0's answers in its own evaluation and in a run: batches may differ in a rounding


def method(page: Page) -> list[str]:
    lines = ["## Method", ""]
    lines += paragraph(
        "**Task.** A problem is a chain of operations on digits, each taken modulo 10, computed from left to right "
        "(`arithmetic`, docs/tasks.md). A solution has one line an operation and an answer; a checker judges answers "
        "and single steps exactly. Some operations absorb errors, so a wrong step can still reach the right answer."
    )
    rows = []
    for difficulty in page.difficulties():
        runs = [r for r in page.study.records if (r["stage"], r["difficulty"]) == ("main", difficulty)]
        few, most = operations(page, difficulty)
        planned = page.family.difficulties.get(difficulty)
        counts = [
            next((len(e["right"]) for r in runs if (e := evaluation(r, where, METRICS["pass@1"]))), "")
            for where in (0, "shifted")
        ]
        wrong, longer = setting(runs[0], "misconceptions"), planned.shifted if planned else ("", "")
        rows.append((difficulty, f"{few} to {most}", "{} to {}".format(*longer), *counts, f"{100 * wrong:g}"))
    titles = ("difficulty", "operations", "of longer chains", "test problems", "longer chains", "facts taught wrong, %")
    lines += table(titles, rows)
    lines += paragraph(
        "**M_0.** A small transformer, made from scratch for each seed by imitating demonstrations of a teacher who "
        "believes some facts wrongly. It has seen demonstrations of all lengths; feedback comes for the shorter ones "
        "only. All arms of a seed start from the same M_0, and all seeds are tested on the same problems. "
        + same_start(page)
    )
    iterations = max((page.last(d) for d in page.difficulties()), default=Recipe.iterations)
    lines += paragraph(
        f"**Arms.** Each trains M_0 to M_{iterations} in iterations of sampling, judging and updating, and differs "
        f"from the others in what it learns from and which labels it sees. {engine_text(page)}"
    )
    if labels := labels_table(page):
        lines += labels + paragraph(
            "Labels of all iterations together, as means over seeds. A seed set is matched with more prompts by "
            "checked solutions, not by labels: a solution of the seed set has a label a step, one of more prompts one "
            "label. CPU seconds are of training and its evaluations, of the seed that took the fewest."
        )
    lines += paragraph(
        "**Measures**, of held-out problems, steps judged by the exact checker. Pass@1: share of problems whose greedy "
        "solution is right. Maj@8: share whose most frequent answer of 8 samples is right. Pass@8: share with a right "
        "answer among 8 samples; both of M_0 and the last model alone. Flawed right answers: share of right greedy "
        "solutions with a wrong step. First error: number of the first wrong step, from 1, of greedy solutions that "
        "have one, and the share of the solution before it; an arm that repairs easy errors is left with others, so "
        "read it beside the step accuracy, the share of right steps. KL is a completion's."
    )
    lines += paragraph(
        "**Intervals** hold 95 % and cover two kinds of chance, other seeds and other problems: the hull of a "
        f"percentile bootstrap of {page.study.resamples:,} resamples of seeds and of problems (the pigeonhole "
        "bootstrap, Owen 2007) and of Student's t interval over the seeds' own values, since a bootstrap of few seeds "
        "is too narrow. Differences are paired: the same seeds, problems and draws. What is known of a seed alone "
        "(step accuracy, tokens, KL, seconds, AUROC) has the t interval."
    )
    if common := shared_settings(page):
        text = "**Settings** that all runs share, where they differ from the package's defaults: "
        lines += paragraph(f"{text}{settings_text(common)}.")
    if page.family.name == "cpu":
        lines += paragraph(
            "**Cut**, so that the whole fits into about ten hours of two cores: more than one seed in the search; "
            "searches of their own for `kto_more`, `step_kto_prm` and the step beta; ablations on easy chains; Maj@8 "
            "and Pass@8 of the models between. All arms have reference points of zero; those of KTO's paper are an "
            "ablation. `rft` keeps solutions that were sampled twice."
        )
    return lines


def engine_text(page: Page) -> str:
    engines = sorted({str(setting(r, "engine")) for r in page.study.records if r["stage"] != "initial"})
    if not engines:
        return ""
    text = f"Rollouts are sampled with {code(f'engine: {name}' for name in engines)}"
    if engines != ["transformers"] or page.family.name != "cpu":
        return f"{text}."
    return f"{text}: for a model this small on one core faster than vLLM (docs/journal.md)."


def same_start(page: Page) -> str:
    """Whether the runs of a seed start from its M_0, by weights and by what that answered."""
    initial = {(r["difficulty"], r["seed"]): r for r in page.study.records if r["stage"] == "initial"}
    groups: dict[tuple[str, int], list[dict]] = {}
    for r in page.study.records:
        if r["stage"] in ("main", "ablations") and r["greedy"]:
            groups.setdefault((r["difficulty"], r["seed"]), []).append(r)
    apart, several = [], False
    for place, runs in sorted(groups.items()):
        several |= len(runs) > 1
        starts = [r["greedy"][0] for r in runs]
        if place in initial:
            starts.append(sampled(initial[place])["test"]["greedy"])
        weights = {r["initial_weights"] for r in runs}
        if len(weights) > 1 or any(_alike(starts[0]["right"], x["right"]) < SAME_START for x in starts[1:]):
            apart.append("{}, seed {}".format(*place))
    if apart:
        return f"**The files contradict this: runs start from different models in {'; '.join(apart)}.**"
    return "The result files confirm the common start." if several else ""


def _alike(a: str, b: str) -> float:
    return sum(x == y for x, y in zip(a, b, strict=True)) / len(a)


def labels_table(page: Page) -> list[str]:
    """A row an arm; what differs between difficulties is in their order."""
    rows: list[tuple[str, ...]] = []
    difficulties = page.difficulties()
    for name in dict.fromkeys(n for d in difficulties for n in page.arms(d)):
        cells = [labels_cells(page, ("main", d, name)) for d in difficulties if name in page.arms(d)]
        joined = (" / ".join(dict.fromkeys(of)) for of in zip(*cells, strict=True))
        rows.append((f"`{name}`", *joined))
    where = f" ({' / '.join(difficulties)})" if len(difficulties) > 1 else ""
    titles = (
        "arm", "what it does", "prompts x completions an iteration", "outcome labels", f"exact step labels{where}",
        f"seed set of the PRM{where}", f"CPU seconds{where}",
    )  # fmt: skip
    return table(titles, rows)


def labels_cells(page: Page, run: Run) -> tuple[str, ...]:
    record = next(iter(page.study.runs(*run).values()))
    arm = ARMS.get(run[2], Arm(settings_text(record["overrides"]), "", ""))
    prompts, completions, iterations = (
        setting(record, key) for key in ("num_prompts", "num_generations", "iterations")
    )
    rollouts = prompts * completions * iterations
    mean_steps, first = page.study.over(run, mean_step_labels), page.study.over(run, first_steps)
    steps = f"{rollouts * mean_steps.value:,.0f}" if mean_steps else "yes"
    seconds = cost(page.study.runs(*run).values())
    seed_set = setting(record, "prm_seed_problems") * setting(record, "prm_seed_generations")
    seed_text = f"{seed_set:,} solutions" + (f", about {seed_set * first.value:,.0f} step labels" if first else "")
    return (
        arm.text, f"{prompts:,} x {completions}", f"{rollouts:,}" if arm.outcomes == "yes" else arm.outcomes,
        steps if arm.steps == "yes" else arm.steps, seed_text if arm.seed_set else "no",
        "" if seconds is None else f"{seconds:.0f}",
    )  # fmt: skip


def mean_step_labels(record: dict) -> float | None:
    """Labelled steps of a rollout, over the iterations."""
    of = [r["completions/mean_steps"] * r.get("step_labels/labelled", 1.0)
          for r in record["rollouts"] if r.get("completions/mean_steps") is not None]  # fmt: skip
    return sum(of) / len(of) if of else None


def first_steps(record: dict) -> float | None:
    """Steps of a rollout of M_0, as the seed set's solutions are."""
    return record["rollouts"][0].get("completions/mean_steps") if record["rollouts"] else None


def shared_settings(page: Page) -> dict[str, Any]:
    """The settings that all main runs have, where these are not the package's defaults."""
    recipes = [r["recipe"] for r in page.study.records if r["stage"] == "main"]
    if not recipes:
        return {}
    kept = set.intersection(*map(set, recipes)) - {"name", "seed"}
    same = {k: recipes[0][k] for k in kept if all(r[k] == recipes[0][k] for r in recipes)}
    return {k: v for k, v in same.items() if v != getattr(Recipe, k, None)}


def search(page: Page) -> list[str]:
    found = searched(page)
    if not found:
        return []
    family, counts = page.family, {len(r["greedy"][-1]["right"]) for r in _of_search(page) if r["greedy"]}
    lines = ["## Search", ""]
    as_other = [f"`{name}` takes what was chosen for `{of}`" for name, of in TUNED_AS.items() if name in family.arms]
    start = "from a learning rate of {:g} and a beta of {:g}".format(*family.start)
    if "rft" in family.arms:
        start += f" (`rft`, which has no beta: from {pair_text(family.rft_start)})"
    lines += paragraph(
        f"Learning rate and beta, one beta for outcomes and steps, by the Pass@1 of the last model on "
        f"{listed(f'{n:,}' for n in sorted(counts))} validation problems, with other seeds than the results'. "
        f"A climb: {start}, the neighbours of a setting are tried, twice and half its learning rate, five times and a "
        "fifth of its beta, and the best of them is the next, until none is better"
        + ("; each further difficulty starts from what the one before chose" if len(family.difficulties) > 1 else "")
        + f". {capital(listed(as_other))}"
        + "." * bool(as_other)
    )
    groups, chosen_texts = grouped(found), []
    for difficulty in dict.fromkeys(t.difficulty for t in found):
        said = []
        for (d, arm), of in groups.items():
            if d == difficulty:
                chosen = next((t for t in of if t.chosen), None)
                word = pair_text(chosen.pair) if chosen else "not chosen yet"
                said.append(f"`{arm}` {word} ({len(of)} tried)")
        chosen_texts.append(f"Chosen, {difficulty}: {', '.join(said)}.")
    notes: dict[str, list[str]] = {}
    for of in groups.values():
        if note := search_note(page, of):
            notes.setdefault(note, []).append(f"`{of[0].arm}` ({of[0].difficulty})")
    lines += bullets([*chosen_texts, *(f"{note}: {listed(of)}." for note, of in notes.items()), *collapse(found)])
    return [*lines, *fold("All that was tried", search_table(found))]


def _of_search(page: Page) -> list[dict]:
    return [r for r in page.study.records if r["stage"] == "search"]


def search_note(page: Page, of: Sequence[Tried]) -> str | None:
    """What a reader of the choice of an arm should know."""
    chosen = next((t for t in of if t.chosen), None)
    if found_by_search(page, of[0].difficulty, of[0].arm) is None:
        return "The search is not over" if chosen is None else "The runs use what was best before the search was over"
    if chosen is None:
        return "The runs use a setting that was not tried"
    if chosen.rate < max(t.rate for t in of):
        return "The chosen setting is not the one with the highest Pass@1"
    family, (rate, beta) = page.family, chosen.pair
    limits = [(family.rft_rate_limits if beta is None else family.rate_limits, rate, 2), (family.beta_limits, beta, 5)]
    edge = any(x is not None and not low * f <= x <= high / f for (low, high), x, f in limits if low < high)
    return "The chosen setting lies at the edge of what could be tried" if edge else None


def collapse(found: Sequence[Tried]) -> list[str]:
    """How far models have moved that end below M_0, and how far the others."""
    known = [(t, t.kl, t.initial) for t in found if t.kl is not None and t.initial is not None]
    below = [(t, kl) for t, kl, initial in known if t.rate < initial]
    others = [kl for t, kl, initial in known if t.rate >= initial]
    if not below or not others:
        return []
    betas = [t.pair[1] for t, _ in below if t.pair[1] is not None]
    text = (
        f"{len(below)} of {counted(len(known), 'setting')} end below M_0, far from it: KL "
        f"{_span([kl for _, kl in below])} nats a completion, against {_span(others)} of the others."
    )
    if betas and len(betas) == len(below):
        text += f" Their beta is {max(betas):g} at most: a small beta hardly holds the model to its reference."
    text += " docs/training.md says when feedback does harm."
    return [text]


def _span(values: Sequence[float]) -> str:
    return f"{fixed(min(values), 1)} to {fixed(max(values), 1)}"


def search_table(found: Sequence[Tried]) -> list[str]:
    """A row for each beta of an arm, a column for each learning rate."""
    rates = sorted({t.pair[0] for t in found})
    rows: dict[tuple[str, str, float | None], dict[float, str]] = {}
    for t in found:
        cell = fixed(100 * t.rate, 1) + ("" if t.kl is None else f" ({fixed(t.kl, 1)})")
        cell += f", {t.failed} of {t.seeds} failed" if t.failed else ""
        of = rows.setdefault((t.difficulty, t.arm, t.pair[1]), {})
        of[t.pair[0]] = f"**{cell}**" if t.chosen else cell
    starts = {t.difficulty: t.initial for t in found if t.initial is not None}
    m_0 = ", ".join(f"{d} {fixed(100 * x, 1)}" for d, x in starts.items())
    lines = paragraph(
        "Pass@1 of the last model in per cent, a failed run's 0; in brackets its KL from M_0 in nats a completion. The "
        f"chosen setting is in bold. M_0: {m_0}."
    )
    cells = (
        (d, f"`{arm}`", "" if beta is None else f"{beta:g}", *(of.get(rate, "") for rate in rates))
        for (d, arm, beta), of in rows.items()
    )
    return lines + table(("difficulty", "arm", "beta", *(f"rate {rate:g}" for rate in rates)), cells)


def grouped(found: Iterable[Tried]) -> dict[tuple[str, str], list[Tried]]:
    groups: dict[tuple[str, str], list[Tried]] = {}
    for t in found:
        groups.setdefault((t.difficulty, t.arm), []).append(t)
    return groups


def failed_runs(page: Page, stage: str) -> list[dict]:
    return [r for r in page.study.records if r["stage"] == stage and "failed" in r]


# ---- results ----


def what_ran(page: Page) -> list[str]:
    study = page.study
    runs = {stage: [r for r in study.records if r["stage"] == stage] for stage in ("main", "ablations", "search")}
    trained = [r for of in runs.values() for r in of]
    machines = sorted({r["machine"] for r in study.records if r.get("machine")})
    versions = sorted({f"{k} {v}" for r in study.records for k, v in (r.get("versions") or {}).items()})
    hours = sum(r["cpu_seconds"] for r in study.records if isinstance(r.get("cpu_seconds"), int | float)) / 3600
    initial = len(study.records) - len(trained)
    words = {"main": "of arms", "ablations": "of ablations", "search": "of the search"}
    counts = [f"{counted(len(of), 'run')} {words[stage]}" for stage, of in runs.items() if of]
    counts += [counted(initial, "initial model")] if initial else []
    least = "at least " * any(r.get("resumed") for r in trained)
    lines = [
        f"{listed(counts)}, in {least}{hours:,.1f} CPU hours"
        + (f", on {listed(machines)}" if machines else "")
        + (f", with {', '.join(versions)}" if versions else "")
        + "."
    ]
    failed = {stage: len(failed_runs(page, stage)) for stage in runs}
    if any(failed.values()):
        lines.append(f"Failed: {listed(f'{n} {words[stage]}' for stage, n in failed.items() if n)}.")
    return ["## What has been run", "", *paragraph(" ".join(lines)), *missing(page)]


def missing(page: Page) -> list[str]:
    """Plainly, what is not there, and what is there in part."""
    family, study, lines = page.family, page.study, []
    for difficulty in family.difficulties:
        arms = [arm for arm in family.arms if arm not in TUNED_AS]
        over = [arm for arm in arms if found_by_search(page, difficulty, arm) is not None]
        if not over:
            lines.append(f"Search, {difficulty}: {'under way' if _search_of(page, difficulty) else 'not begun'}.")
        elif len(over) < len(arms):
            lines.append(f"Search, {difficulty}: over for {code(over)} alone.")
    for stage, wanted, seeds, what in (
        ("main", family.arms, family.seeds, "arm"),
        ("ablations", family.ablations, family.ablation_seeds, "variant"),
    ):
        for difficulty in family.difficulties if stage == "main" else [family.ablation_difficulty] * bool(wanted):
            have = {name: len(study.runs(stage, difficulty, name)) for name in wanted}
            if absent := [name for name, many in have.items() if not many]:
                named = f"all {counted(len(absent), what)}" if len(absent) == len(wanted) else code(absent)
                lines.append(f"Not run yet, {stage}, {difficulty}: {named}.")
            partly = [
                f"{code(of) if len(of) < len(wanted) else f'all {what}s'} ({many} of {len(seeds)} seeds)"
                for many in range(len(seeds) - 1, 0, -1)
                if (of := [name for name, runs in have.items() if runs == many])
            ]
            if partly:
                lines.append(f"Run in part, {stage}, {difficulty}: {'; '.join(partly)}.")
    return bullets(lines) if lines else paragraph("Nothing of the plan is missing.")


def _search_of(page: Page, difficulty: str) -> bool:
    return any(r["difficulty"] == difficulty for r in _of_search(page))


def rerun(page: Page) -> list[str]:
    large = FAMILIES["large"]
    few, most = next(iter(large.difficulties.values())).trained
    lines = [
        ("make study", "all that has no result yet, then this page"),
        ('make study STUDY="--minutes 60"', "no new run after an hour; goes on next time"),
        (f"{COMMAND} --list true", "what can start now, and how much is left"),
        (f"{COMMAND} --only main/easy/kto", "places (stage/difficulty/name/seed_n) that begin so"),
        (f"{COMMAND} --keep_runs true", "with the run directories"),
        (f"{COMMAND}.page", "this page and its figures, from the result files"),
        (f"{COMMAND} --family large --workers 1", "one GPU"),
    ]
    width = max(len(command) for command, _ in lines)
    return [
        "## How to rerun",
        "",
        *(f"    {command:{width}}  # {text}" for command, text in lines),
        "",
        *paragraph(
            "A study that was stopped goes on where it was. A run's settings are in its result file, "
            "docs/study/results/{stage}/{difficulty}/{name}/seed_{n}.json, under `recipe`. The family `large` has a "
            f"model of 71 million parameters, chains of {few} to {most} operations and {len(large.arms)} arms of "
            f"{len(large.seeds)} seeds. It has never been run: the times of its runs, up to nine minutes on one GPU, "
            f"are estimates. `{COMMAND}.page RESULTS DOCS` draws the page of other results. All keys: docs/settings.md."
        ),
    ]
