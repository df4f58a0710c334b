"""What a GPU run found: its table, its goals, its figures. Needs the JSON only; matplotlib for the figures."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

BOTH, FORWARD = "forward+backward", "forward"
INK, MUTED, OURS, PEER, BARE = "#1f2328", "#6e7781", "#1a7f5a", "#a8b1bd", "#3b6fb6"


def matching(data: dict, **wanted) -> list[dict]:
    wanted = {"status": "ok"} | {name.rstrip("_"): value for name, value in wanted.items()}
    return [item for item in data["items"] if all(item.get(name) == value for name, value in wanted.items())]


def time_of(data: dict, **wanted) -> float | None:
    found = matching(data, **wanted)
    return found[0]["median_ms"] if found else None


def is_peer(item: dict) -> bool:
    return not item["provider"].startswith(("ours", "bare", "large copy", "copy of"))


def groups(data: dict) -> list[tuple[str, str]]:
    return list(dict.fromkeys((item["shape"], item["inputs"]) for item in data["items"]))


def main_shape(data: dict) -> str | None:
    """trl where it was measured, else whatever has most."""
    heads = [item["shape"] for item in matching(data) if item["shape"] != "step_kto"]
    return "trl" if "trl" in heads else max(heads, key=heads.count, default=None)


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    return None if numerator is None or not denominator else numerator / denominator


def goals(data: dict) -> list[dict]:
    """Each with what was reached: the worst of the cases that count, all of which are named."""
    found = []

    def goal(
        text: str, cases: Iterable[tuple[str, float | None]], most: float | None = None, least: float | None = None
    ):
        measured = [(name, value) for name, value in cases if value is not None]
        values = [value for _, value in measured]
        met = bool(values) and (most is None or max(values) <= most) and (least is None or min(values) >= least)
        status = "not measured" if not values else "met" if met else "missed"
        found.append({"goal": text, "status": status, "found": {name: round(value, 4) for name, value in measured}})

    def times(shape: str, inputs: str, provider: str, which: str = BOTH) -> float | None:
        return time_of(data, shape=shape, inputs=inputs, provider=provider, pass_=which)

    trl = [inputs for shape, inputs in groups(data) if shape == "trl"]
    liger = [inputs for shape, inputs in groups(data) if shape == "liger"]
    goal(
        "linear_logp forward: at least 85 % of the bare product's rate (trl)",
        ((i, ratio(times("trl", i, "bare 2NDV", FORWARD), times("trl", i, "ours", FORWARD))) for i in trl),
        least=0.85,
    )
    sparse = [i for i in matching(data, shape="trl", provider="ours", pass_=BOTH) if i.get("rho", 1) <= 0.1]
    bare = times("trl", "flat", "bare 6NDV")
    goal(
        "forward and backward at rho <= 0.1: at most 0.55 of the bare 6NDV's time (trl)",
        ((f"{i['inputs']}, rho {i['rho']:.2f}", ratio(i["median_ms"], bare)) for i in sparse),
        most=0.55,
    )
    goal(
        "forward and backward: at least 2.5 times faster than TRL's function (trl)",
        ((i, ratio(times("trl", i, "TRL"), times("trl", i, "ours"))) for i in trl),
        least=2.5,
    )
    pairs = {
        "ours, linear_step_kto": ("Liger KTO", "Liger KTO, compiled"),
        "ours, linear_step_kto after the reference's linear_logp": (
            "Liger KTO with its reference",
            "Liger KTO with its reference, compiled",
        ),
    }
    goal(
        "linear_step_kto: at least 3 times faster than Liger's KTO loss (liger)",
        (
            (f"{i}, {theirs}", ratio(times("liger", i, theirs), times("liger", i, mine)))
            for i in liger
            for mine, both in pairs.items()
            for theirs in both
        ),
        least=3,
    )
    goal(
        "the exact backward: at most 1.25 of the bare 8NDV's time (trl)",
        ((i, ratio(times("trl", i, "ours, exact"), times("trl", i, "bare 8NDV"))) for i in trl),
        most=1.25,
    )
    copies = matching(data, shape="step_kto", provider="large copy")
    rate = copies[0]["gb_per_s"] if copies else None
    graphs = matching(data, shape="step_kto", provider="ours, as a CUDA graph")
    goal(
        "step_kto: within twice the time of its bytes, as a CUDA graph",
        (("tokens", i["median_ms"] * 1e6 * rate / i["bytes"] if rate else None) for i in graphs),
        most=2,
    )
    ours = [i for i in matching(data) if i["provider"].startswith("ours") and i.get("peak_share_bf16") is not None]
    goal(
        "peak memory beyond inputs and gradients: under 3 % of the bf16 logits (every shape)",
        ((f"{i['shape']}, {i['inputs']}, {i['provider']}, {i['pass']}", i["peak_share_bf16"]) for i in ours),
        most=0.03,
    )
    return found


def number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def group_lines(data: dict, shape: str, inputs: str) -> list[str]:
    items = matching(data, shape=shape, inputs=inputs)
    if not items:
        return []
    first = next((i for i in items if i.get("v")), items[0])
    size = f"({first['n']}, {first['d']}, {first['v']})" if "v" in first else f"{first['n']} tokens"
    entropy = number(first.get("entropy"), ", {:.2f} nats")
    lines = [f"{shape} {size}, {inputs}{entropy}"]
    lines.append(
        f"  {'':<40} {'fwd ms':>8} {'x2NDV':>6} {'both ms':>8} {'x6NDV':>6} {'rho':>5} {'block':>5} {'error':>7} "
        f"{'peak':>6}"
    )
    bare = {
        FORWARD: time_of(data, shape=shape, inputs=inputs, provider="bare 2NDV", pass_=FORWARD)
        or time_of(data, shape=shape, inputs="flat", provider="bare 2NDV", pass_=FORWARD),
        BOTH: time_of(data, shape=shape, inputs=inputs, provider="bare 6NDV", pass_=BOTH)
        or time_of(data, shape=shape, inputs="flat", provider="bare 6NDV", pass_=BOTH),
    }
    for name in dict.fromkeys(item["provider"] for item in items):
        cells: dict[str, Any] = {item["pass"]: item for item in items if item["provider"] == name}
        fwd, both = cells.get(FORWARD, {}).get("median_ms"), cells.get(BOTH, {}).get("median_ms")
        last = cells.get(BOTH) or cells[FORWARD]
        share = last.get("peak_share_bf16")
        lines.append(
            f"  {name[:40]:<40} {number(fwd, '{:.3f}'):>8} {number(ratio(fwd, bare[FORWARD]), '{:.2f}'):>6} "
            f"{number(both, '{:.3f}'):>8} {number(ratio(both, bare[BOTH]), '{:.2f}'):>6} "
            f"{number(last.get('rho'), '{:.2f}'):>5} {number(last.get('rho_blocks'), '{:.2f}'):>5} "
            f"{number(last.get('gradient_error'), '{:.1e}'):>7} "
            f"{number(share, '{:.1%}'):>6}".rstrip()
        )
    for which, mine in ((FORWARD, "ours"), (BOTH, "ours"), (BOTH, "ours, linear_step_kto")):
        kto = {"Liger KTO", "Liger KTO, compiled"}
        peers = [i for i in items if is_peer(i) and i["pass"] == which]
        peers = [i for i in peers if (i["provider"] in kto if "kto" in mine else "KTO" not in i["provider"])]
        if not peers:
            continue
        best = min(peers, key=lambda i: i["median_ms"])
        times = ratio(best["median_ms"], time_of(data, shape=shape, inputs=inputs, provider=mine, pass_=which))
        if times:
            lines.append(f"  {which}: {mine} is {times:.2f} times as fast as the strongest peer, {best['provider']}")
    return lines


def table(data: dict) -> str:
    """What matters most comes last: whoever sees only the end of a long output sees that."""
    lines = [f"{data['machine'].get('gpu')}, torch {data['machine'].get('torch')}, {data['machine'].get('date')}"]
    for shape, inputs in reversed(groups(data)):
        lines += group_lines(data, shape, inputs)
    failures: dict[tuple[str, str], list[str]] = {}
    for item in data["items"]:
        if item["status"] != "ok":
            where = f"{item['shape']}/{item['inputs']}/{item['pass']}"
            failures.setdefault((item["provider"], f"{item['status']}: {item['reason']}"), []).append(where)
    late = [where for (_, reason), places in failures.items() if reason.startswith("not reached") for where in places]
    for (who, reason), places in failures.items():
        if not reason.startswith("not reached"):
            lines.append(f"{who}: {reason[:110]} ({places[0]}{f' and {len(places) - 1} more' if places[1:] else ''})")
    if late:
        lines.append(
            f"not reached: {len(late)} items, in {', '.join(dict.fromkeys(w.rsplit('/', 1)[0] for w in late))}"
        )
    for goal in goals(data):
        cases = sorted(goal["found"].items(), key=lambda case: case[1])
        shown = cases if len(cases) < 4 else [cases[0], cases[-1]]
        numbers = "; ".join(f"{name}: {value:.3g}" for name, value in shown)
        lines.append(f"{goal['status'].upper():<12} {goal['goal']}{f' [{numbers}]' if numbers else ''}")
    return "\n".join(lines)


def new_axes(title: str, subtitle: str, height: float):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), dpi=150, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(f"{title}\n", loc="left", fontsize=13, color=INK, fontweight="bold")
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, fontsize=9, color=MUTED)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)
    return figure, axes


def bars(data: dict, shape: str, inputs: str, value: str, title: str, unit: str):
    """Horizontal bars of the forward and backward of every provider on one set of inputs, or None."""
    items = [i for i in matching(data, shape=shape, inputs=inputs, pass_=BOTH) if i.get(value) is not None]
    items = sorted(items, key=lambda i: i[value], reverse=True)
    if not items:
        return None
    first = items[0]
    subtitle = (
        f"{data['machine']['gpu']}; N = {first['n']}, D = {first['d']}, V = {first['v']}, bf16; {inputs} inputs, "
        f"mean entropy {first['entropy']:.2f} nats"
    )
    figure, axes = new_axes(title, subtitle, 1.6 + 0.33 * len(items))
    colours = [OURS if i["provider"].startswith("ours") else PEER if is_peer(i) else BARE for i in items]
    values = [max(i[value], 0.0) for i in items]
    axes.barh([i["provider"] for i in items], values, color=colours, height=0.7)
    for place, (item, length) in enumerate(zip(items, values, strict=True)):
        share = f" ({item['peak_share_bf16']:.1%} of bf16 logits)" if value == "peak_mib" else ""
        axes.text(length, place, f"  {length:,.3g}{share}" if length < 1000 else f"  {length:,.0f}{share}", va="center")
    axes.set_xlim(0, (1.5 if value == "peak_mib" else 1.2) * max(values) or 1)
    axes.set_xlabel(unit, color=INK)
    return figure


def curve(data: dict, shape: str):
    """Time over rho, or over the entropy where no rho is known."""
    items = matching(data, shape=shape, provider="ours", pass_=BOTH)
    if not items:
        return None
    known = any(i.get("rho") is not None for i in items)
    points = [(i["rho"] if known else i["entropy"], i) for i in items if not known or i.get("rho") is not None]
    points.sort(key=lambda point: point[0])
    subtitle = f"{data['machine']['gpu']}; N = {items[0]['n']}, D = {items[0]['d']}, V = {items[0]['v']}, bf16"
    figure, axes = new_axes(f"Forward and backward over {'rho' if known else 'the mean entropy'}", subtitle, 5)
    axes.plot([x for x, _ in points], [i["median_ms"] for _, i in points], color=OURS, marker="o", label="ours")
    for place, (x, item) in enumerate(points):
        axes.annotate(
            f"{item['inputs'].split()[0]}, {item['entropy']:.2g} nats", (x, item["median_ms"]), fontsize=8, color=MUTED,
            textcoords="offset points", xytext=(0, 9 if place % 2 else -16), ha="center",
        )  # fmt: skip
    lines = (("bare 6NDV", BARE, "-"), ("bare 8NDV", BARE, ":"), ("ours, exact", OURS, "--"), ("TRL", INK, "--"))
    for name, colour, style in lines:
        height = time_of(data, shape=shape, inputs="flat", provider=name, pass_=BOTH)
        if height is not None:
            axes.axhline(height, color=colour, linestyle=style, linewidth=1.2, label=name)
    what = "rho: share of (token, vocabulary tile) pairs that the backward visits"
    axes.set_xlabel(what if known else "mean entropy, nats", color=INK)
    axes.set_ylabel("ms", color=INK)
    axes.set_ylim(bottom=0)
    if known and points[0][0] > 0:
        axes.set_xscale("log")  # language models sit far below 0.1
        axes.set_xlim(points[0][0] / 2, 2)
    axes.legend(frameon=False, fontsize=9)
    return figure


def draw(data: dict, path: Path) -> list[Path]:
    """PNGs beside the JSON."""
    shape = main_shape(data)
    if shape is None:
        return []
    inputs = [name for one, name in groups(data) if one == shape]
    chief = next((name for name in ("peaked 0.3", *inputs) if name != "flat" and name in inputs), inputs[0])
    time, memory = "Forward and backward of the LM head's loss", "Peak memory beyond inputs and gradients"
    figures = {
        "times-flat": bars(data, shape, "flat", "median_ms", time, "ms"),
        "times-peaked": bars(data, shape, chief, "median_ms", time, "ms") if chief != "flat" else None,
        "memory": bars(data, shape, chief, "peak_mib", memory, "MiB")
        or bars(data, shape, "flat", "peak_mib", memory, "MiB"),
        "rho": curve(data, shape),
    }
    drawn = []
    for name, figure in figures.items():
        if figure is not None:
            drawn.append(path.with_name(f"{path.stem}-{name}.png"))
            figure.savefig(drawn[-1])
    return drawn
