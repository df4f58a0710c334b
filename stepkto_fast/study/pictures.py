"""What the study's figures show: the estimates of each, which `figures` draws."""

import math
from collections.abc import Callable, Iterable, Sequence

from . import figures
from .findings import ARMS, FAMILY, Page, Variant, head_f1, heads, rows_of, variants
from .plan import Family
from .statistics import METRICS, Estimate, Study
from .words import counted, judged

MAIN_ARMS = {  # of the main figure
    "rft": "fine-tuning on right answers",
    "kto": "feedback on answers alone",
    "step_kto": "feedback on answers and steps, exact labels",
    "step_kto_prm": "the same, steps labelled by a PRM head",
}


def pictures(study: Study, family: Family = FAMILY) -> dict[str, Callable[[], bytes]]:
    """What there is to draw, nothing of it drawn yet: name -> PNG."""
    page = Page(study, family, {})
    found: dict[str, Callable[[], bytes]] = {}
    if page.difficulties():
        found["main"] = lambda: figure_main(study, family)
        found["arms"] = lambda: _draw_curves(page, list(ARMS), "All arms by iteration")
    if differences := _difference_panels(page):
        found["differences"] = lambda: figures.forest(
            differences, "Every arm against outcome-only KTO, last model",
            "Arm minus kto, 95 % intervals. Filled: the interval excludes 0 (blue better, orange worse).",
        )  # fmt: skip
    if panels := _shift_panels(page):
        found["shifted"] = lambda: figures.shift(
            panels, "Longer chains than any that got feedback",
            "Pass@1 of the last model, 95 % intervals. Filled: test problems; hollow: longer chains.",
        )  # fmt: skip
    if lines := _drift_panels(page):
        found["drift"] = lambda: figures.curves(
            [lines],
            "Does self-labelling drift?",
            "F1 of the PRM head at finding wrong steps, 95 % intervals over seeds.",
        )
    if ablated := _ablation_panels(page):
        found["ablations"] = lambda: figures.forest(
            ablated, "Ablations against their base, last model",
            "Variant minus base, 95 % intervals. Filled: the interval excludes 0 (blue better, orange worse).",
        )  # fmt: skip
    return found


def figure_main(study: Study, family: Family = FAMILY) -> bytes:
    """Pass@1 and flawed right answers by iteration for the main arms, a column for each difficulty."""
    return _draw_curves(Page(study, family, {}), list(MAIN_ARMS), "Feedback on answers, or on answers and steps")


def _draw_curves(page: Page, arms: Sequence[str], title: str) -> bytes:
    rows = []
    for metric, unit in (("pass@1", "Pass@1, %"), ("flawed_correct", "right answers with\na wrong step, %")):
        row = []
        for difficulty in page.difficulties():
            models = range(page.last(difficulty) + 1)
            names = [n for n in page.arms(difficulty) if n in arms or (len(arms) == len(ARMS) and n not in ARMS)]
            lines = {n: [page.study.level(("main", difficulty, n), t, metric) for t in models] for n in names}
            row.append(figures.Panel(difficulty, unit, lines))
        rows.append(row)
    seeds = max(len(page.study.runs("main", d, n)) for d in page.difficulties() for n in page.arms(d))
    caption = f"Means over up to {counted(seeds, 'seed')}, greedy solutions of held-out problems."
    if len(arms) > len(MAIN_ARMS):
        return figures.curves(rows, title, f"{caption} Intervals are in the tables.", bands=False)
    words = [
        f"{name}: {text}." for name, text in MAIN_ARMS.items() if any(name in p.lines for row in rows for p in row)
    ]
    legend = "\n".join(" ".join(words[n : n + 2]) for n in range(0, len(words), 2))
    return figures.curves(rows, title, f"{caption} Bands hold 95 %.\n{legend}")


def _difference_panels(page: Page) -> list[list[figures.Forest]]:
    rows = []
    for difficulty in page.difficulties():
        names = [n for n in page.arms(difficulty) if n != "kto" and page.difference(difficulty, n, "kto", "pass@1")]
        row = []
        for m in ("pass@1", "flawed_correct"):
            found = [(n, page.difference(difficulty, n, "kto", m)) for n in names]
            row.append(_forest(f"{difficulty}: {METRICS[m].title}", m, found))
        if names:
            rows.append(row)
    return rows


def _forest(title: str, m: str, found: Iterable[tuple[str, Estimate | None]]) -> figures.Forest:
    none = Estimate(math.nan, math.nan, math.nan, 0)
    rows = [figures.Row(n, e or none, judged(e or none, METRICS[m].good)) for n, e in found]
    return figures.Forest(title, "points", METRICS[m].good, rows)


def _ablation_panels(page: Page) -> list[list[figures.Forest]]:
    groups: dict[tuple[str, str], list[Variant]] = {}
    for v in variants(page):
        if v.differences:
            groups.setdefault((v.difficulty, v.base), []).append(v)
    return [
        [
            _forest(f"{METRICS[m].title}, minus {base} ({difficulty})", m, [(v.name, v.differences.get(m)) for v in of])
            for m in ("pass@1", "flawed_correct")
        ]
        for (difficulty, base), of in groups.items()
    ]


def _shift_panels(page: Page) -> list[tuple[str, list[tuple[str, Estimate, Estimate]]]]:
    found = []
    for difficulty in page.difficulties():
        rows = []
        for label, run in rows_of(page, difficulty):
            both = [page.study.level(run, where, "pass@1") for where in ("test", "shifted")]
            if both[0] is not None and both[1] is not None:
                rows.append((label.strip("`"), both[0], both[1]))
        if rows:
            found.append((difficulty, rows))
    return found


def _drift_panels(page: Page) -> list[figures.Panel]:
    panels: dict[str, dict[str, list[Estimate | None]]] = {}
    for run in heads(page):
        stage, difficulty, name = run
        models = range(page.last(difficulty, stage) + 1)
        panels.setdefault(difficulty, {})[name] = [head_f1(page, run, t) for t in models]
    return [figures.Panel(difficulty, "F1, %", lines) for difficulty, lines in panels.items()]
