"""How the study's page writes numbers, verdicts and Markdown."""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .statistics import Estimate, Metric


def fixed(x: float, digits: int, sign: bool = False) -> str:
    """A number with so many digits, no minus before 0."""
    x = round(x, digits) + 0.0
    return f"{x:+.{digits}f}" if sign else f"{x:.{digits}f}"


def plain(e: Estimate | None, digits: int = 1) -> str:
    """A value with its interval; empty where there is none."""
    if e is None or math.isnan(e.value):
        return ""
    value, low, high = (fixed(x, digits) if not math.isnan(x) else "" for x in e[:3])
    return f"{value} [{low}, {high}]" if low else value


def level(e: Estimate | None, metric: Metric | None = None, digits: int = 1) -> str:
    """As `plain`, shares in per cent, between 0 and 100; without a metric it is a share."""
    if e is None or not (metric is None or metric.share):
        return plain(e, digits)
    e = e.as_share()
    return plain(Estimate(100 * e.value, 100 * e.low, 100 * e.high, e.seeds), digits)


def gap(e: Estimate, metric: Metric | None = None, unit: bool = True) -> str:
    """A difference with its interval, of shares in percentage points; no bound is rounded to 0 that is none. Without a
    metric it is one of shares."""
    share = metric is None or metric.share
    scale, digits = (100.0, 1) if share else (1.0, 2)
    while digits < 6 and any(0 < abs(scale * x) < 0.5 * 10**-digits for x in (e.low, e.high)):
        digits += 1
    value, low, high = (fixed(scale * x, digits, True) if not math.isnan(x) else "" for x in e[:3])
    points = " points" * (unit and share)
    return f"{value}{points} [{low}, {high}]" if low else f"{value}{points}"


def judged(e: Estimate, good: int) -> str:
    """better, worse, no difference; `too few seeds` where nothing can be said."""
    return "too few seeds" if e.seeds < 2 else e.verdict(good)


def listed(words: Iterable[str]) -> str:
    *others, last = list(words) or [""]
    return f"{', '.join(others)} and {last}" if others else last


def counted(many: int, noun: str) -> str:
    return f"{many:,} {noun}{'' if many == 1 else 's'}"


def code(names: Iterable[str]) -> str:
    return listed(f"`{name}`" for name in names)


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def paragraph(text: str) -> list[str]:
    return [textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False), ""]


def bullets(texts: Iterable[str]) -> list[str]:
    lines = [
        textwrap.fill(
            t, 120, initial_indent="- ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
        for t in texts
    ]
    return [*lines, ""] if lines else []


def table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Markdown; columns that nothing fills are left out."""
    cells = [[_cell(x) for x in row] for row in rows]
    if not cells:
        return []
    kept = [n for n in range(len(titles)) if n == 0 or any(row[n] for row in cells)]
    lines = [[titles[n] for n in kept], ["---"] * len(kept), *([row[n] for n in kept] for row in cells)]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def _cell(x: object) -> str:
    return " ".join(str(x).split()).replace("|", "\\|")


def fold(title: str, lines: Sequence[str]) -> list[str]:
    return [f"<details><summary>{title}</summary>", "", *lines, "</details>", ""] if lines else []


def settings_text(overrides: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}: {value}`" for key, value in sorted(overrides.items()))


def shown(e: Estimate | None, metric: Metric, planned: int) -> str:
    """A table's cell of a difference, in bold where it is shown, with its seeds where fewer than `planned` enter."""
    if e is None:
        return ""
    text, verdict = gap(e, metric, unit=False), judged(e, metric.good)
    few = f" ({counted(e.seeds, 'seed')})" if e.seeds < planned else ""
    return f"**{text} {verdict}**{few}" if verdict in ("better", "worse") else f"{text}{few}"
