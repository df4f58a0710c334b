"""The table, the goals and the figure of what pytest-benchmark found on a CPU, written beside its JSON.

    python bench/native_table.py bench/results/<machine>.json [MORE.json ...]

Several files of one machine are read as one: a run may be split with `-k`.
"""

import argparse
import json
import operator
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from gpu_figures import BARE, INK, MUTED, OURS, PEER, number, ratio

FORWARD, BOTH = "forward", "forward and backward"
BARE_ROW, NATIVE, EXACT = "bare products", "ours, native", "ours, native, exact"
KTO, KTO_REFERENCE = "ours, native, linear_step_kto", "ours, native, linear_step_kto with its reference"
LIGER, LIGER_REFERENCE = "Liger KTO", "Liger KTO with its reference"
PLACES = [(shape, dtype) for shape in ("32k", "152k") for dtype in ("bf16", "fp32")]
MOST_RHO = 0.1
LOGP_ERROR = 1e-5
STEP_KTO = "(500, 100, 20)"  # a million tokens in 50,000 steps


class Goal(NamedTuple):
    text: str
    most: float | None = None  # met at or below it
    least: float | None = None  # or at or above it
    found: float | None = None
    note: str = ""

    @property
    def status(self) -> str:
        if self.found is None:
            return "not measured"
        reached = self.found <= self.most if self.most is not None else self.found >= (self.least or 0)
        return "met" if reached else "missed"


class Rows(list):
    """Benchmarks as flat dictionaries: `extra_info`, and the suite, who, and the median in seconds."""

    @classmethod
    def of(cls, data: dict) -> "Rows":
        def flat(bench: dict) -> dict:
            suite = Path(bench["fullname"].split("::")[0]).stem.removeprefix("bench_")
            return bench["extra_info"] | {
                "suite": suite, "who": bench["params"]["who"], "seconds": bench["stats"]["median"],
                "rounds": bench["stats"]["rounds"],
            }  # fmt: skip

        return cls(flat(bench) for bench in data["benchmarks"])

    def where(self, **wanted) -> "Rows":
        return Rows(row for row in self if all(row.get(name) == value for name, value in wanted.items()))

    def seconds(self, who: str, *alternatives: str) -> float | None:
        """The fastest of several rows' medians."""
        return min((row["seconds"] for row in self if row["who"] in (who, *alternatives)), default=None)

    def worst(self, name: str) -> float | None:
        """Of all native rows that have it."""
        return max((row[name] for row in self if row["who"].startswith(NATIVE) and name in row), default=None)


def peaked(rows: Rows) -> Rows:
    return Rows(row for row in rows if row["inputs"].startswith("peaked"))


def head_goals(rows: Rows, shape: str, dtype: str) -> list[Goal]:
    here = rows.where(suite="native", shape=shape, dtype=dtype)
    forward, both = peaked(here.where(way=FORWARD)), peaked(here.where(way=BOTH))
    flat = here.where(way=BOTH, inputs="flat")
    rho = next((row["rho"] for row in both.where(who=NATIVE) if "rho" in row), None)
    sparse = both if rho is not None and rho <= MOST_RHO else Rows()  # of other inputs these goals say nothing

    def costs(text: str, most: float, group: Rows, who: str, **others) -> Goal:
        return Goal(text, most, found=ratio(group.seconds(who), group.seconds(BARE_ROW)), **others)

    def beats(least: float, *theirs: str, mine: str = NATIVE) -> Goal:
        found = ratio(sparse.seconds(*theirs), sparse.seconds(mine))
        return Goal(f"{mine}: times as fast as {theirs[0]}", least=least, found=found)

    known = "" if rho is None else f"rho {rho:.3f}"
    goals = [
        costs("forward, over its bare product", 1.0, forward, NATIVE),
        costs("forward and backward, rho <= 0.1, over the bare products", 0.5, sparse, NATIVE, note=known),
        costs("exact, over the bare products", 1.5, both, EXACT),
        costs("flat inputs, over the bare products", 1.5, flat, NATIVE),
        beats(2.5, "torch linear_cross_entropy"),
        beats(2.0, LIGER, f"{LIGER}, compiled", mine=KTO),
        beats(2.0, LIGER_REFERENCE, f"{LIGER_REFERENCE}, compiled", mine=KTO_REFERENCE),
        beats(8.0 if dtype == "bf16" else 4.0, "TRL"),
        Goal("largest error of a log-probability, nats", LOGP_ERROR, found=here.worst("logp_error")),
    ]
    return [goal._replace(text=f"{shape} {dtype}: {goal.text}") for goal in goals]


def goals(rows: Rows) -> list[Goal]:
    steps = rows.where(suite="step_kto", shape=STEP_KTO).seconds(NATIVE)
    training = []
    for dtype, way in (("bf16", "filter_eps auto"), ("fp32", "filter_eps 0.00195")):
        here = rows.where(suite="training_step", shape="goal", dtype=dtype, inputs="planted", way=way)
        times = ratio(here.seconds("ours, reference"), here.seconds(NATIVE))
        text = f"training step {dtype}, {way}: times as fast as the reference backend"
        training.append(Goal(text, least=2.0, found=times))
    return [
        *(goal for place in PLACES for goal in head_goals(rows, *place)),
        Goal("step_kto of a million tokens in 50,000 steps, ms", 10.0, found=None if steps is None else 1e3 * steps),
        *training,
    ]


def goal_lines(found: list[Goal]) -> list[str]:
    lines = ["| goal | wanted | found | |", "|---|---|---|---|"]
    for goal in found:
        wanted = f"at most {goal.most:g}" if goal.most is not None else f"at least {goal.least:g}"
        note = f" ({goal.note})" if goal.note else ""
        status = f"**{goal.status}**" if goal.status == "missed" else goal.status
        lines.append(f"| {goal.text}{note} | {wanted} | {number(goal.found, '{:.3g}')} | {status} |")
    return lines


def head_table(rows: Rows) -> list[str]:
    """One group a table: times, their ratios to the bare products and to ours, and what came with them."""
    bare, ours = rows.seconds(BARE_ROW), rows.seconds(NATIVE)
    header = "|ms|rounds|bare products|ours, native|rho|blocks|dropped|path|error|gradient's|MB|of logits"
    lines = [f"| {header.replace('|', ' | ')} |", "|---" * (1 + header.count("|")) + "|"]
    for row in sorted(rows, key=operator.itemgetter("seconds")):
        cells = [
            row["who"], f"{1e3 * row['seconds']:.1f}", str(row["rounds"]),
            number(ratio(row["seconds"], bare), "{:.2f}"),
            number(ratio(row["seconds"], ours), "{:.2f}"), number(row.get("rho"), "{:.3f}"),
            number(row.get("rho_blocks"), "{:.3f}"), number(row.get("dropped_max"), "{:.1e}"), row.get("path", ""),
            number(row.get("logp_error", row.get("value_error")), "{:.1e}"),
            number(row.get("gradient_error"), "{:.1e}"), number(row.get("peak_mb"), "{:.1f}"),
            number(row.get("peak_share"), "{:.1%}"),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def markdown(data: dict, image: str | None) -> str:
    rows, machine, commit = Rows.of(data), data["machine_info"], data["commit_info"]
    packages = ", ".join(f"{name} {version}" for name, version in machine.get("packages", {}).items() if version)
    dirty = " with changes" if commit.get("dirty") else ""
    lines = [
        f"# {machine.get('processor')}, {machine.get('torch_threads')} threads",
        "",
        f"torch {machine.get('torch')} ({machine.get('instructions')}); {packages}; Python "
        f"{machine.get('python_version')}; commit {commit.get('id')}{dirty}; {data.get('datetime', '')[:10]}. Medians. "
        "Ratios: time over that of the bare products, and over ours. The error of a log-probability is in nats, others "
        "are relative. Memory: the peak beyond inputs and gradients, and its share of the logits in the inputs' dtype.",
        "",
        *goal_lines(goals(rows)),
    ]
    if image:
        lines += ["", f"![Times of forward and backward]({image})"]
    keys = ("shape", "size", "dtype", "inputs", "way", "entropy")
    heads = rows.where(suite="native")
    for group in dict.fromkeys(tuple(row[key] for key in keys) for row in heads):
        shape, size, dtype, inputs, way, entropy = group
        title = f"## {shape} {size} {dtype}, {inputs} ({entropy:.2f} nats), {way}"
        lines += ["", title, "", *head_table(heads.where(**dict(zip(keys, group, strict=True))))]
    for suite in ("training_step", "step_kto"):
        here = rows.where(suite=suite)
        lines += ["", f"## {suite}", "", "| | | ms | tokens/s |", "|---|---|---|---|"] if here else []
        for row in here:
            place = " ".join(str(row[key]) for key in ("shape", "dtype", "inputs", "way", "path") if key in row)
            lines.append(f"| {place} | {row['who']} | {1e3 * row['seconds']:.2f} | {row.get('tokens/s', '')} |")
    reasons = Counter(" ".join(why.split()) for why in data.get("not_timed", {}).values())
    if reasons:
        lines += ["", "## Not timed", "", *(f"- {why} ({count})" for why, count in reasons.items())]
    return "\n".join(lines) + "\n"


def draw(rows: Rows, title: str, path: Path) -> bool:
    """Bars of forward and backward on the peaked inputs, a panel for each shape and dtype; False if there are none."""
    from matplotlib.figure import Figure

    both = peaked(rows.where(suite="native", way=BOTH))
    places = list(dict.fromkeys((row["shape"], row["size"], row["dtype"]) for row in both))
    if not places:
        return False
    columns = min(2, len(places))
    deep = -(-len(places) // columns)
    figure = Figure(figsize=(7.5 * columns, 0.8 + 4.6 * deep), dpi=130, facecolor="white", layout="constrained")
    figure.suptitle(f"Forward and backward of the LM head\n{title}", fontsize=12, color=INK)
    for place, axes in zip(places, figure.subplots(deep, columns, squeeze=False).flat, strict=False):
        shape, size, dtype = place
        here = sorted(both.where(shape=shape, dtype=dtype), key=operator.itemgetter("seconds"), reverse=True)
        names = [row["who"] for row in here]
        colours = [OURS if n.startswith(NATIVE) else BARE if n == BARE_ROW else PEER for n in names]
        seconds = [row["seconds"] for row in here]
        axes.barh(names, seconds, color=colours, height=0.7)
        for index, length in enumerate(seconds):
            axes.text(length, index, f"  {length:.3g}", va="center", fontsize=9, color=INK)
        axes.set_xlim(0, 1.15 * max(seconds))
        axes.set_title(f"{shape} {dtype}, (N, D, V) = {size}", loc="left", fontsize=11, color=INK)
        axes.set_xlabel("seconds", color=MUTED)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, labelsize=9)
    for axes in figure.axes[len(places) :]:
        axes.set_visible(False)
    figure.savefig(path)
    return True


def read(paths: list[Path]) -> dict:
    """The first file's machine and commit, everyone's benchmarks."""
    files = [json.loads(path.read_text()) for path in paths]
    if len({json.dumps([f["machine_info"].get("processor"), f["commit_info"].get("id")]) for f in files}) > 1:
        raise SystemExit("these files are of different machines or commits: one table would compare what cannot be")
    missing = {name: why for f in files for name, why in f.get("not_timed", {}).items()}
    return files[0] | {"benchmarks": [bench for f in files for bench in f["benchmarks"]], "not_timed": missing}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS.json")
    paths = parser.parse_args().results
    data = read(paths)
    machine = data["machine_info"]
    image, text = paths[0].with_suffix(".png"), paths[0].with_suffix(".md")
    title = f"{machine.get('processor')}, {machine.get('torch_threads')} threads, torch {machine.get('torch')}"
    drawn = draw(Rows.of(data), title, image)
    text.write_text(markdown(data, image.name if drawn else None))
    for goal in goals(Rows.of(data)):
        print(f"{goal.status.upper():<12} {goal.text}{number(goal.found, ': {:.3g}')}")
    print(text, *[image] * drawn)
    return 0


if __name__ == "__main__":
    sys.exit(main())
