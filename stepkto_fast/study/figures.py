"""The study's figures as PNG files. Each needs estimates alone; nothing is computed here.

Colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart; markers differ as well.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from .statistics import Estimate

INK, MUTED, GRID = "#222222", "#6b6b6b", "#e4e4e4"
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
STYLES = {
    "rft": (MUTED, "s"), "kto": (BLUE, "o"), "kto_more": (SKY, "D"), "dpo": (GREEN, "v"), "step_only": (PURPLE, "P"),
    "step_kto": (VERMILLION, "^"), "step_kto_prm": (ORANGE, "X"), "trunk_policy": (GREEN, "o"),
    "trunk_trained": (BLUE, "s"),
}  # fmt: skip
BETTER, WORSE, NEITHER = BLUE, VERMILLION, "#8a8a8a"
WIDTH, DPI = 10.0, 130
REACH = 3.0


class Panel(NamedTuple):
    """One small multiple: for each label the estimates by iteration, None where there is none."""

    title: str
    unit: str
    lines: Mapping[str, Sequence[Estimate | None]]
    share: bool = True


class Row(NamedTuple):
    """One line of a forest plot: a difference, and what it shows."""

    label: str
    difference: Estimate
    verdict: str


class Forest(NamedTuple):
    """One panel of a forest plot. `good`: 1 where a difference above 0 is better, -1 where one below is."""

    title: str
    unit: str
    good: int
    rows: Sequence[Row]
    share: bool = True

    def estimates(self) -> list[Estimate]:
        return [row.difference for row in self.rows if not math.isnan(row.difference.value)]

    def bounds(self) -> list[tuple[float, float, float]]:
        """Value, lower and upper bound of each difference as drawn."""
        scale = 100.0 if self.share else 1.0
        return [(scale * e.value, scale * e.low, scale * e.high) for e in self.estimates()]


def curves(panels: Sequence[Sequence[Panel]], title: str, caption: str, intervals: bool = True) -> bytes:
    """Lines by iteration, side by side with their `intervals`; panels of one unit have one scale."""
    figure = _figure(1.0 + 3.0 * len(panels), title, caption)
    grid = figure.subplots(len(panels), max(map(len, panels)), squeeze=False)
    ends: list[tuple[Axes, list[tuple[str, str, float, float]]]] = []
    for line, of_line in zip(panels, grid, strict=True):
        for axes in of_line[len(line) :]:
            axes.set_visible(False)
        for panel, axes in zip(line, of_line, strict=False):
            ends.append((axes, _curves(axes, panel, intervals)))
    for line, of_line in zip(panels, grid, strict=True):
        for unit in {panel.unit for panel in line}:
            _one_scale([axes for panel, axes in zip(line, of_line, strict=False) if panel.unit == unit])
    figure.draw_without_rendering()
    for axes, labels in ends:
        _label_ends(axes, labels)
    return _png(figure)


def _one_scale(several: Sequence[Axes]) -> None:
    limits = [axes.get_ylim() for axes in several]
    for axes in several:
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def _curves(axes: Axes, panel: Panel, intervals: bool) -> list[tuple[str, str, float, float]]:
    scale, last = (100.0 if panel.share else 1.0), 1
    labels: list[tuple[str, str, float, float]] = []
    inside: list[float] = []  # the frame: two seeds have intervals of 13 standard errors to either side
    for place, (name, estimates) in enumerate(panel.lines.items()):
        colour, marker = STYLES.get(name, (BLACK, "*"))
        points = [(t, e) for t, e in enumerate(estimates) if e is not None]
        if not points:
            continue
        last = max(last, points[-1][0])
        aside = 0.05 * (place - (len(panel.lines) - 1) / 2) if intervals else 0.0
        x = [t + aside for t, _ in points]
        inside += [scale * x for _, e in points for x in (e[:3] if intervals and e.seeds > 2 else e[:1])]
        if intervals:
            low, high = ([scale * e[bound] for _, e in points] for bound in (1, 2))
            axes.vlines(x, low, high, color=colour, linewidth=1.8, alpha=0.55)
        y = [scale * e.value for _, e in points]
        axes.plot(x, y, color=colour, marker=marker, markersize=5.5, linewidth=1.6, zorder=3)
        labels.append((name, colour, x[-1], y[-1]))
    _tidy(axes, panel.title, panel.unit)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    if inside:
        margin = 0.06 * (max(inside) - min(inside)) or 1.0
        axes.set_ylim(min(inside) - margin, max(inside) + margin)
    axes.set_xticks(range(last + 1), [f"M$_{t}$" for t in range(last + 1)])
    axes.set_xlim(-0.08 * last, 1.06 * last)
    return labels


def forest(panels: Sequence[Sequence[Forest]], title: str, caption: str) -> bytes:
    """Differences with their intervals, one row each; the panels of a row have the same labels."""
    return _png(forest_figure(panels, title, caption))


def forest_figure(panels: Sequence[Sequence[Forest]], title: str, caption: str) -> Figure:
    """As `forest`, not yet written. The frame reaches to `REACH` times the largest difference of its column: a wide
    interval goes on outside, and the caption says so."""
    heights = [0.75 + 0.3 * len(line[0].rows) for line in panels]
    bounds = [
        [of_row for line in panels for panel in line[number : number + 1] for of_row in panel.bounds()]
        for number in range(max(map(len, panels)))
    ]
    reaches = [REACH * max((abs(value) for value, _, _ in of if value), default=math.inf) for of in bounds]
    if any(max(abs(low), abs(high)) > reach for of, reach in zip(bounds, reaches, strict=True) for _, low, high in of):
        caption += " Lines that meet the frame go on."
    figure = _figure(1.15 + sum(heights), title, caption)
    grid = figure.subplots(len(panels), max(map(len, panels)), squeeze=False, height_ratios=heights)
    for line, of_line in zip(panels, grid, strict=True):
        for axes in of_line[len(line) :]:
            axes.set_visible(False)
        for number, (panel, axes) in enumerate(zip(line, of_line, strict=False)):
            _forest(axes, panel, labels=number == 0)
    for column, reach in zip(grid.T, reaches, strict=True):  # the same scale from row to row
        limits = [axes.get_xlim() for axes in column if axes.get_visible()]
        for axes in column:
            axes.set_xlim(max(min(low for low, _ in limits), -reach), min(max(high for _, high in limits), reach))
    return figure


def _forest(axes: Axes, panel: Forest, labels: bool) -> None:
    scale = 100.0 if panel.share else 1.0
    for place, row in enumerate(panel.rows):
        value, low, high = (scale * x for x in row.difference[:3])
        if math.isnan(value):
            continue
        colour = {"better": BETTER, "worse": WORSE}.get(row.verdict, NEITHER)
        shown = row.verdict in ("better", "worse")
        axes.plot([low, high], [place, place], color=colour, linewidth=2.2, solid_capstyle="butt")
        face = colour if shown else "white"
        axes.plot(value, place, marker="o", markersize=6.5, color=colour, markerfacecolor=face, markeredgewidth=1.6)
    axes.axvline(0, color=INK, linewidth=0.9, zorder=0)
    _tidy(axes, panel.title, "")
    axes.set_ylim(len(panel.rows) - 0.4, -0.6)
    axes.set_yticks(range(len(panel.rows)), [row.label for row in panel.rows] if labels else [])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(f"{panel.unit} (better {'→' if panel.good > 0 else '←'})", fontsize=10, color=MUTED)


def shift(panels: Sequence[tuple[str, Sequence[tuple[str, Estimate, Estimate]]]], title: str, caption: str) -> bytes:
    """Two estimates of each name, filled for the first kind of problem and hollow for the second; shares."""
    most = max(len(rows) for _, rows in panels)
    figure = _figure(1.45 + 0.4 * most, title, caption)
    names = list(dict.fromkeys(name for _, rows in panels for name, _, _ in rows))
    for number, ((name, rows), axes) in enumerate(
        zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True)
    ):
        for label, *pair in rows:
            place = names.index(label)
            colour, _ = STYLES.get(label, (BLACK, ""))
            for estimate, face, aside in zip(pair, (colour, "white"), (-0.13, 0.13), strict=True):
                beside = place + aside
                axes.plot([100 * estimate.low, 100 * estimate.high], [beside, beside], color=colour, linewidth=2.2)
                axes.plot(
                    100 * estimate.value, beside, marker="o", markersize=7.5, color=colour, markerfacecolor=face,
                    markeredgewidth=1.6, zorder=3,
                )  # fmt: skip
        _tidy(axes, name, "")
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_yticks(range(len(names)), names if number == 0 else [])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel("Pass@1, %", fontsize=10, color=MUTED)
    return _png(figure)


def _figure(height: float, title: str, caption: str) -> Figure:
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
    figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.08, wspace=0.05)
    figure.suptitle(title, fontsize=13, color=INK, fontweight="bold", x=0.01, ha="left")
    figure.supxlabel(caption, fontsize=10, color=MUTED, x=0.01, ha="left")
    return figure


def _tidy(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_ylabel(unit, fontsize=10, color=MUTED)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=INK, labelsize=10)


def _label_ends(axes: Axes, ends: Sequence[tuple[str, str, float, float]]) -> None:
    """The names of lines to the right of their last points, none on another."""
    inverse = axes.transAxes.inverted()
    wanted = [inverse.transform(axes.transData.transform((x, y)))[1] for _, _, x, y in ends]
    for (text, colour, x, y), place in zip(ends, _apart(wanted, 0.085), strict=True):
        axes.annotate(
            text, (x, y), xytext=(1.03, place), textcoords="axes fraction", va="center", fontsize=10, color=colour,
            arrowprops={
                "arrowstyle": "-", "color": colour, "linewidth": 0.7, "alpha": 0.6, "shrinkA": 1, "shrinkB": 4,
                "relpos": (0, 0.5),
            },
        )  # fmt: skip


def _apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions at least `gap` apart in the order of the wanted ones: those too close spread around their middle."""
    groups: list[list[int]] = []  # of indices, from below
    for index in sorted(range(len(wanted)), key=lambda n: wanted[n]):
        groups.append([index])
        while len(groups) > 1 and _middle(groups[-1], wanted) - _middle(groups[-2], wanted) < gap * (
            (len(groups[-1]) + len(groups[-2])) / 2
        ):
            last = groups.pop()
            groups[-1] += last
    placed = list(wanted)
    for group in groups:
        for rank, index in enumerate(group):
            placed[index] = _middle(group, wanted) + gap * (rank - (len(group) - 1) / 2)
    return placed


def _middle(group: Sequence[int], wanted: Sequence[float]) -> float:
    return sum(wanted[n] for n in group) / len(group)


def _png(figure: Figure) -> bytes:
    """With a palette, a third of the bytes, and without a date: the same data give the same file."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    image = Image.open(drawn).convert("RGB").quantize(128, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    image.save(small, format="png", optimize=True)
    return small.getvalue()
