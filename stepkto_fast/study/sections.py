"""The sections of the study's page. Prose is fixed, numbers and words that judge follow from the results."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..recipe import Recipe
from .findings import (
    ARMS,
    ASKED,
    COMMAND,
    DIFFERENCES,
    NARROW,
    QUESTIONS,
    Arm,
    Page,
    Tried,
    all_differences,
    answer,
    compare,
    cost,
    drift_of,
    drift_sentences,
    failed_variants,
    found_by_search,
    growth,
    heads,
    narrow,
    noise_of,
    of_last,
    operations,
    pair_text,
    pairs,
    rows_of,
    searched,
    sentence,
    setting,
    variants,
)  # fmt: skip
from .plan import FAMILIES, TUNED_AS
from .results import sampled
from .statistics import METRICS, Estimate, Run, evaluation
from .words import (
    bullets,
    capital,
    code,
    counted,
    fixed,
    fold,
    gap,
    judged,
    level,
    listed,
    paragraph,
    plain,
    settings_text,
    shown,
    table,
)  # fmt: skip

# Right answers with at least one wrong step, in per cent, of M_0 to M_3: Step-KTO (arXiv 2501.10799), table 3.
PAPER = {"kto": (27.3, 24.6, 22.6, 21.1), "step_kto": (27.3, 22.9, 20.8, 19.9)}
SAME_START = 0.99  # of M_0's answers in its own evaluation and in a run: batches may differ in a rounding


def in_short(page: Page) -> list[str]:
    lines = paragraph(
        "Step-KTO (arXiv 2501.10799) tells a language model of each step of a solution whether it is right, beside "
        "whether the answer is. Does that win over feedback on answers alone, and does it still when a process reward "
        "model (PRM) takes the place of an exact checker? Tried on a synthetic arithmetic task with a small model."
    )
    lines += ["## In short", "", *paragraph(f"**{answer(page, 'step_kto', 'kto')}**")]
    lines += paragraph(f"With the step labels of a PRM head? {answer(page, 'step_kto_prm', 'kto')}")
    lines += page.picture("main")
    difficulties = page.difficulties()
    rows = [
        (f"{text}: `{a}` - `{b}`", *_cells(page, a, b, ASKED))
        for text, a, b in QUESTIONS
        if any(_cells(page, a, b, ASKED))
    ]
    if rows:
        lines += table(("last model, points", *_titles(page, ASKED)), rows)
        single = all(e.seeds < 2 for d in difficulties for a, b in pairs(page)
                     for e in [page.difference(d, a, b, "pass@1")] if e)  # fmt: skip
        intervals = "one seed has no interval" if single else "in brackets what holds 95 %, over seeds and problems"
        lines += paragraph(
            f"The first arm minus the second, in percentage points; {intervals}. Bold, and words such as *higher* in "
            "this page, stand only where the interval excludes 0. *Flawed* is a right answer with a wrong step; fewer "
            f"are better. Finished seeds, of {len(page.family.seeds)} planned: "
            f"{', '.join(f'{d} {page.seeds(d)}' for d in difficulties)}; where fewer enter, their number stands. The "
            "arms are described under [Method](#method)."
        )
    return lines


def _cells(page: Page, a: str, b: str, metrics: Sequence[str]) -> list[str]:
    """The differences of two arms, each difficulty's in turn."""
    return [shown(page.difference(d, a, b, m), METRICS[m], page.seeds(d)) for d in page.difficulties() for m in metrics]


def _titles(page: Page, metrics: Sequence[str]) -> list[str]:
    return [f"{d}: {METRICS[m].title}" for d in page.difficulties() for m in metrics]


# What is to be decided, between which arms, and for each metric what follows where the first is better, where it is
# worse, and where no difference is shown and a large one excluded.
ADVICE: tuple[tuple[str, str, str, dict[str, tuple[str, str, str]]], ...] = (
    ("Step labels beside outcomes", "step_kto", "kto", {
        "pass@1": ("label steps where they can be checked", "watch Pass@1 when you label steps", "they hardly matter"),
        "flawed_correct": ("label steps: fewer right answers have a wrong step",
                           "do not count on step labels: more right answers have a wrong step", "they hardly matter"),
    }),
    ("A PRM head's labels instead of exact ones", "step_kto_prm", "step_kto", {
        "pass@1": ("they reach more", "they cost Pass@1", "they cost little"),
        "flawed_correct": ("they leave fewer flawed answers", "prefer exact labels", "they cost little"),
    }),
    ("A seed set for a PRM head, or as many checked solutions of more prompts", "step_kto_prm", "kto_more", {
        "pass@1": ("take the seed set", "take more prompts", "both do"),
        "flawed_correct": ("take the seed set", "take more prompts", "both do"),
    }),
    ("The outcome loss beside the step loss", "step_kto", "step_only",
     {"pass@1": ("keep it", "try the step loss alone", "it hardly matters")}),
    ("KTO or fine-tuning on right answers", "kto", "rft",
     {"pass@1": ("learn from wrong answers too", "start with fine-tuning on right answers", "both do")}),
    ("Step-KTO or DPO", "step_kto", "dpo", {"pass@1": ("prefer Step-KTO", "prefer DPO", "both do")}),
)  # fmt: skip
WIDE = "too wide, or of too few seeds, to say"


def advice(page: Page) -> list[str]:
    if not page.difficulties():
        return []
    lines, unsaid = [], []
    for lead, a, b, metrics in ADVICE:
        said = [text for m, words in metrics.items() if (text := advised(page, a, b, m, words))]
        if said:
            lines.append(f"**{lead}.** {'. '.join(said)}.")
        elif any(page.difference(d, a, b, m) for d in page.difficulties() for m in metrics):
            unsaid.append(f"`{a}` - `{b}`")
    lines += ablation_advice(page)
    if any(run[0] == "main" and (x := drift_of(page, run)) and x[0].sign < 0 for run in heads(page)):
        lines.append("Refit or check the PRM head as the policy moves: its AUROC falls over the iterations.")
    text = "In points; each holds for this task and this scale." if lines else "Nothing yet: too little has been shown."
    if unsaid:
        text += f" {capital(WIDE)}: {listed(unsaid)}."
    return ["## Advice", "", *bullets(lines), *paragraph(text)]


def advised(page: Page, a: str, b: str, metric: str, words: tuple[str, str, str]) -> str | None:
    """What follows of a - b at each difficulty; None where nothing does."""
    groups: dict[str, list[tuple[str, Estimate]]] = {}
    for d in page.difficulties():
        if (e := page.difference(d, a, b, metric)) is not None:
            kind = judged(e, METRICS[metric].good)
            if kind in ("no difference", "too few seeds"):
                kind = "narrow" if narrow(e, len(page.family.seeds)) else "unsaid"
            groups.setdefault(kind, []).append((d, e))
    if not set(groups) - {"unsaid"}:
        return None
    better, worse, same = words
    texts = {"better": better, "worse": worse, "narrow": f"{same}, within {100 * NARROW:g} points", "unsaid": WIDE}
    parts = []
    for kind, text in texts.items():
        if of := groups.get(kind):
            values = ", ".join(fixed(100 * e.value, 1, True) for _, e in of)
            parts.append(f"{listed(d for d, _ in of)}: {text} ({values})")
    return f"{capital(METRICS[metric].title)}, {'; '.join(parts)}"


def ablation_advice(page: Page) -> list[str]:
    every, planned = variants(page), len(page.family.ablation_seeds)
    found: dict[str, list[str]] = {}
    noise = []
    for v in every:
        verdicts = {m: judged(e, METRICS[m].good) for m, e in v.differences.items()}
        moved = [m for m, x in verdicts.items() if x in ("better", "worse")]
        text = ", ".join(f"{METRICS[m].title} {gap(v.differences[m], METRICS[m])}" for m in moved)
        if share := noise_of(v.name):
            if v.seeds > 1:
                noise.append(f"{100 * share:g} %: {text or 'no cost could be shown'}")
            continue
        kinds = {verdicts[m] for m in moved}
        kind = "both" if len(kinds) == 2 else next(iter(kinds), "wide")
        if kind == "wide" and verdicts and all(narrow(e, planned) for e in v.differences.values()):
            kind = "same"
        found.setdefault(kind if verdicts else "", []).append(f"`{v.name}`" + (f" ({text})" if text else ""))
    words = {
        "better": "Ablations worth trying, better than the base",
        "worse": "To be left alone, worse than the base",
        "both": "A trade, better in one measure and worse in the other",
        "same": f"Hardly matter, within {100 * NARROW:g} points",
        "wide": capital(WIDE),
    }
    lines = [f"{word}: {listed(found[kind])}." for kind, word in words.items() if kind in found]
    return lines + ([f"Step labels turned over, {'; '.join(noise)}."] if noise else []) + failed_variants(every)


def limits(page: Page) -> list[str]:
    every = [e for e in all_differences(page) if e.seeds > 1]
    found = sum(e.sign != 0 for e in every)
    lines = [
        "One synthetic task with an exact checker of steps, and a small model made here from scratch. Nothing here "
        "says how large an effect is with a large model on mathematics, nor with labels that have other errors.",
    ]
    if every:
        verb, chance = "is" if found == 1 else "are", math.ceil(0.05 * len(every))
        lines.append(
            f"The tables judge {counted(len(every), 'difference')} of last models; {found} of them {verb} shown. "
            f"Nothing is corrected for their number: if none were real, about {chance} at most would be expected."
        )
    levels = [page.study.level(("main", d, n), "test", "pass@1") for d in page.difficulties() for n in page.arms(d)]
    if seeds := sorted({e.seeds for e in levels if e}):
        many = counted(seeds[0], "seed") if len(seeds) == 1 else f"{seeds[0]} to {counted(seeds[-1], 'seed')}"
        lines.append(f"{many} an arm. What is not shown may still be there: read the interval, not the word.")
    if failed := [f"`{r['name']}` ({r['difficulty']}, seed {r['seed']})" for r in _failed(page, "main")]:
        lines.append(
            f"Failed, and in no comparison: {listed(failed)}. What is left out for failing favours the arm that failed."
        )
    if tried := searched(page):
        most = max(t.seeds for t in tried)
        lines.append(
            f"The search has {counted(most, 'seed')} a setting and covers learning rate and beta alone: an arm may be "
            "better with settings that were not tried."
        )
    return ["## Limits", "", *bullets(lines)]


def _failed(page: Page, stage: str) -> list[dict]:
    return [r for r in page.study.records if r["stage"] == stage and "failed" in r]


# ---- results ----

LEVELS = ("pass@1", "maj@8", "pass@8", "flawed_correct")


def results(page: Page) -> list[str]:
    if not page.difficulties():
        return []
    lines = ["## Results", "", *page.picture("differences")]
    for difficulty in page.difficulties():
        last = page.last(difficulty)
        lines += [f"{capital(page.title(difficulty))}, M_{last}, in per cent:", "", *levels_table(page, difficulty)]
    for a in ("step_kto", "step_kto_prm"):
        if grown := [s for m in ASKED if (s := growth(page, a, "kto", m))]:
            lines += bullets([f"`{a}` minus `kto` from M_1 on: {'; '.join(grown)}."])
    rows = [(f"`{a}` - `{b}`", *_cells(page, a, b, DIFFERENCES)) for a, b in pairs(page)]
    lines += fold("All differences of last models, in points", table(("", *_titles(page, DIFFERENCES)), rows))
    titles = ("arm", "first error", "before the first error, %", "step accuracy, %", "tokens", "KL from M_0, nats")
    lines += fold(
        "Where solutions go wrong, and how far the models have moved",
        table(titles, [row for d in page.difficulties() for row in ways_rows(page, d)]),
    )
    return lines + fold("All arms by iteration, in per cent", [*page.picture("arms"), *by_iteration(page)])


def levels_table(page: Page, difficulty: str) -> list[str]:
    rows = []
    for label, run in rows_of(page, difficulty):
        estimates = [page.study.level(run, "test", m) for m in LEVELS]
        longer = [page.study.level(run, "shifted", m) for m in ASKED]
        cells = [level(e, METRICS[m]) for e, m in zip([*estimates, *longer], [*LEVELS, *ASKED], strict=True)]
        if any(cells):
            rows.append((label, *cells, estimates[0].seeds if estimates[0] else 0))
    longer_titles = (f"longer chains: {METRICS[m].title}" for m in ASKED)
    return table(("arm", *(METRICS[m].title for m in LEVELS), *longer_titles, "seeds"), rows)


def ways_rows(page: Page, difficulty: str) -> list[tuple[str, ...]]:
    study, rows = page.study, []
    for label, run in rows_of(page, difficulty):
        initial = run[0] == "initial"
        tokens = study.over(run, (lambda r: r["test"]["greedy"]["tokens"]) if initial else _tokens)
        rows.append(
            (f"{label}, {difficulty}", level(study.level(run, "test", "first_error"), METRICS["first_error"], 2),
             level(study.level(run, "test", "before_error"), METRICS["before_error"]),
             "" if initial else level(study.over(run, of_last("step_accuracy"))), plain(tokens),
             "" if initial else plain(study.over(run, of_last("kl_from_initial")), 2))
        )  # fmt: skip
    return [row for row in rows if any(row[1:])]


def _tokens(record: dict) -> float:
    return record["greedy"][-1]["tokens"]


def by_iteration(page: Page) -> list[str]:
    """The levels of all models of an arm, those of a measure in one cell."""
    rows = []
    for difficulty in page.difficulties():
        models = range(page.last(difficulty) + 1)
        for name in page.arms(difficulty):
            run: Run = ("main", difficulty, name)
            cells = []
            for m in ASKED:
                estimates = [page.study.level(run, t, m) for t in models]
                cells.append(", ".join(fixed(100 * e.value, 1) if e else "none" for e in estimates))
            if page.study.level(run, 0, "pass@1"):
                rows.append((f"`{name}`, {difficulty}", *cells))
    return table(("arm", *(f"{METRICS[m].title}, M_0 and later" for m in ASKED)), rows)


def longer_chains(page: Page) -> list[str]:
    said = []
    for a in ("step_kto", "step_kto_prm"):
        if found := compare(page, a, "kto", "shifted"):
            said.append(f"{capital(sentence(found, a, 'kto'))}.")
    if not said:
        return []
    text = "No arm got feedback on chains this long; M_0 has seen demonstrations of them. Levels are under Results."
    return ["## Longer chains", "", *paragraph(text), *bullets(said), *page.picture("shifted")]


def drift(page: Page) -> list[str]:
    runs = heads(page)
    if not runs:
        return []
    lines = ["## Does self-labelling drift?", ""]
    lines += paragraph(
        "The head is fitted on M_0's solutions of a seed set; the policy then moves away from what the head has seen. "
        "Judged by AUROC: the chance that a right step scores above a wrong one, 50 % for a guess. F1 of finding wrong "
        "steps also follows how many are wrong, which stands beside it."
    )
    lines += bullets(drift_sentences(page)) + page.picture("drift")
    models = range(max(page.last(difficulty) for _, difficulty, _ in runs) + 1)
    rows: list[tuple[str, ...]] = []
    for run in runs:
        for name, of in HEAD.items():
            rows.append((f"`{run[2]}`, {run[1]}: {name}", *(level(page.study.over(run, of(t))) for t in models)))
    titles = ("in per cent", *(f"M_{t}" for t in models))
    return [*lines, *fold("The head by iteration", table(titles, [r for r in rows if any(r[1:])]))]


def _of_records(records: str, of: Callable[[dict], float | None]) -> Callable[[int], Callable[[dict], float | None]]:
    """iteration -> a number of a result's record of it; None where a result has no such record."""
    return lambda t: lambda result: of(result[records][t]) if t < len(result[records]) else None


def _wrong(record: dict) -> float | None:
    right = record.get("step_accuracy")
    return None if right is None else 1 - right


# A measure of the head -> what it is of a result at an iteration.
HEAD = {
    "AUROC, test": _of_records("iterations", lambda record: record.get("prm", {}).get("auroc")),
    "AUROC, rollouts": _of_records("rollouts", lambda record: record.get("prm/auroc")),
    "F1, test": _of_records("iterations", lambda record: record.get("prm", {}).get("f1")),
    "wrong steps, test": _of_records("iterations", _wrong),
}


def ablations(page: Page) -> list[str]:
    found = variants(page)
    if not found:
        return []
    planned, most = len(page.family.ablation_seeds), max(v.seeds for v in found)
    lines = ["## Ablations", ""]
    lines += paragraph(
        "One thing changed at a time, learning rate and beta as chosen for the base. Differences are the variant minus "
        "its base, over the seeds of which both finished, in points of the last model; shown ones in bold. CPU: "
        "seconds of training, over the base's."
        + (f" With {counted(most, 'seed')} the interval is wide: only large effects can be shown." if most > 1 else "")
    )
    rows = [
        (f"`{v.name}`", v.text, v.difficulty, f"`{v.base}`", v.seeds,
         *(shown(v.differences.get(m), METRICS[m], planned) for m in ASKED),
         "" if v.cost is None else f"{v.cost:.2f}x", f"{v.failed} of {v.runs}" if v.failed else "")
        for v in found
    ]  # fmt: skip
    titles = ("variant", "what changes", "difficulty", "base", "seeds", *(METRICS[m].title for m in ASKED), "CPU",
              "failed")  # fmt: skip
    lines += bullets(failed_variants(found)) + page.picture("ablations")
    return [*lines, *fold("All ablations", table(titles, rows))]


# ---- how it was done ----


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
            "label. CPU seconds are of training and its evaluations."
        )
    lines += paragraph(
        "**Measures**, of held-out problems, steps judged by the exact checker. Pass@1: share of problems whose greedy "
        "solution is right. Maj@8: share whose most frequent answer of 8 samples is right. Pass@8: share with a right "
        "answer among 8 samples. Flawed right answers: share of right greedy solutions with a wrong step. First error: "
        "number of the first wrong step, from 1, of greedy solutions that have one, and the share of the solution "
        "before it; an arm that repairs easy errors is left with others, so read it beside the step accuracy, the "
        "share of right steps. KL is a completion's."
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
    seed_set = setting(record, "prm_seed_problems") * setting(record, "prm_seed_generations")
    seed_text = f"{seed_set:,} solutions" + (f", about {seed_set * first.value:,.0f} step labels" if first else "")
    return (
        arm.text, f"{prompts:,} x {completions}", f"{rollouts:,}" if arm.outcomes == "yes" else arm.outcomes,
        steps if arm.steps == "yes" else arm.steps, seed_text if arm.seed_set else "no",
        plain(page.study.over(run, cost), 0),
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
    """The settings that all main runs have, where these are not the defaults."""
    recipes = [r["recipe"] for r in page.study.records if r["stage"] == "main"]
    if not recipes:
        return {}
    kept = set.intersection(*map(set, recipes)) - {"name", "seed"}
    return {k: recipes[0][k] for k in kept if all(r[k] == recipes[0][k] for r in recipes)}


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


def against_the_paper(page: Page) -> list[str]:
    gaps = [b - a for a, b in zip(PAPER["kto"], PAPER["step_kto"], strict=True)]
    rows = [("the paper", f"`{name}`", *(f"{x:.1f}" for x in values)) for name, values in PAPER.items()]
    rows.append(("the paper", "difference", *(f"{x:+.1f}" for x in gaps)))
    said, metric, models = [], METRICS["flawed_correct"], range(len(gaps))
    for difficulty in page.difficulties():
        found = {t: e for t in models if (e := page.difference(difficulty, "step_kto", "kto", "flawed_correct", t))}
        if found:
            cells = [shown(found[t], metric, page.seeds(difficulty)) if t in found else "" for t in models]
            rows.append((difficulty, "difference", *cells))
            said.append(direction(page, difficulty, found, gaps))
    if not said:
        return []
    return [
        "## Against the paper",
        "",
        *paragraph(
            "Flawed right answers in per cent. The paper (table 3) has them on mathematics: fewer with Step-KTO than "
            "with KTO from M_1 on, and fewer with each iteration. Only directions can be compared."
        ),
        *table(("", "", *(f"M_{t}" for t in models)), rows),
        *bullets(said),
    ]


def direction(page: Page, difficulty: str, found: Mapping[int, Estimate], gaps: Sequence[float]) -> str:
    """Whether a difficulty's differences, and what becomes of flawed answers, are as in the paper."""
    later = {t: e for t, e in found.items() if t > 0}
    same = [f"M_{t}" for t, e in later.items() if e.value * gaps[t] > 0]
    proven = [f"M_{t}" for t, e in later.items() if e.sign * gaps[t] > 0]
    against = [f"M_{t}" for t, e in later.items() if e.sign * gaps[t] < 0]
    text = f"{capital(difficulty)}: the difference has the paper's sign at {listed(same) if same else 'no iteration'}"
    several = max(e.seeds for e in found.values()) > 1
    text += f", shown at {listed(proven)}" if proven else ", shown at none" if same and several else ""
    text += f"; the opposite is shown at {listed(against)}" if against else ""
    last = page.last(difficulty)
    moved = []
    for name in PAPER:
        e = page.study.progress(("main", difficulty, name), 0, last, "flawed_correct")
        if e is not None and e.seeds > 1:
            word = {"better": "become fewer", "worse": "become more"}.get(judged(e, -1), "could not be shown to change")
            moved.append(f"{word} with `{name}` ({gap(e, METRICS['flawed_correct'])})")
    return f"{text}. From M_0 to M_{last} flawed right answers {listed(moved)}." if moved else f"{text}."


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
    failed = {stage: len(_failed(page, stage)) for stage in runs}
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


SECTIONS = (
    in_short, advice, limits, results, longer_chains, drift, ablations, method, search, against_the_paper, what_ran,
    rerun,
)  # fmt: skip
