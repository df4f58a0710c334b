"""The sections of the study's page that tell what was found; `sections.py` has their order."""

from collections.abc import Callable, Mapping, Sequence

from .findings import ASKED, DIFFERENCES, Page, compare, growth, of_last, pairs, rows_of, sentence
from .form import lost_form, lost_of, lost_table, share_of_runs
from .heads import drift_sentences, heads
from .statistics import METRICS, Estimate
from .variants import failed_variants, variants, with_outcomes
from .words import (
    bullets,
    capital,
    counted,
    fold,
    gap,
    judged,
    level,
    listed,
    paragraph,
    plain,
    shown,
    table,
)  # fmt: skip

# Right answers with at least one wrong step, in per cent, of M_0 to M_3: Step-KTO (arXiv 2501.10799), table 3.
PAPER = {"kto": (27.3, 24.6, 22.6, 21.1), "step_kto": (27.3, 22.9, 20.8, 19.9)}


LEVELS = ("pass@1", "maj@8", "pass@8", "flawed_correct")


def results(page: Page) -> list[str]:
    if not page.difficulties():
        return []
    lines = ["## Results", "", *page.picture("differences")]
    for difficulty in page.difficulties():
        last = page.last(difficulty)
        lines += [f"{capital(page.title(difficulty))}, M_{last}, in per cent:", "", *levels_table(page, difficulty)]
    said = []
    for a in ("step_kto", "step_kto_prm"):
        if grown := [s for m in ASKED if (s := growth(page, a, "kto", m))]:
            said.append(f"`{a}` minus `kto` from M_1 on: {'; '.join(grown)}.")
    lines += bullets([*said, *lost_form(page)]) + lost_table(page)
    rows = [(f"`{a}` - `{b}`", *difference_cells(page, a, b, DIFFERENCES)) for a, b in pairs(page)]
    lines += fold("All differences of last models, in points", table(("", *difference_titles(page, DIFFERENCES)), rows))
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
    """The levels of all models of an arm."""
    rows = []
    models = range(max(map(page.last, page.difficulties()), default=0) + 1)
    for m in ASKED:
        for difficulty in page.difficulties():
            for name in page.arms(difficulty):
                estimates = [page.study.level(("main", difficulty, name), t, m) for t in models]
                if any(estimates):
                    cells = (level(e, METRICS[m]) for e in estimates)
                    rows.append((f"`{name}`, {difficulty}: {METRICS[m].title}", *cells))
    return table(("arm", *(f"M_{t}" for t in models)), rows)


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
        "steps also follows how many are wrong, which stands beside it. The wrong steps that a policy has left are "
        "others than those it began with: whether the head became worse, or its task harder, is not separated here."
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
        "One thing changed at a time, two where it says so; learning rate and beta are those chosen for the base. "
        "Differences are the variant minus its base, over the seeds of which both finished, in points of the last "
        "model; shown ones in bold. CPU: seconds of training, over the base's, each of the seed that took the fewest."
        + (f" With {counted(most, 'seed')} the interval is wide: only large effects can be shown." if most > 1 else "")
    )
    for difficulty in page.study.difficulties("ablations"):
        seeds: dict[str, set[int]] = {}
        for v in found:
            if v.difficulty == difficulty:
                seeds.setdefault(v.base, set()).update(page.study.runs("ablations", difficulty, v.name))
        broke = [x for base in seeds for x in lost_of(page, "main", base, difficulty)[0]]
        places = [f"`{x.name}` with seed {x.seed}" for x in broke if x.seed in seeds[x.name]]
        if places:
            lines += paragraph(
                f"On {difficulty}, runs that others are held against lost the form of solutions, see Results: "
                f"{listed(places)}. That widens the intervals of last models: read the earlier ones, too."
            )
    models = sorted({t for v in found for t in v.earlier})
    rows = [
        (f"`{v.name}`", v.text, v.difficulty, f"`{v.base}`", v.seeds,
         *(shown(v.earlier.get(t), METRICS["pass@1"], planned) for t in models),
         *("the same solutions" if v.same else shown(v.differences.get(m), METRICS[m], planned) for m in ASKED),
         "" if v.cost is None else f"{v.cost:.2f}x", f"{v.failed} of {v.runs}" if v.failed else "")
        for v in found
    ]  # fmt: skip
    titles = ("variant", "what changes", "difficulty", "base", "seeds", *(f"Pass@1, M_{t}" for t in models),
              *(METRICS[m].title for m in ASKED), "CPU", "failed")  # fmt: skip
    lines += bullets(failed_variants(found)) + page.picture("ablations")
    return [*lines, *fold("All ablations", table(titles, rows)), *beside_steps(page)]


def beside_steps(page: Page) -> list[str]:
    """What the outcome loss does beside the step loss."""
    planned, lines = len(page.family.ablation_seeds), []
    for difficulty in page.study.difficulties("ablations"):
        found = with_outcomes(page, difficulty)
        models = sorted({t for x in found for t in x.models})
        rows = [
            (f"`{x.name}`", x.text, f"`{x.alone}`",
             *(shown(x.models.get(t), METRICS["pass@1"], planned) for t in models),
             shown(x.flawed, METRICS["flawed_correct"], planned),
             share_of_runs(*lost_of(page, x.stage, x.name, difficulty)))
            for x in found
        ]  # fmt: skip
        if not rows:
            continue
        alone = [
            (f"`{name}`", "the step loss alone", "", *[""] * (len(models) + 1),
             share_of_runs(*lost_of(page, "ablations", name, difficulty)))
            for name in dict.fromkeys(x.alone for x in found)
        ]  # fmt: skip
        lines += paragraph(
            f"**The outcome loss beside the step loss**, {difficulty}: what is changed by adding it, in points, over "
            "common seeds, at one learning rate and beta, those of `step_kto`; classes balanced, then not. Lost form: "
            "as under Results."
        )
        flawed = f"{METRICS['flawed_correct'].title}, M_{page.last(difficulty)}"
        titles = ("run", "losses", "minus", *(f"Pass@1, M_{t}" for t in models), flawed, "lost form")
        rows += alone
        lines += table(titles, rows)
    return lines


# ---- how it was done ----


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


def difference_cells(page: Page, a: str, b: str, metrics: Sequence[str]) -> list[str]:
    """The differences of two arms, each difficulty's in turn."""
    return [shown(page.difference(d, a, b, m), METRICS[m], page.seeds(d)) for d in page.difficulties() for m in metrics]


def difference_titles(page: Page, metrics: Sequence[str]) -> list[str]:
    return [f"{d}: {METRICS[m].title}" for d in page.difficulties() for m in metrics]
