"""The sections of the study's page. Prose is fixed, numbers and words that judge follow from the results."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..recipe import Recipe
from .findings import (
    ARMS,
    COMMAND,
    DIFFERENCES,
    TUNED,
    VARIANTS,
    Arm,
    Page,
    Tried,
    all_differences,
    answer,
    by_verdict,
    compared,
    cost,
    drift_of,
    drift_sentences,
    growth,
    head_f1,
    heads,
    of_last,
    pairs,
    rows_of,
    searched,
    setting,
    variants,
)  # fmt: skip
from .statistics import METRICS, Estimate, Run, Where, evaluation
from .words import (
    bullets,
    code,
    counted,
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


def question(page: Page) -> list[str]:
    return [
        "## Question",
        "",
        *paragraph(
            "Step-KTO (arXiv 2501.10799) tells a language model of each step of a solution whether it is right, beside "
            "whether the answer is. Does that win over feedback on answers alone? Does it still win when a process "
            "reward model (PRM), fitted on few labelled solutions, takes the place of an exact checker? And do the "
            "labels it needs pay more than as many labels of another kind?"
        ),
    ]


FINDINGS = (
    ("Step labels or none", "step_kto", "kto"),
    ("Step labels or more prompts", "step_kto", "kto_more"),
    ("A PRM's labels or none", "step_kto_prm", "kto"),
    ("A PRM's seed set or as many more rollouts", "step_kto_prm", "kto_more"),
    ("A PRM's labels or exact ones", "step_kto_prm", "step_kto"),
    ("Step-KTO or fine-tuning on right answers", "step_kto", "rft"),
)


def in_short(page: Page) -> list[str]:
    lines = [f"**{answer(page, 'step_kto', 'kto')}**"]
    lines += [f"And with the labels of a PRM head? {answer(page, 'step_kto_prm', 'kto')}"]
    for lead, a, b in FINDINGS:
        said = [s for metric in ("pass@1", "flawed_correct") if (s := compared(page, a, b, metric))]
        if said:
            lines.append(f"{lead}. {' '.join(said)}")
    for metric in ("pass@1", "flawed_correct"):
        if said_of := growth(page, "step_kto", "kto", metric):
            lines.append(said_of)
    if longer := compared(page, "step_kto", "kto", "pass@1", "shifted"):
        lines.append(f"On longer chains. {longer}")
    lines += [s for s in drift_sentences(page) if s]
    text = (
        "Differences are in percentage points, the first arm minus the second, with intervals that hold 95 %. A word "
        "such as *ahead* stands only where the interval excludes 0. The arms are described under Method."
    )
    return ["## In short", "", *bullets(lines), *paragraph(text), *page.picture("main")]


def what_ran(page: Page) -> list[str]:
    family, study = page.family, page.study
    rows = []
    expected = {"main": family.seeds, "ablations": family.ablation_seeds, "search": family.search_seeds}
    for stage, wanted in (("main", family.arms), ("ablations", family.ablations)):
        places = family.difficulties if stage == "main" else [family.ablation_difficulty]
        for difficulty in dict.fromkeys([*places, *study.difficulties(stage)]):
            order = list(ARMS if stage == "main" else VARIANTS)
            present = study.names(stage, difficulty, order)
            names = sorted({*present, *wanted}, key=lambda n: (order.index(n) if n in order else len(order), n))
            for name in names if stage == "main" or present else []:
                rows.append(
                    (stage, difficulty, f"`{name}`", *_seeds(study.runs(stage, difficulty, name), expected[stage]))
                )
            if stage == "ablations" and not present:
                rows.append((stage, difficulty, "all", "missing", ""))
    for difficulty in dict.fromkeys([*family.difficulties, *study.difficulties("search")]):
        runs = [run for n in study.names("search", difficulty) for run in study.runs("search", difficulty, n).values()]
        failed = sum("failed" in run for run in runs)
        rows.append(
            ("search", difficulty, f"{counted(len(runs), 'run')}" if runs else "all", "" if runs else "missing",
             f"{failed} failed" if failed else "")
        )  # fmt: skip
    hours = sum(r["cpu_seconds"] for r in study.records if isinstance(r.get("cpu_seconds"), int | float)) / 3600
    machines = sorted({r["machine"] for r in study.records if r.get("machine")})
    versions = sorted({f"{k} {v}" for r in study.records for k, v in (r.get("versions") or {}).items()})
    trained = [r for r in study.records if r["stage"] != "initial"]
    lines = [
        f"{counted(len(trained), 'run')} and {counted(len(study.records) - len(trained), 'model')} M_0 in "
        f"{hours:,.1f} CPU hours"
        + (f", on {listed(machines)}" if machines else "")
        + (f", with {', '.join(versions)}" if versions else "")
        + "."
    ]
    failed_main = [r for r in trained if "failed" in r and r["stage"] != "search"]
    if failed_main:
        names = sorted({f"{r['name']} ({r['difficulty']}, seed {r['seed']})" for r in failed_main})
        lines.append(
            f"Failed, and in no comparison beyond where it came to: {', '.join(names)}. What is left out for failing "
            "favours the arm that failed."
        )
    titles = ("stage", "difficulty", "what", "seeds", "")
    return [
        "## What has been run",
        "",
        *paragraph(" ".join(lines)),
        *fold("Run by run", table(titles, rows)),
        *_missing(page),
    ]


def _seeds(runs: Mapping[int, dict], expected: Sequence[int]) -> tuple[str, str]:
    failed = sum("failed" in run for run in runs.values())
    text = f"{len(runs)} of {len(expected)} seeds" if runs else "missing"
    return text, f"{failed} failed" if failed else ""


def _missing(page: Page) -> list[str]:
    """Plainly, what is not there."""
    family, study, lines = page.family, page.study, []
    for stage, wanted, seeds in (
        ("main", family.arms, family.seeds),
        ("ablations", family.ablations, family.ablation_seeds),
    ):
        for difficulty in family.difficulties if stage == "main" else [family.ablation_difficulty]:
            have = {name: len(study.runs(stage, difficulty, name)) for name in wanted}
            if absent := [name for name, many in have.items() if not many]:
                what = f"all {len(absent)} {'arms' if stage == 'main' else 'variants'}"
                named = what if len(absent) == len(wanted) else code(absent)
                lines.append(f"Not run yet, {stage}, {difficulty}: {named}.")
            if partly := [f"`{n}` ({m} of {len(seeds)} seeds)" for n, m in have.items() if 0 < m < len(seeds)]:
                lines.append(f"Run in part, {stage}, {difficulty}: {listed(partly)}.")
    return bullets(lines) if lines else paragraph("No arm and no ablation of the plan is missing.")


def method(page: Page) -> list[str]:
    lines = ["## Method", ""]
    lines += paragraph(
        "**Task.** A problem is a chain of operations on digits, each taken modulo 10, computed from left to right "
        "(task `arithmetic`, docs/tasks.md). A solution has one line an operation and an answer. A checker judges "
        "answers and single steps exactly. Some operations absorb errors, so a wrong step can still reach the right "
        "answer; such an answer is *flawed*."
    )
    rows = []
    for difficulty in page.difficulties() or list(page.family.difficulties):
        runs = [r for r in page.study.records if (r["stage"], r["difficulty"]) == ("main", difficulty)]
        if not runs:
            continue
        few, most, wrong = (setting(runs[0], key) for key in ("min_operations", "max_operations", "misconceptions"))
        planned = page.family.difficulties.get(difficulty)
        longer = "{} to {}".format(*planned.shifted) if planned else ""
        counts = [
            next((len(e["right"]) for r in runs if (e := evaluation(r, where, METRICS["pass@1"]))), "")
            for where in (0, "shifted")
        ]
        rows.append((difficulty, f"{few} to {most}", longer, *counts, f"{100 * wrong:g}"))
    titles = ("difficulty", "operations", "of longer chains", "test problems", "longer chains", "facts taught wrong, %")
    lines += table(titles, rows)
    lines += paragraph(
        "**M_0.** A small transformer, made from scratch for each seed by imitating demonstrations of a teacher who "
        "believes some facts wrongly. It has seen demonstrations of all lengths; feedback comes for the shorter ones "
        "only. All arms of a seed start from the same M_0, and all seeds are tested on the same problems. "
        + same_start(page)
    )
    lines += paragraph(
        "**Arms.** Each trains M_0 to M_3 in iterations of sampling, judging and updating, and differs from the others "
        "in what it learns from and which labels it sees."
    )
    rows_of_labels = labels_table(page)
    lines += rows_of_labels and rows_of_labels + paragraph(
        "Outcome labels say whether an answer is right. Counts are of all iterations together, means over seeds. An "
        "arm with `no` under exact step labels of rollouts never sees the checker's word on a rollout's step. CPU "
        "seconds are of training and of its evaluations."
    )
    lines += paragraph(
        "**Search.** Learning rate and beta of each arm were chosen by the Pass@1 of its last model on validation "
        "problems, with other seeds than those of the results. `kto_more` takes what was chosen for `kto`."
    )
    lines += paragraph("**Measures.** All are of held-out problems; steps are judged by the exact checker.")
    lines += bullets(
        [
            "Pass@1: share of problems whose greedy solution is right.",
            "Maj@8: share of problems whose most frequent answer of 8 samples is right. Pass@4, Pass@8: chance that so "
            "many samples hold a right one, estimated without bias from 8 (Chen et al. 2021).",
            "Flawed right answers: share of right greedy solutions with at least one wrong step. Fewer are better.",
            "First error: number of the first wrong step, counted from 1, of greedy solutions that have one; before "
            "the first error: the mean share of such a solution that lies before it. Later is better, but an arm that "
            "repairs easy errors is left with others: read it beside the step accuracy, the share of right steps.",
            "Length in tokens, KL from M_0 in nats a completion.",
        ]
    )
    lines += paragraph(
        f"**Intervals.** They hold 95 % and cover two kinds of chance, other seeds and other problems. Each is the "
        f"hull of two: a percentile bootstrap of {page.study.resamples:,} resamples, which draws seeds and problems, "
        "both with replacement and independently of each other (the pigeonhole bootstrap, Owen 2007), and Student's t "
        "interval over the seeds' own values, since a bootstrap of few seeds alone is too narrow. Differences are "
        "paired: the same seeds, the same problems, the same draws. A difference counts as shown only where both "
        "intervals exclude 0. What is known of each seed alone (step accuracy, length, KL, seconds, the head's F1) has "
        "the t interval."
    )
    return [*lines, *fold("Settings that differ from the package's defaults", settings_table(page))]


def same_start(page: Page) -> str:
    """Whether all runs of a seed start from the same model, by its weights and by what it answered."""
    starts: dict[tuple, set] = {}
    for r in page.study.records:
        if r["stage"] == "search":
            continue
        found = {("weights", r.get("weights" if r["stage"] == "initial" else "initial_weights"))}
        if r.get("greedy"):
            found |= {(key, r["greedy"][0][key]) for key in ("right", "first_error", "steps")}
        starts.setdefault((r["difficulty"], r["seed"]), set()).update(x for x in found if x[1] is not None)
    several = sorted(
        f"{difficulty}, seed {seed}"
        for (difficulty, seed), found in starts.items()
        if len(found) > len({key for key, _ in found})
    )
    if several:
        return f"**The files contradict this: runs start from different models in {'; '.join(several)}.**"
    common = any(r["stage"] != "search" and r.get("greedy") for r in page.study.records)
    return "The result files confirm the common start." if common else ""


def labels_table(page: Page) -> list[str]:
    rows = []
    for difficulty in page.difficulties():
        for name in page.arms(difficulty):
            run: Run = ("main", difficulty, name)
            record = next(iter(page.study.runs(*run).values()))
            arm = ARMS.get(name, Arm(settings_text(record["overrides"]), "", ""))
            many = [setting(record, key) for key in ("num_prompts", "num_generations", "iterations")]
            rollouts = math.prod(many) if all(isinstance(x, int) for x in many) else None
            mean_steps = page.study.over(run, mean_step_labels)
            steps = f"{rollouts * mean_steps.value:,.0f}" if rollouts and mean_steps else "yes"
            seed_set = setting(record, "prm_seed_problems") * setting(record, "prm_seed_generations")
            rows.append(
                (difficulty, f"`{name}`", arm.text, "" if many[0] is None else f"{many[0]:,} x {many[1]}",
                 f"{rollouts:,}" if rollouts and arm.outcomes == "yes" else arm.outcomes,
                 steps if arm.steps == "yes" else arm.steps, f"{seed_set:,} completions" if arm.seed_set else "no",
                 plain(page.study.over(run, cost), 0))
            )  # fmt: skip
    titles = (
        "difficulty", "arm", "what it does", "prompts x completions an iteration", "outcome labels of rollouts",
        "exact step labels of rollouts", "checker labels of the PRM's seed set", "CPU seconds",
    )  # fmt: skip
    return table(titles, rows)


def mean_step_labels(record: dict) -> float | None:
    """Labelled steps of a rollout, over the iterations."""
    of = [r["completions/mean_steps"] * r.get("step_labels/labelled", 1.0)
          for r in record["rollouts"] if r.get("completions/mean_steps") is not None]  # fmt: skip
    return sum(of) / len(of) if of else None


def settings_table(page: Page) -> list[str]:
    """What all runs of a difficulty share."""
    shared: dict[str, dict[str, Any]] = {}
    for difficulty in page.difficulties():
        runs = [r for r in page.study.records if (r["stage"], r["difficulty"]) == ("main", difficulty)]
        kept = set.intersection(*(set(r["recipe"]) for r in runs)) - {"name", "seed"}
        common = {k for k in kept if all(r["recipe"][k] == runs[0]["recipe"][k] for r in runs)}
        shared[difficulty] = {k: runs[0]["recipe"][k] for k in common}
    keys = sorted(set().union(*shared.values())) if shared else []
    default = asdict(Recipe())
    rows = [(f"`{k}`", *(of.get(k, default.get(k, "")) for of in shared.values())) for k in keys]
    return table(("setting", *shared), rows)


LEVELS = ("pass@1", "maj@8", "pass@4", "pass@8", "flawed_correct")


def results(page: Page) -> list[str]:
    lines = ["## Results", ""]
    if not page.difficulties():
        return [*lines, *paragraph("No run of an arm has a result yet.")]
    lines += [*page.picture("arms"), *page.picture("differences")]
    for difficulty in page.difficulties():
        last = page.last(difficulty)
        lines += [f"### {difficulty.capitalize()}", "", f"The last model, M_{last}, in per cent:", ""]
        lines += levels_table(page, difficulty, "test")
        lines += ["Where solutions go wrong, and how far the model has moved:", ""]
        lines += ways_table(page, difficulty)
        lines += [f"Differences at M_{last}, the first arm minus the second; shown ones in bold:", ""]
        lines += differences_table(page, difficulty)
        lines += by_iteration(page, difficulty)
    lines += ["### Does the lead grow?", ""]
    grown = [
        s for a, b in (("step_kto", "kto"), ("step_kto_prm", "kto")) for m in ("pass@1", "flawed_correct")
        if (s := growth(page, a, b, m))
    ]  # fmt: skip
    lines += bullets(grown) or paragraph("There is nothing to compare yet.")
    return lines


def levels_table(page: Page, difficulty: str, where: Where) -> list[str]:
    rows = [
        (label, *(level(page.study.level(run, where, m), METRICS[m]) for m in LEVELS), len(page.study.runs(*run)))
        for label, run in rows_of(page, difficulty)
    ]
    return table(("arm", *(METRICS[m].title for m in LEVELS), "seeds"), [row for row in rows if any(row[1:-1])])


def ways_table(page: Page, difficulty: str) -> list[str]:
    study, rows = page.study, []
    for label, run in rows_of(page, difficulty):
        initial = run[0] == "initial"
        tokens = study.over(run, (lambda r: r["test"]["greedy"]["tokens"]) if initial else _tokens)
        rows.append(
            (label, level(study.level(run, "test", "first_error"), METRICS["first_error"], 2),
             level(study.level(run, "test", "before_error"), METRICS["before_error"]),
             "" if initial else level(study.over(run, of_last("step_accuracy"))), plain(tokens),
             "" if initial else plain(study.over(run, of_last("kl_from_initial")), 2))
        )  # fmt: skip
    titles = ("arm", "first error", "before the first error, %", "step accuracy, %", "tokens", "KL from M_0, nats")
    return table(titles, [row for row in rows if any(row[1:])])


def _tokens(record: dict) -> float | None:
    return None if "failed" in record else record["greedy"][-1]["tokens"]


def differences_table(page: Page, difficulty: str) -> list[str]:
    rows = []
    for a, b in pairs(page, difficulty):
        cells = [shown(page.difference(difficulty, a, b, m), METRICS[m]) for m in DIFFERENCES]
        if any(cells):
            rows.append((f"`{a}` - `{b}`", *cells))
    units = ("points" if METRICS[m].share else "steps" for m in DIFFERENCES)
    return table(("", *(f"{METRICS[m].title}, {unit}" for m, unit in zip(DIFFERENCES, units, strict=True))), rows)


def by_iteration(page: Page, difficulty: str) -> list[str]:
    last, lines = page.last(difficulty), []
    models = [f"M_{t}" for t in range(last + 1)]
    rows = []
    for a, b in (("step_kto", "kto"), ("step_kto_prm", "kto")):
        for m in ("pass@1", "flawed_correct"):
            cells = [shown(page.difference(difficulty, a, b, m, t), METRICS[m]) for t in range(1, last + 1)]
            if any(cells):
                rows.append((f"`{a}` - `{b}`, {METRICS[m].title}", *cells))
    if rows:
        lines += ["By iteration, in points:", "", *table(("", *models[1:]), rows)]
    rows = []
    for m in ("pass@1", "flawed_correct"):
        for name in page.arms(difficulty):
            run: Run = ("main", difficulty, name)
            cells = [level(page.study.level(run, t, m), METRICS[m]) for t in range(last + 1)]
            if any(cells):
                rows.append((f"`{name}`, {METRICS[m].title}", *cells))
    return lines + fold("All arms by iteration, in per cent", table(("arm", *models), rows))


def shifted(page: Page) -> list[str]:
    lines = ["## Longer chains", ""]
    found = []
    for difficulty in page.difficulties():
        rows = levels_table(page, difficulty, "shifted")
        if rows:
            found += [f"### {difficulty.capitalize()}, longer chains", "", *rows]
    if not found:
        return [*lines, *paragraph("No run has been tested on longer chains yet.")]
    lines += paragraph(
        "Nobody got feedback on chains this long. What an arm gains here, it has learned about single operations."
    )
    said = [
        s for a, b in (("step_kto", "kto"), ("step_kto_prm", "kto"), ("step_kto", "rft"))
        for m in ("pass@1", "flawed_correct") if (s := compared(page, a, b, m, "shifted"))
    ]  # fmt: skip
    return [*lines, *bullets(said), *page.picture("shifted"), *found]


def drift(page: Page) -> list[str]:
    lines, runs = ["## Does self-labelling drift?", ""], heads(page)
    if not runs:
        return [*lines, *paragraph("No run with a PRM head has a result yet.")]
    lines += paragraph(
        "The head is fitted on a seed set of M_0's solutions; the policy then moves away from what the head has seen. "
        "F1 is of finding wrong steps, against the exact checker: of each model on test problems, and precision and "
        "recall on the rollouts that the head labelled for training."
    )
    lines += bullets(drift_sentences(page)) + page.picture("drift")
    last = max(page.last(difficulty, stage) for stage, difficulty, _ in runs)
    rows: list[tuple] = []
    for run in runs:
        place = f"`{run[2]}`, {run[1]}"
        rows.append((place, "F1, test", *(_rate(head_f1(page, run, t)) for t in range(last + 1))))
        for key in ("precision", "recall"):
            cells = [_rate(page.study.over(run, of_rollouts(t, f"prm/{key}"))) for t in range(last + 1)]
            rows.append((place, f"{key}, rollouts", *cells))
    return [*lines, *table(("run", "measure", *(f"M_{t}" for t in range(last + 1))), [r for r in rows if any(r[2:])])]


def of_rollouts(iteration: int, key: str) -> Callable[[dict], float | None]:
    return lambda record: record["rollouts"][iteration].get(key) if iteration < len(record["rollouts"]) else None


def _rate(e: Estimate | None) -> str:
    return "" if e is None else level(Estimate(e.value, max(e.low, 0.0), min(e.high, 1.0), e.seeds), digits=1)


def ablations(page: Page) -> list[str]:
    lines, found = ["## Ablations", ""], variants(page)
    if not found:
        return [*lines, *paragraph("No ablation has a result yet.")]
    lines += paragraph(
        "One thing changed at a time, learning rate and beta as chosen for the base. Differences are the variant minus "
        "its base, over the seeds that both have, in points of the last model; shown ones in bold. CPU: seconds of "
        "training, over the base's. With three seeds the t interval is wide: only large effects can be shown."
    )
    rows = [
        (f"`{v.name}`", v.text, v.difficulty, f"`{v.base}`", v.seeds,
         *(shown(v.differences.get(m), METRICS[m]) for m in ("pass@1", "flawed_correct")),
         "" if v.cost is None else f"{v.cost:.2f}x")
        for v in found
    ]  # fmt: skip
    titles = ("variant", "what changes", "difficulty", "base", "seeds", "Pass@1", "flawed right answers", "CPU")
    return [*lines, *page.picture("ablations"), *table(titles, rows)]


def search_log(page: Page) -> list[str]:
    lines, found = ["## Search", ""], searched(page)
    if not found:
        return [*lines, *paragraph("No run of the search has a result.")]
    counts = {len(r["greedy"][-1]["right"]) for r in page.study.records if r["stage"] == "search" and r["greedy"]}
    lines += paragraph(
        f"All {counted(sum(t.seeds for t in found), 'run')}, on {listed(f'{n:,}' for n in sorted(counts))} validation "
        "problems: rates in per cent of the last model, a failed run counts as 0. The chosen setting of each arm is in "
        "bold."
    )
    rows, notes = [], []
    for t in found:
        values = settings_text(t.values)
        cells = (
            t.difficulty,
            f"`{t.arm}`",
            values,
            t.seeds,
            f"{100 * t.rate:.1f}",
            level(t.flawed and t.flawed._replace(low=math.nan), METRICS["flawed_correct"]),
            f"{t.failed}" if t.failed else "",
        )
        rows.append(tuple(f"**{c}**" if t.chosen and c != "" else c for c in cells))
    for (difficulty, arm), of in grouped(found).items():
        chosen = next((t for t in of if t.chosen), None)
        best = max(t.rate for t in of)
        if chosen is None:
            notes.append(f"`{arm}`, {difficulty}: none of these is in the results above (yet).")
            continue
        if chosen.rate < best:
            notes.append(f"`{arm}`, {difficulty}: the chosen setting is not the one with the highest Pass@1.")
        edges = [
            f"`{k}`" for k in TUNED[:2]
            if len(numbers := {t.values[k] for t in of if k in t.values}) > 1
            and chosen.values.get(k) in (min(numbers), max(numbers))
        ]  # fmt: skip
        if edges:
            notes.append(f"`{arm}`, {difficulty}: the chosen {listed(edges)} lies at the edge of what was tried.")
    titles = ("difficulty", "arm", "setting", "seeds", "Pass@1", "flawed right answers", "failed")
    return [*lines, *bullets(notes), *fold("All that was tried", table(titles, rows))]


def grouped(found: Iterable[Tried]) -> dict[tuple[str, str], list[Tried]]:
    groups: dict[tuple[str, str], list[Tried]] = {}
    for t in found:
        groups.setdefault((t.difficulty, t.arm), []).append(t)
    return groups


def against_the_paper(page: Page) -> list[str]:
    lines = ["## Against the paper", ""]
    lines += paragraph(
        "Table 3 of the Step-KTO paper has the share of right answers with at least one wrong step, as a PRM judges "
        "them on mathematics. The task, the models and the judge differ from ours: only the directions can be compared."
    )
    rows = []
    for name, values in PAPER.items():
        rows.append(("the paper", f"`{name}`", *(f"{x:.1f}" for x in values)))
    gaps = [b - a for a, b in zip(PAPER["kto"], PAPER["step_kto"], strict=True)]
    rows.append(("the paper", "difference", *(f"{x:+.1f}" for x in gaps)))
    said = []
    metric, models = METRICS["flawed_correct"], range(len(gaps))
    for difficulty in page.difficulties():
        differences = {
            t: e for t in models if (e := page.difference(difficulty, "step_kto", "kto", "flawed_correct", t))
        }
        for name in PAPER:
            run: Run = ("main", difficulty, name)
            cells = [level(page.study.level(run, t, "flawed_correct"), metric) for t in models]
            if any(cells):
                rows.append((difficulty, f"`{name}`", *cells))
        if differences:
            cells = [shown(differences[t], metric) if t in differences else "" for t in models]
            rows.append((difficulty, "difference", *cells))
            said.append(_direction(difficulty, differences, gaps))
        for name in PAPER:
            change = fall(page, difficulty, name)
            if change is not None:
                said.append(change)
    lines += table(("", "", *(f"M_{t}" for t in models)), rows)
    fewer = "fewer" if all(x < 0 for x in gaps[1:]) else "not always fewer"
    falls = all(y < x for values in PAPER.values() for x, y in itertools.pairwise(values))
    lines += paragraph(
        f"In the paper Step-KTO has {fewer} flawed right answers than KTO from M_1 on, and both have "
        f"{'fewer' if falls else 'not always fewer'} with each iteration."
    )
    return lines + (bullets(said) or paragraph("There is nothing to compare it with yet."))


def _direction(difficulty: str, differences: Mapping[int, Estimate], gaps: Sequence[float]) -> str:
    later = {t: e for t, e in differences.items() if t > 0}
    same = [f"M_{t}" for t, e in later.items() if e.value * gaps[t] > 0]
    proven = [f"M_{t}" for t, e in later.items() if e.sign * gaps[t] > 0]
    against = [f"M_{t}" for t, e in later.items() if e.sign * gaps[t] < 0]
    text = (
        f"{difficulty.capitalize()}: the difference has the paper's sign at {listed(same)}"
        if same
        else (f"{difficulty.capitalize()}: the difference has the paper's sign at no iteration")
    )
    text += f", shown at {listed(proven)}" if proven else ", shown at none" if same else ""
    return text + (f"; the opposite is shown at {listed(against)}." if against else ".")


def fall(page: Page, difficulty: str, name: str) -> str | None:
    """Whether flawed right answers become fewer from M_0 to the last model."""
    run: Run = ("main", difficulty, name)
    last = page.last(difficulty)
    e = page.study.progress(run, 0, last, "flawed_correct")
    if e is None:
        return None
    word = {"better": "become fewer", "worse": "become more"}.get(judged(e, -1), "show no change")
    change = gap(e, METRICS["flawed_correct"])
    return f"{difficulty.capitalize()}: flawed right answers {word} with `{name}` from M_0 to M_{last} ({change})."


def limits(page: Page) -> list[str]:
    every = [e for e, _ in all_differences(page) if e.seeds > 1]
    found = sum(e.sign != 0 for e in every)
    lines = [
        "One synthetic task with an exact checker of steps, and a model that is small and made here. Nothing here says "
        "how large an effect is with a large model on mathematics.",
        "The exact checker judges a step by itself. Labels of people or of continuations have other errors.",
        "The same problems and the same M_0 for all arms make differences sharp; they hold for such problems alone.",
    ]
    if every:
        verb, chance = "is" if found == 1 else "are", math.ceil(0.05 * len(every))
        lines.append(
            f"The tables judge {counted(len(every), 'difference')} of last models; {found} of them {verb} shown. "
            f"Nothing is corrected for their number: if none were real, about {chance} at most would be expected."
        )
    seeds = sorted({len(page.study.runs("main", d, n)) for d in page.difficulties() for n in page.arms(d)})
    if seeds:
        many = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        lines.append(f"{many} seeds an arm. What is not shown may still be there: read the interval, not the word.")
    if tried := searched(page):
        most = max(t.seeds for t in tried)
        lines.append(
            f"The search has {counted(most, 'seed')} a setting and covers learning rate and beta alone: an arm may be "
            "better with settings that were not tried."
        )
    return ["## Limits", "", *bullets(lines)]


# (arm, base, metric, what to do where the arm is better, where it is worse, where nothing could be shown)
ADVICE = (
    ("step_kto", "kto", "flawed_correct",
     "If steps can be checked, label them: right answers have fewer wrong steps",
     "Step labels do not make right answers cleaner: they have more wrong steps",
     "Do not count on step labels for cleaner right answers: no effect could be shown"),
    ("step_kto", "kto", "pass@1",
     "Step labels raise Pass@1 as well",
     "Watch Pass@1 when you add step labels: it falls",
     "Do not count on step labels to raise Pass@1: no effect could be shown"),
    ("step_kto_prm", "step_kto", "flawed_correct",
     "A PRM head's labels make right answers cleaner than exact labels do",
     "Prefer exact labels to a PRM head's where you have them: they leave fewer flawed right answers",
     "A PRM head's labels and exact ones could not be told apart in flawed right answers"),
    ("step_kto_prm", "step_kto", "pass@1",
     "A PRM head's labels reach a higher Pass@1 than exact ones",
     "A PRM head's labels cost Pass@1 against exact ones",
     "A PRM head's labels cost no Pass@1 that could be shown"),
    ("step_kto_prm", "kto_more", "pass@1",
     "Spend labels on a PRM's seed set rather than on as many more rollouts",
     "For Pass@1, spend labels on more rollouts rather than on a PRM's seed set",
     "For Pass@1, a PRM's seed set and as many more rollouts could not be told apart"),
    ("step_kto_prm", "kto_more", "flawed_correct",
     "For cleaner solutions, spend labels on a PRM's seed set rather than on as many more rollouts",
     "More rollouts leave fewer flawed right answers than a PRM's seed set",
     "For cleaner solutions, a PRM's seed set and as many more rollouts could not be told apart"),
    ("step_kto", "step_only", "pass@1",
     "Keep the outcome loss beside the step loss",
     "Try the step loss alone: the outcome loss costs Pass@1",
     "The outcome loss beside the step loss could not be shown to matter for Pass@1"),
    ("kto", "rft", "pass@1",
     "Learn from wrong answers too: KTO is ahead of fine-tuning on right ones",
     "Start with fine-tuning on right answers: KTO is behind it",
     "KTO and fine-tuning on right answers could not be told apart in Pass@1"),
    ("step_kto", "dpo", "pass@1",
     "Prefer Step-KTO to DPO",
     "Prefer DPO to Step-KTO for Pass@1",
     "Step-KTO and DPO could not be told apart in Pass@1"),
)  # fmt: skip


def advice(page: Page) -> list[str]:
    lines = []
    for a, b, metric, *texts in ADVICE:
        found = [(d, e) for d in page.difficulties() if (e := page.difference(d, a, b, metric)) is not None]
        groups = by_verdict(found, METRICS[metric])
        for kind, text in zip(("better", "worse", "no difference"), texts, strict=True):
            if kind in groups:
                lines.append(f"{text}. `{a}` minus `{b}`: {listed(groups[kind])}.")
    lines += ablation_advice(page)
    for change in (drift_of(page, run) for run in heads(page) if run[0] == "main"):
        if change is not None and change[0].sign < 0:
            lines.append("Refit or check the PRM head as the policy moves: its F1 falls over the iterations.")
            break
    text = "Each line follows from a difference above, in points, and holds for this task and this scale."
    return [
        "## Advice",
        "",
        *(bullets(lines) + paragraph(text) if lines else paragraph("None yet: too little has run.")),
    ]


def ablation_advice(page: Page) -> list[str]:
    found: dict[str, list[str]] = {}
    for v in variants(page):
        verdicts = {m: judged(e, METRICS[m].good) for m, e in v.differences.items()}
        moved = [m for m, x in verdicts.items() if x in ("better", "worse")]
        text = ", ".join(f"{METRICS[m].title} {gap(v.differences[m], METRICS[m])}" for m in moved)
        kinds = {verdicts[m] for m in moved}
        kind = "both" if len(kinds) == 2 else next(iter(kinds), "same" if "no difference" in verdicts.values() else "")
        found.setdefault(kind, []).append(f"`{v.name}`" + (f" ({text})" if text else ""))
    words = {
        "better": "Worth trying, better than the base",
        "worse": "To be left alone, worse than the base",
        "both": "A trade, better in one measure and worse in the other",
        "same": "No effect could be shown, so no reason to leave the defaults",
    }
    return [f"{word}: {listed(found[kind])}." for kind, word in words.items() if kind in found]


def rerun(page: Page) -> list[str]:
    return [
        "## How to run it again",
        "",
        f"    {COMMAND}                  # all runs that have no result yet; it goes on where it was stopped",
        f"    {COMMAND} --list true      # what is left to do",
        f"    {COMMAND}.page             # this page and its figures, from the result files",
        "",
    ]


SECTIONS = (
    question, in_short, what_ran, method, results, shifted, drift, ablations, search_log, against_the_paper, limits,
    advice, rerun,
)  # fmt: skip
