"""The report's figures. Each needs rows alone; `pictures` says which there are without drawing any."""

import io
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from gpu_figures import BARE, INK, MUTED, OURS, PEER
from report_rows import (
    BOTH,
    RIVALS,
    Rows,
    chief_groups,
    chief_of,
    chief_shape,
    digits,
    is_chief,
    of_bare,
    ratio,
    size,
    times_best_rival,
    tokens_per_s,
    without_quick,
)

SLOWER = "#c2571a"
SOFT = "#9fd0bb"  # ours, but not the row that stands for it
# Colour, marker and line each tell them apart, so that any one of them is enough.
STYLES = [
    (INK, "s", "--"), (SLOWER, "D", ":"), (MUTED, "v", (0, (6, 2))), ("#8e6bb8", "P", "-"), (INK, "X", ":"),
    (MUTED, "*", "-."),
]  # fmt: skip
AXES = {"n": "N, tokens", "v": "V, vocabulary", "d": "D, hidden size"}
WIDTH, DPI = 10.0, 130


def new_figure(height: float, title: str, caption: str = ""):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
    figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.06, wspace=0.04)
    figure.suptitle(title, fontsize=13, color=INK, fontweight="bold", x=0.01, ha="left")
    if caption:
        figure.supxlabel(caption, fontsize=10, color=MUTED, x=0.01, ha="left")
    return figure


def tidy(axes, title: str = "") -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=INK, labelsize=10, which="both")


def png(figure) -> bytes:
    """With a palette of 64 colours, a third of the bytes, and without a date: the same data give the same file."""
    from PIL import Image

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    image = Image.open(drawn).convert("RGB").quantize(64, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    image.save(small, format="png", optimize=True)
    return small.getvalue()


def apart(wanted: Sequence[float], gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """Positions near the wanted ones, in their order, at least `gap` apart where there is room."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    placed, floor, ceiling = list(wanted), low, high
    for index in order:
        placed[index] = max(wanted[index], floor)
        floor = placed[index] + gap
    for index in reversed(order):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - gap
    return placed


def label_ends(axes, ends: Sequence[tuple[str, str, float, float]], gap: float) -> None:
    """(text, colour, x, y) of each line's last point: labels to the right of the axes, none on another."""
    inverse = axes.transAxes.inverted()
    wanted = [inverse.transform(axes.transData.transform((x, y)))[1] for _, _, x, y in ends]
    for (text, colour, x, y), place in zip(ends, apart(wanted, gap), strict=True):
        axes.annotate(
            text, (x, y), xytext=(1.04, place), textcoords="axes fraction", va="center", fontsize=10, color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.5, "shrinkA": 2, "shrinkB": 4},
        )  # fmt: skip


def plain(axis) -> None:
    """Few tick labels, as one would say them: 0.1 and 4,096, not powers."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value < 1e3 else f"{value:,.0f}"))
    axis.set_minor_formatter(NullFormatter())


def bars(places: dict[tuple, Rows], what: str):
    """Forward and backward by provider, a panel for each shape and dtype."""
    columns = min(2, len(places))
    panels = list(places.items())
    lines = [panels[at : at + columns] for at in range(0, len(panels), columns)]
    tallest = [max(len(group) for _, group in line) for line in lines]
    heights = [0.55 + 0.4 * count for count in tallest]
    inputs = panels[0][1][0].get("inputs", "")
    caption = f"Medians, {inputs} inputs; x: time of the fastest peer over ours. Blue: the matrix products alone."
    figure = new_figure(0.9 + sum(heights), f"Forward and backward of {what}", caption)
    grid = figure.subplots(len(lines), columns, squeeze=False, height_ratios=heights)
    for line, axes_of_line, count in zip(lines, grid, tallest, strict=True):
        for axes in axes_of_line[len(line) :]:
            axes.set_visible(False)
        for ((_, dtype), group), axes in zip(line, axes_of_line, strict=False):
            panel(axes, group, f"{size(group[0])}, {dtype}")
            axes.set_ylim(len(group) - count - 0.6, len(group) - 0.4)  # as thick bars as in the panel beside it
    return figure


def panel(axes, group: Rows, title: str) -> None:
    """One group's bars, the fastest on top."""
    here, chief = sorted(group, key=lambda row: -row["ms"]), chief_of(group)
    for index, row in enumerate(here):
        colour = {"ours": OURS if row is chief else SOFT, "bare": BARE}.get(row["role"], PEER)
        axes.barh(index, row["ms"], color=colour, height=0.72)
        times = times_best_rival(row, group) if row is chief else None
        text = f" {digits(row['ms'])} ms" + (f", {digits(times)}x the best peer" if times else "")
        axes.text(row["ms"], index, text, va="center", fontsize=10, color=INK, fontweight=weight(row is chief))
    names = ["\n".join(textwrap.wrap(row["provider"], 27, break_on_hyphens=False)) for row in here]
    axes.set_yticks(range(len(here)), names)
    for label, row in zip(axes.get_yticklabels(), here, strict=True):
        label.set_fontweight(weight(row is chief))
    axes.set_xlim(0, 1.4 * here[0]["ms"])
    bare_axes(axes, title)
    axes.tick_params(labelsize=9.5)


def weight(bold: bool) -> str:
    return "bold" if bold else "normal"


def bare_axes(axes, title: str) -> None:
    """For bars that carry their numbers."""
    tidy(axes, title)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(left=False)


def entropy_levels(group: Rows) -> list[tuple[str, float, Rows, dict]]:
    """(family of inputs, mean entropy, the level's rows, ours), by entropy. Families may differ in their shapes."""
    levels = ((rows, chief_of(rows)) for rows in group.groups("shape", "inputs").values())
    known = ((rows, ours) for rows, ours in levels if ours and "entropy" in ours and "inputs" in ours)
    found = [(ours["inputs"].split()[0], ours["entropy"], rows, ours) for rows, ours in known]
    return sorted(found, key=lambda level: level[1])


def entropy(group: Rows, title: str):
    """rho above, the speed-up below, over the mean entropy."""
    figure = new_figure(7.6, title)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.25))
    levels = entropy_levels(group)
    quantities = (
        (above, "", OURS, lambda rows, ours: ours.get("rho")),
        (below, "best peer", OURS, lambda rows, ours: times_best_rival(ours, rows)),
        (below, "bare products", BARE, lambda rows, ours: ratio(1, of_bare(ours, rows))),
    )
    lines: list[tuple[Any, str, str, list]] = []
    for axes, what, colour, value in quantities:
        for name in dict.fromkeys(level[0] for level in levels):
            points = [(x, value(rows, ours)) for kind, x, rows, ours in levels if kind == name]
            points = [(x, y) for x, y in points if y]  # a log axis has no 0
            if points:
                marker, line = {"real": ("s", "--"), "flat": ("D", "")}.get(name, ("o", "-"))
                face = "white" if name == "real" else colour
                axes.plot(
                    *zip(*points, strict=True), color=colour, marker=marker, linestyle=line, linewidth=2, markersize=6,
                    markerfacecolor=face,
                )  # fmt: skip
                lines.append((axes, f"{what + ', ' if what else ''}{name}", colour, points))
    for axes in (above, below):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.grid(axis="y", color=PEER, linewidth=0.5, alpha=0.5)
        plain(axes.yaxis)
        axes.margins(y=0.12)
    figure.draw_without_rendering()  # limits, before labels take their places from them
    for axes in (above, below):
        ends = [(text, colour, *points[-1]) for own, text, colour, points in lines if own is axes]
        ends = [(f"{text}: {digits(y)}" if "flat" in text else text, colour, x, y) for text, colour, x, y in ends]
        label_ends(axes, ends, 0.09 if axes is above else 0.075)
    tidy(above, "rho: share of (token, vocabulary tile) pairs that the backward visits")
    tidy(below, "times as fast as the best peer (green) and as the bare products (blue)")
    below.axhline(1, color=INK, linewidth=1)
    below.set_yticks([t for t in (0.25, 0.5, 1, 2, 3, 5, 10) if below.get_ylim()[0] <= t <= below.get_ylim()[1]])
    below.set_xlabel("mean entropy of the next token, nats", color=INK, fontsize=10)
    plain(below.xaxis)
    return figure


def styles(rows: Rows) -> dict[str, tuple]:
    """Each provider's colour, marker and line."""
    chief = chief_of(rows)
    others = iter(STYLES * (1 + len(rows) // len(STYLES)))
    found = {}
    for row in rows:
        if row["provider"] not in found:
            own = (OURS, "o", "-") if chief and row["provider"] == chief["provider"] else None
            found[row["provider"]] = own or ((BARE, "^", "-.") if row["role"] == "bare" else next(others))
    return found


def scaling(everyone: Rows, key: str, unit: str, title: str):
    """Time or memory over N, V and D on log-log axes; the labels stand beside the last panel that has the line."""
    rows = Rows(row for row in everyone if row.get(key))
    panels = {axis: group for axis in AXES if (group := rows.where(axis=axis))}
    usual = Rows(row for row in rows if row["axis"] != "n")[:1] + Rows(row for row in rows if row["axis"] == "n")[:1]
    sizes = {axis: row[axis] for row in usual for axis in AXES if axis != row["axis"] and axis in row}
    caption = ", ".join(f"{axis.upper()} {sizes[axis]:,}" for axis in AXES if axis in sizes)
    figure = new_figure(4.3, title, f"What does not vary: {caption}; {rows[0].get('inputs', '')} inputs")
    named = styles(everyone)
    last = {name: axis for axis, group in panels.items() for name in group.values("provider")}
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    ends: dict[str, list] = {axis: [] for axis in panels}
    for (axis, group), axes in zip(panels.items(), grid, strict=True):
        for name, line in group.groups("provider").items():
            points = sorted((row["value"], row[key]) for row in line)
            colour, marker, dash = named[name[0]]
            axes.plot(
                *zip(*points, strict=True), color=colour, marker=marker, linestyle=dash, markersize=6,
                linewidth=2.5 if colour == OURS else 1.5,
            )  # fmt: skip
            if last[name[0]] == axis:
                ends[axis].append((name[0], colour, *points[-1]))
        axes.set_xscale("log")
        axes.set_yscale("log")
        tidy(axes, f"over {AXES[axis]}")
        axes.grid(axis="y", color=PEER, linewidth=0.5, alpha=0.5)
        ticks = sorted(group.values("value"))
        axes.set_xticks(ticks[:: -(-len(ticks) // 4)])
        axes.tick_params(axis="x", which="minor", bottom=False)
        plain(axes.xaxis)
        plain(axes.yaxis)
    grid[0].set_ylabel(unit, color=INK, fontsize=10)
    figure.draw_without_rendering()
    for axis, axes in zip(panels, grid, strict=True):
        label_ends(axes, ends[axis], 0.085)
    return figure


def speeds(groups: dict[tuple, Rows], title: str):
    """Bars of training tokens/s, a panel for each shape and dtype."""
    heights = [0.6 + 0.4 * len(group) for group in groups.values()]
    figure = new_figure(0.5 + sum(heights), title)
    grid = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for (place, group), axes in zip(groups.items(), grid, strict=True):
        here = sorted(group, key=lambda row: tokens_per_s(row) or 0.0)
        most = max((tokens_per_s(row) or 0.0 for row in group.roles(*RIVALS)), default=0.0)
        for index, row in enumerate(here):
            chief = is_chief(row)
            colour = OURS if chief else {"ours": SOFT, "bare": BARE}.get(row["role"], PEER)
            length = tokens_per_s(row) or 0.0
            axes.barh(index, length, color=colour, height=0.7)
            times = f", {digits(length / most)}x the best peer" if chief and most else ""
            axes.text(length, index, f" {digits(length)}{times}", va="center", fontsize=10, color=INK)
        axes.set_yticks(range(len(here)), [row["provider"] for row in here])
        axes.set_xlim(0, 1.38 * (tokens_per_s(here[-1]) or 1.0))
        bare_axes(axes, ", ".join(filter(None, place)))
    return figure


def factors(group: Rows, title: str):
    """What each feature is worth: from all of them down to none, the factor of each on a log axis."""
    from matplotlib.ticker import LogLocator

    figure = new_figure(1.3 + 0.42 * len(group), title)
    axes = figure.add_subplot()
    found = [tokens_per_s(row) or math.nan for row in group]
    low = 0.7 * min(found)
    for index, here in enumerate(found):
        before = found[index - 1] if index else low
        colour = OURS if not index else SLOWER if here > before else PEER
        axes.barh(index, abs(here - before), left=min(here, before), color=colour, height=0.72)
        text = f"{digits(here)} tokens/s" if not index else f"{digits(before / here)}x"
        axes.text(max(here, before), index, f" {text}", va="center", fontsize=10, color=INK)
        if index + 1 < len(found):
            axes.plot([here, here], [index - 0.36, index + 1.36], color=MUTED, linewidth=0.8)
        if index and index + 1 == len(found):
            axes.text(here, index, f"{digits(here)} ", va="center", ha="right", fontsize=10, color=INK)
    axes.set_yticks(range(len(group)), [row["provider"] for row in group])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(low, 1.6 * max(found))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    tidy(axes)
    axes.tick_params(left=False)
    plain(axes.xaxis)
    axes.set_xlabel("training tokens/s", color=INK, fontsize=10)
    return figure


def slug(*parts: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", "-".join(filter(None, parts)).lower()).strip("-")


def pictures(rows: Rows) -> dict[str, Callable]:
    """By name, what draws each figure that these rows have something for."""
    found: dict[str, Callable] = {}
    for suite, what in (("head", "the LM head (linear_logp)"), ("objective", "head and loss (linear_step_kto)")):
        places = chief_groups(rows, suite)
        if places:
            found[suite] = partial(bars, places, what)
            chief = {place: group for place, group in places.items() if place[0] == chief_shape(rows)}
            if suite == "head" and chief:
                found["readme"] = partial(bars, chief, what)
    for (dtype,), group in rows.where(suite="entropy", way=BOTH).groups("dtype").items():
        if len(entropy_levels(group)) > 1:
            found[slug("entropy", dtype)] = partial(entropy, group, f"What the entropy decides, {dtype}")
    for (dtype,), group in rows.where(suite="scaling").groups("dtype").items():
        group = Rows(row for row in group if "axis" in row and "value" in row)
        for name, key, unit, title in (
            ("time", "ms", "ms", f"Time of forward and backward, {dtype}"),
            ("memory", "peak_mb", "MB", f"Peak memory beyond inputs and gradients, {dtype}"),
        ):
            if any(row.get(key) for row in group):
                found[slug("scaling", name, dtype)] = partial(scaling, group, key, unit, title)
    groups = rows.where(suite="end_to_end").groups("shape", "dtype")
    groups = {place: group for place, group in groups.items() if any(tokens_per_s(row) for row in group)}
    if groups:
        found["end-to-end"] = partial(speeds, without_quick(groups), "Training from end to end, tokens/s")
    for (shape, dtype), group in without_quick(rows.where(suite="factors").groups("shape", "dtype")).items():
        group = Rows(row for row in group if tokens_per_s(row))
        if len(group) > 1:
            title = f"What each feature is worth, one after the other switched off ({shape}, {dtype})"
            found[slug("factors", shape, dtype)] = partial(factors, group, title)
    return found
