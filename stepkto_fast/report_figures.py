"""The figures of the run report: inline SVG that takes colours and type from the page's CSS classes.

Coordinates are SVG user units. Every text passes through markupsafe, so a label can come from anywhere.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

Point = tuple[float, float]
LABEL_GAP = 15.0  # smallest distance of two stacked labels: one line of the largest text the page uses


@dataclass(frozen=True)
class Trace:
    """A directly labelled line of a training figure: for each iteration its (optimizer step, value) points."""

    label: str
    style: str
    segments: Sequence[Sequence[Point]]


def model(iteration: int) -> str:
    """The name of an iteration's model with subscript digits, as in M₀."""
    return "M" + str(iteration).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))


def _tag(name: str, *children: Markup | str, **attributes: object) -> Markup:
    written = []
    for key, value in attributes.items():
        text = f"{value:.1f}" if isinstance(value, float) else str(value)
        written.append(Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), text))
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), Markup("").join(written), Markup("").join(children))


def _svg(width: float, height: float, label: str, children: Sequence[Markup]) -> Markup:
    kind = "narrow" if width < 300 else "broad"
    return _tag("svg", *children, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=label, class_=kind)


def _text(x: float, y: float, text: str, style: str = "", anchor: str = "middle") -> Markup:
    return _tag("text", escape(text), x=x, y=y, class_=style, text_anchor=anchor)


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> Markup:
    return _tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=style)


def _path(points: Sequence[Point], style: str, close: bool = False) -> Markup:
    if len(points) == 1:  # with no length at all it would not be drawn; its round caps make it a dot
        points = [*points, *points]
    d = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points) + ("Z" if close else "")
    return _tag("path", d=d, class_=style)


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    if high <= low:  # one value: room around it
        low, high = low - max(abs(low), 1.0) / 2, low + max(abs(low), 1.0) / 2
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= raw * 0.999)
    return [k * step for k in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _apart(wanted: Sequence[float], low: float, high: float) -> list[float]:
    """Positions near the wanted ones, in their order, at least LABEL_GAP apart where [low, high] has the room."""
    placed = [0.0] * len(wanted)
    floor = low
    for index in sorted(range(len(wanted)), key=lambda i: wanted[i]):
        placed[index] = max(wanted[index], floor)
        floor = placed[index] + LABEL_GAP
    ceiling = high
    for index in sorted(range(len(wanted)), key=lambda i: -placed[i]):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - LABEL_GAP
    return placed


def by_iteration(
    name: str,
    iterations: Sequence[int],
    values: Sequence[float | None],
    form: Callable[[float], str],
    *,
    top: float | None = None,
    intervals: Sequence[tuple[float, float] | None] | None = None,
) -> Markup:
    """One quantity by iteration: M_0 hollow with its level carried across, the last model filled.

    `form` writes a value with its unit. The axis runs from 0, or a round number below values under 0, to `top` or a
    round number above the values.
    `intervals` are drawn as whiskers. Undefined values (None) leave a gap.
    """
    known = [v for v in values if v is not None]
    ticks = _ticks(min([0.0, *known]), top if top is not None else max([*known, 0.01]), 2)
    left, right, upper, lower = 38.0, 226.0, 24.0, 142.0
    span = right - left - 30
    xs = [left + 18 + (span * i / (len(values) - 1) if len(values) > 1 else span / 2) for i in range(len(values))]

    def y(value: float) -> float:
        return lower - (lower - upper) * (value - ticks[0]) / (ticks[-1] - ticks[0])

    parts = []
    for tick in ticks:
        parts.append(_line(left, y(tick), right, y(tick), "grid"))
        parts.append(_text(left - 5, y(tick) + 4, form(tick), "tick", "end"))
    if len(values) > 1 and values[0] is not None:
        parts.append(_line(xs[0], y(values[0]), right, y(values[0]), "start-level"))
    run: list[Point] = []
    for x, value in [*zip(xs, values, strict=True), (0.0, None)]:
        if value is not None:
            run.append((x, y(value)))
        elif run:
            parts.append(_path(run, "line accent"))
            run = []
    for index, (x, value) in enumerate(zip(xs, values, strict=True)):
        last = index == len(values) - 1
        if index in (0, len(values) - 1) or len(values) <= 6:
            parts.append(_text(x, lower + 17, model(iterations[index]), "model strong" if last else "model"))
        if value is None:
            parts.append(_text(x, lower - 6, "undefined", "tick"))
            continue
        label_y = y(value) - 9
        if intervals is not None and (interval := intervals[index]) is not None:
            parts.append(_line(x, y(interval[0]), x, y(interval[1]), "whisker"))
            label_y = y(interval[1]) - 5
        style = "dot start" if index == 0 else "dot end" if last else "dot"
        title = _tag("title", escape(f"{model(iterations[index])}: {form(value)}"))
        parts.append(_tag("circle", title, cx=x, cy=y(value), r=4.5 if index == 0 or last else 3.2, class_=style))
        if index in (0, len(values) - 1) or len(values) <= 5:
            parts.append(_text(x, label_y, form(value), "value strong" if last else "value"))
    said = ", ".join(
        f"{model(t)} {'undefined' if v is None else form(v)}" for t, v in zip(iterations, values, strict=True)
    )
    return _svg(240, 166, f"{name} by iteration: {said}", parts)


def training(
    name: str, iterations: Sequence[int], traces: Sequence[Trace], *, band: tuple[int, int] | None = None
) -> Markup:
    """Lines over optimizer steps: raw values faint, a moving mean of each iteration strong, iterations shaded.

    `band` names two traces by index; the gap between their means is tinted. Every trace has one segment for each of
    `iterations`; empty segments are allowed, but not in all traces at once.
    """
    width, height, left, right, upper, lower = 500.0, 236.0, 44.0, 422.0, 30.0, 198.0
    raw = [point for trace in traces for segment in trace.segments for point in segment]
    first, last = min(x for x, _ in raw), max(x for x, _ in raw)
    begin, end = first - 0.5, last + 0.5
    ticks = _ticks(min(v for _, v in raw), max(v for _, v in raw))

    def at(point: Point) -> Point:
        x = left + (right - left) * (point[0] - begin) / (end - begin)
        return x, lower - (lower - upper) * (point[1] - ticks[0]) / (ticks[-1] - ticks[0])

    parts = []
    for number, iteration in enumerate(iterations):
        steps = [x for trace in traces for x, _ in trace.segments[number]]
        if not steps:
            continue
        x0, x1 = at((min(steps) - 0.5, 0))[0], at((max(steps) + 0.5, 0))[0]
        if number % 2 == 0:
            parts.append(_tag("rect", x=x0, y=upper, width=x1 - x0, height=lower - upper, class_="shade"))
        text = f"{model(iteration)} → {model(iteration + 1)}"
        if x1 - x0 < 72:  # the arrow needs its room
            text = model(iteration) if x1 - x0 > 24 else ""
        parts.append(_text((x0 + x1) / 2, upper - 9, text, "model"))
    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    for tick in ticks:
        level = at((first, tick))[1]
        parts.append(_line(left, level, right, level, "axis" if abs(tick) < 1e-12 else "grid"))
        parts.append(_text(left - 6, level + 4, f"{tick:.{digits}f}".replace("-", "\u2212"), "tick", "end"))
    for tick in _ticks(first, last):
        if first <= tick <= last and abs(tick - round(tick)) < 1e-6:
            parts.append(_text(at((tick, 0))[0], lower + 17, f"{tick:g}", "tick"))
    parts.append(_text((left + right) / 2, lower + 34, "optimizer step", "tick"))

    means = [[[at(p) for p in _moving_mean(segment)] for segment in trace.segments] for trace in traces]
    if band is not None:
        for one, other in zip(means[band[0]], means[band[1]], strict=True):
            if one and other:
                parts.append(_path([*one, *reversed(other)], "band", close=True))
    for trace, lines in zip(traces, means, strict=True):
        for segment, mean in zip(trace.segments, lines, strict=True):
            if segment:
                parts.append(_path([at(p) for p in _thinned(segment)], f"line raw {trace.style}"))
                parts.append(_path(mean, f"line {trace.style}"))
    drawn = [
        (trace, [p for line in lines for p in line][-1])
        for trace, lines in zip(traces, means, strict=True)
        if any(lines)
    ]
    for (trace, end_point), label_y in zip(drawn, _apart([p[1] for _, p in drawn], upper, lower), strict=True):
        parts.append(_text(end_point[0] + 6, label_y + 4, trace.label, f"direct {trace.style}", "start"))
    return _svg(width, height, f"{name} over optimizer steps {first:g} to {last:g}", parts)


def _thinned(points: Sequence[Point], most: int = 240) -> list[Point]:
    size = max(1, math.ceil(len(points) / most))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(v for _, v in g) / len(g)) for g in groups]


def _moving_mean(points: Sequence[Point]) -> list[Point]:
    points = _thinned(points)
    reach = len(points) // 12
    windows = [points[max(0, i - reach) : i + reach + 1] for i in range(len(points))]
    return [(p[0], sum(v for _, v in w) / len(w)) for p, w in zip(points, windows, strict=True)]


def reliability(name: str, bins: Sequence[tuple[float, float, float]]) -> Markup:
    """A reliability diagram of (mean probability, share right, count) bins; a dot's area is its count."""
    left, right, upper, lower = 38.0, 226.0, 12.0, 200.0
    most = max([count for _, _, count in bins], default=1.0)

    def at(p: float, share: float) -> Point:
        return left + (right - left) * p, lower - (lower - upper) * share

    parts = []
    for tick in (0.0, 0.5, 1.0):
        (x, _), (_, level) = at(tick, 0), at(0, tick)
        parts += [_line(left, level, right, level, "grid"), _line(x, upper, x, lower, "grid")]
        parts += [
            _text(left - 6, level + 4, f"{tick:g}", "tick", "end"),
            _text(x, lower + 17, f"{tick:g}", "tick"),
        ]
    parts.append(_path([at(0, 0), at(1, 1)], "start-level"))
    for p, share, count in bins:
        (x, y), (_, ideal) = at(p, share), at(p, p)
        parts.append(_line(x, y, x, ideal, "residual"))
        title = _tag("title", escape(f"said {p:.2f}, right {share:.2f}, {count:,.0f} steps"))
        radius = 2.0 + 9.0 * math.sqrt(count / most)
        parts.append(_tag("circle", title, cx=x, cy=y, r=radius, class_="bubble"))
    parts.append(_text((left + right) / 2, lower + 34, "probability the head gives", "tick"))
    turned = f"translate(10 {(upper + lower) / 2:g}) rotate(-90)"
    parts.append(_tag("text", "share really right", class_="tick", text_anchor="middle", transform=turned))
    return _svg(240, 240, f"Reliability of the PRM head on {name}, {len(bins)} bins", parts)


def flow(iterations: Sequence[int], states: Sequence[Sequence[str]], order: Sequence[str]) -> Markup:
    """How problems move between states from model to model; ribbons are coloured by the state they leave.

    `states[m][k]` is the state of problem k under the model of `iterations[m]`, one of `order` (top to bottom).
    """
    left, right, upper, room, gap, bar = 84.0, 456.0, 28.0, 236.0, 8.0, 12.0
    total = len(states[0])
    unit = (room - gap * (len(order) - 1)) / total
    xs = [left + (right - left - bar) * m / (len(states) - 1) for m in range(len(states))]
    tops: list[dict[str, float]] = []
    for column in states:
        counts, level, top = Counter(column), upper, {}
        for state in order:
            top[state] = level
            level += counts[state] * unit + (gap if counts[state] else 0.0)
        tops.append(top)

    parts = []
    for m in range(len(states) - 1):
        moves = Counter(zip(states[m], states[m + 1], strict=True))
        leaving, arriving = dict(tops[m]), dict(tops[m + 1])
        x0, x1 = xs[m] + bar, xs[m + 1]
        middle = (x0 + x1) / 2
        for source in order:
            for target in order:
                if not (count := moves[source, target]):
                    continue
                a, b, thick = leaving[source], arriving[target], count * unit
                leaving[source], arriving[target] = a + thick, b + thick
                d = (
                    f"M{x0:.1f},{a:.1f}C{middle:.1f},{a:.1f} {middle:.1f},{b:.1f} {x1:.1f},{b:.1f}"
                    f"V{b + thick:.1f}C{middle:.1f},{b + thick:.1f} {middle:.1f},{a + thick:.1f} "
                    f"{x0:.1f},{a + thick:.1f}Z"
                )
                names = f"{model(iterations[m])} {source} → {model(iterations[m + 1])} {target}: {count} of {total}"
                parts.append(_tag("path", _tag("title", escape(names)), d=d, class_=f"ribbon {source}"))
    for m, column in enumerate(states):
        counts = Counter(column)
        ends = m in (0, len(states) - 1)
        parts.append(_text(xs[m] + bar / 2, upper - 11, model(iterations[m]), "model strong" if ends else "model"))
        present = [state for state in order if counts[state]]
        for state in present:
            high = counts[state] * unit
            parts.append(_tag("rect", x=xs[m], y=tops[m][state], width=bar, height=high, class_=f"bar {state}"))
        if ends:
            wanted = [tops[m][state] + counts[state] * unit / 2 for state in present]
            x, anchor = (xs[m] - 8, "end") if m == 0 else (xs[m] + bar + 8, "start")
            for state, y in zip(present, _apart(wanted, upper + 5, upper + room - 5), strict=True):
                parts.append(_text(x, y + 4, f"{counts[state]} {state}", f"direct {state}", anchor))
    return _svg(540, 276, f"How {total} problems move between {', '.join(order)} from model to model", parts)


def dumbbell(first: float, last: float) -> Markup:
    """Two rates on a track from 0 to 1: the first hollow, the last filled."""
    x0, x1 = 8 + 224 * first, 8 + 224 * last
    return _tag(
        "svg",
        _line(8, 9, 232, 9, "axis track"),
        _line(x0, 9, x1, 9, "move"),
        _tag("circle", cx=x0, cy=9, r=5, class_="dot start"),
        _tag("circle", cx=x1, cy=9, r=6, class_="dot end"),
        viewBox="0 0 240 18",
        aria_hidden="true",
        class_="dumbbell",
    )
