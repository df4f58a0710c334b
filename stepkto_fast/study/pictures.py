"""What the study's figures show: the estimates of each, which `figures` draws."""

import math
from collections.abc import Callable, Iterable, Sequence

from . import figures
from .findings import ARMS, ASKED, FAMILY, Page, rows_of
from .heads import head, heads
from .plan import Family
from .statistics import METRICS, Estimate, Study
from .variants import Variant, variants
from .words import counted, judged

SHOWN = "Filled: the interval excludes 0 (blue better, orange worse)."

MAIN_ARMS = {  # of the main figure
    "rft": "fine-tuning on right answers",
    "kto": "feedback on answers alone",
    "step_only": "feedback on steps alone, exact labels",
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
            f"Arm minus kto{_held(e for line in differences for p in line for e in p.estimates())}. {SHOWN}",
        )  # fmt: skip
    if panels := _shift_panels(page):
        found["shifted"] = lambda: figures.shift(
            panels, "Longer chains than any that got feedback",
            f"Pass@1 of the last model{_held(e for _, rows in panels for _, *pair in rows for e in pair)}. "
            "Filled: test problems; hollow: longer chains.",
        )  # fmt: skip
    if lines := _drift_panels(page):
        found["drift"] = lambda: figures.curves(
            [lines],
            "Does self-labelling drift?",
            "AUROC of the PRM head: the chance that a right step scores above a wrong one"
            f"{_held(_estimates([lines]))}{_cut(_estimates([lines]))}.\n"
            "The axis is cut: a guess has 50 %.",
        )
    if ablated := _ablation_panels(page):
        found["ablations"] = lambda: figures.forest(
            ablated, "Ablations against their base",
            f"Variant minus base{_held(e for line in ablated for p in line for e in p.estimates())}. {SHOWN}",
        )  # fmt: skip
    return found


def figure_main(study: Study, family: Family = FAMILY) -> bytes:
    """Pass@1 and flawed right answers by iteration for the main arms, a column for each difficulty."""
    return _draw_curves(Page(study, family, {}), list(MAIN_ARMS), "Feedback on answers, on steps, or on both")


def _held(estimates: Iterable[Estimate]) -> str:
    """What a caption says of intervals; one seed has none."""
    return ", 95 % intervals" if any(not math.isnan(e.low) for e in estimates) else ", without intervals (one seed)"


def _cut(estimates: Iterable[Estimate]) -> str:
    """What a caption of curves says of intervals that their frame does not hold."""
    return "; those of two seeds may leave the frame" if any(e.seeds == 2 for e in estimates) else ""


def _estimates(panels: Iterable[Iterable[figures.Panel]]) -> list[Estimate]:
    return [e for row in panels for p in row for of in p.lines.values() for e in of if e]


def _draw_curves(page: Page, arms: Sequence[str], title: str) -> bytes:
    rows = []
    difficulties = page.difficulties()
    for metric, unit in (("pass@1", "Pass@1, %"), ("flawed_correct", "right answers with\na wrong step, %")):
        row = []
        for difficulty in difficulties:
            models = range(page.last(difficulty) + 1)
            names = [n for n in page.arms(difficulty) if n in arms or (len(arms) == len(ARMS) and n not in ARMS)]
            lines = {n: [page.study.level(("main", difficulty, n), t, metric) for t in models] for n in names}
            row.append(figures.Panel(page.title(difficulty), unit, lines))
        rows.append(row)
    estimates = _estimates(rows)
    seeds = sorted({e.seeds for e in estimates})
    caption = "Greedy solutions of held-out problems"
    if seeds and seeds[-1] > 1:
        caption += f", {counted(seeds[-1], 'seed')}" if len(seeds) == 1 else f", {seeds[0]} to {seeds[-1]} seeds"
    if len(difficulties) == 1:
        rows = [[row[0] for row in rows]]
    if len(arms) > len(MAIN_ARMS):
        return figures.curves(rows, title, f"{caption}. Intervals are in the tables.", intervals=False)
    words = [
        f"{name}: {text}." for name, text in MAIN_ARMS.items() if any(name in p.lines for row in rows for p in row)
    ]
    legend = "\n".join(" ".join(words[n : n + 2]) for n in range(0, len(words), 2))
    return figures.curves(rows, title, f"{caption}{_held(estimates)}{_cut(estimates)}.\n{legend}")


def _difference_panels(page: Page) -> list[list[figures.Forest]]:
    rows = []
    for difficulty in page.difficulties():
        names = [n for n in page.arms(difficulty) if n != "kto" and page.difference(difficulty, n, "kto", "pass@1")]
        row = []
        for m in ASKED:
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
    rows = []
    for (difficulty, base), of in groups.items():
        first = _forest(f"minus {base}\nPass@1 of M$_1$", "pass@1", [(v.name, v.earlier.get(1)) for v in of])
        last = page.last(difficulty)
        titles = {m: f"{METRICS[m].title} of M$_{last}$" for m in ASKED}
        rest = [_forest(f"minus {base}\n{titles[m]}", m, [(v.name, v.differences.get(m)) for v in of]) for m in ASKED]
        rows.append([first, *rest] if first.estimates() else rest)
    return rows


def _shift_panels(page: Page) -> list[tuple[str, list[tuple[str, Estimate, Estimate]]]]:
    found = []
    for difficulty in page.difficulties():
        rows = []
        for label, run in rows_of(page, difficulty):
            both = [page.study.level(run, where, "pass@1") for where in ("test", "shifted")]
            if both[0] is not None and both[1] is not None:
                rows.append((label.strip("`"), both[0], both[1]))
        if rows:
            found.append((page.title(difficulty), rows))
    return found


def _drift_panels(page: Page) -> list[figures.Panel]:
    panels: dict[str, dict[str, list[Estimate | None]]] = {}
    for run in heads(page):
        _, difficulty, name = run
        models = range(page.last(difficulty) + 1)
        estimates = [head(page, run, t) for t in models]
        panels.setdefault(difficulty, {})[name] = [e and e.as_share() for e in estimates]
    return [figures.Panel(page.title(difficulty), "AUROC, %", lines) for difficulty, lines in panels.items()]
