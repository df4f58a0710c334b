"""The benchmarks' page, its figures and the README's section, from what pytest-benchmark stored.

    python bench/report.py bench/results/<machine>.json [MORE.json of the same machine and commit ...]
    python bench/report.py --check bench/results/<machine>.json     # exits 1 if the page says anything else

The page is docs/benchmarks.md, of a machine with a GPU docs/benchmarks-gpu.md; the README's section stands between
markers of the same name. What each number means is in LEGEND.
"""

import argparse
import itertools
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import goals
import report_figures
from report_rows import (
    AGAIN,
    BOTH,
    CHIEF_OPS,
    GROUP,
    QUICK,
    RIVALS,
    Results,
    ResultsError,
    Rows,
    best_rival,
    chief_groups,
    chief_inputs,
    chief_of,
    chief_shape,
    digits,
    of_bare,
    ratio,
    read,
    size,
    times_best_rival,
    tokens_per_s,
    without_quick,
)

ROOT = Path(__file__).resolve().parents[1]
GPU_RUNS = ROOT / "bench" / "results"
TITLES = {
    "head": "Log-probabilities of the LM head (`linear_logp`)",
    "objective": "Head and Step-KTO loss (`linear_step_kto`)",
    "kl": "Exact KL to a reference (`linear_logp_kl`)",
}
LEGEND = """\
- **Times** are medians of rounds in which the providers take turns, with cold caches. **Spread**: the interquartile
  range in per cent of the median; empty for what ran once.
- **TFLOP/s** count useful operations (2NDV a forward, 6NDV with its backward), so recomputing does not look like speed.
- **of the bare products**: time over that of the head's matrix products alone, into buffers that exist. A backward that
  leaves out what carries no mass can go below 1. **over ours**: time over that of our row in bold.
- **times best peer**: the time of the fastest library or plain torch over this row's: below 1, ours is slower.
- **rho**: the share of (token, vocabulary tile) pairs that the backward visits.
- **Errors** are the largest against fp64: nats for log-probabilities, entropies and KL; relative for losses,
  gradients, and whoever gives no more than a mean. What is wrong is not timed.
- **Memory** (MB) is the peak beyond inputs and gradients, also in per cent of the logits in the inputs' dtype."""


class Column(NamedTuple):
    title: str
    cell: Callable[[dict], str]
    left: bool = False


def key(title: str, name: str, left: bool = False) -> Column:
    """Numbers to three digits, text as it is."""

    def cell(row: dict) -> str:
        value = row.get(name)
        return escaped(value) if isinstance(value, str) else digits(value)

    return Column(title, cell, left)


def escaped(text: object) -> str:
    """On one line, nothing of it markup; of paths on the machine the last part."""
    line = re.sub(r"(?<![\w/.])/(?:[\w.+-]+/)+", "", " ".join(str(text).split()))
    return line.replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")


def table(columns: Sequence[Column], rows: Sequence[dict]) -> list[str]:
    """Markdown that is readable as it is, too; columns that nothing fills are left out."""
    written = [(column, [column.cell(row) for row in rows]) for column in columns]
    written = [(column, cells) for column, cells in written if any(cells)]
    lines: list[list[str]] = [[] for _ in range(2 + len(rows))]
    for column, cells in written:
        width = max(map(len, [column.title, *cells, "--:"]))
        adjust = str.ljust if column.left else str.rjust
        lines[0].append(adjust(column.title, width))
        lines[1].append("-" * width if column.left else "-" * (width - 1) + ":")
        for line, cell in zip(lines[2:], cells, strict=True):
            line.append(adjust(cell, width))
    return [f"| {' | '.join(line)} |" for line in lines]


def provider(bold: dict | None = None) -> Column:
    def cell(row: dict) -> str:
        return f"**{row['provider']}**" if row is bold else row["provider"]

    return Column("provider", cell, left=True)


def times_column(group: Rows) -> Column:
    def cell(row: dict) -> str:
        return digits(times_best_rival(row, group)) if row["role"] == "ours" else ""

    return Column("times best peer", cell)


def picture(name: str, alt: str, images: dict[str, str]) -> list[str]:
    return [f"![{alt}]({images[name]})", ""] if name in images else []


def machine_name(results: Results) -> str:
    found = results.machine
    return found.get("gpu") or f"{found.get('processor')}, {found.get('torch_threads')} threads"


def machine(results: Results) -> list[str]:
    found, commit = results.machine, results.commit
    memory = found.get("memory_bytes")
    cpu = f"{found.get('processor')}, {found.get('torch_threads')} threads"
    size_of_memory = f"{memory / 2**30:.0f} GiB" if memory else None
    packages = {"torch": found.get("torch")} | (found.get("packages") or {})
    versions = [f"{name} {version}" for name, version in packages.items() if version]
    if found.get("python_version"):
        versions.append(f"Python {found['python_version']}")
    changed = " with changes" if commit.get("dirty") else ""
    return [
        f"- Machine: {joined(found.get('gpu'), cpu, found.get('instructions'), size_of_memory)}",
        f"- Versions: {', '.join(versions)}",
        f"- Commit {(commit.get('id') or 'unknown')[:12]}{changed}, {results.date}",
    ]


def shown(path: Path) -> str:
    path = path.resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def again(results: Results) -> list[str]:
    large = "--large " * ("152k" in results.rows.values("shape"))
    part = "    # its part of the run, by -k" * (len(results.paths) > 1)
    lines = [f"    {AGAIN}{shown(path)}{part}" for path in results.paths]
    return [line.replace("--benchmark-only", f"{large}--benchmark-only") for line in lines] + [
        f"    {command(results)}"
    ]


def command(results: Results) -> str:
    return f"python bench/report.py {' '.join(shown(path) for path in results.paths)}"


def summary(rows: Rows) -> list[str]:
    """What the chief figure says, in words, place by place."""
    lines = []
    for (shape, dtype), group in chief_groups(rows, "head").items():
        ours, rival = chief_of(group) or {}, best_rival(group)
        parts = [digits(ours["ms"], " ms")]
        if bare := of_bare(ours, group):
            parts.append(f"{digits(bare)} of the bare products' time")
        if rival:
            parts.append(f"{digits(times_best_rival(ours, group))} times as fast as the best peer, {rival['provider']}")
        if "rho" in ours:
            parts.append(f"rho {digits(ours['rho'])}")
        lines.append(f"- {shape} ({size(ours)}), {dtype}: {'; '.join(parts)}")
    return ["Forward and backward of the head with ours:", "", *lines, ""] if lines else []


def head_table(group: Rows) -> list[str]:
    chief = chief_of(group)
    unit = "nats" if group[0]["op"].startswith("linear_logp") else "relative"
    columns = [
        provider(chief),
        key("ms", "ms"),
        key("spread, %", "spread"),
        key("TFLOP/s", "tflops"),
        Column("of the bare products", lambda row: digits(of_bare(row, group))),
        Column("over ours", lambda row: digits(ratio(row["ms"], chief["ms"])) if chief else ""),
        times_column(group),
        key("rho", "rho"),
        key(f"error, {unit}", "value_error"),
        key("gradient error", "gradient_error"),
        key("MB", "peak_mb"),
        Column("of the logits, %", lambda row: digits(100 * row["peak_share"]) if "peak_share" in row else ""),
    ]
    return table(columns, sorted(group, key=lambda row: row["ms"]))


def group_title(row: dict) -> str:
    entropy = f" ({digits(row['entropy'])} nats)" if "entropy" in row else ""
    place = f"{row['shape']} ({size(row)}), {row['dtype']}"
    return f"`{row['op']}`: {joined(place, row.get('inputs', '') + entropy, row.get('way'))}"


def heads(rows: Rows, images: dict[str, str]) -> list[str]:
    """The tables of the chief inputs' forward and backward at once, the others folded."""
    lines = []
    for suite, op in CHIEF_OPS.items():
        here = rows.where(suite=suite)
        if not here:
            continue
        lines += [f"## {TITLES[suite]}", ""]
        lines += picture(suite, f"{op}: times by provider", images) if suite != "head" else []
        inputs = chief_inputs(here)
        folded: list[str] = []
        shapes = [shape for shape in here.values("shape") if shape != QUICK] or [QUICK]
        for group in here.groups(*GROUP).values():
            row = group[0]
            chief = row.get("inputs") == inputs and row.get("way") == BOTH and row["shape"] in shapes
            into = lines if chief else folded
            into += [f"### {group_title(row)}", "", *head_table(group), ""]
        count = sum(line.startswith("###") for line in folded)
        lines += fold(f"{count} more: other inputs, forward alone, the quick shape", folded)
    return lines


def joined(*parts: str | None) -> str:
    return ", ".join(part for part in parts if part)


def fold(title: str, lines: Sequence[str]) -> list[str]:
    return [f"<details><summary>{title}</summary>", "", *lines, "</details>", ""] if lines else []


def entropy(rows: Rows, images: dict[str, str]) -> list[str]:
    lines = []
    for (dtype,), group in rows.where(suite="entropy", way=BOTH).groups("dtype").items():
        levels = [
            ours | {"group": here, "times": times_best_rival(ours, here), "rival": best_rival(here)}
            for _, _, here, ours in report_figures.entropy_levels(group)
        ]
        if not levels:
            continue
        lines += picture(report_figures.slug("entropy", dtype), f"rho and speed-up over the entropy, {dtype}", images)
        slower = [f"{row['inputs']} ({digits(row['times'])})" for row in levels if (row["times"] or 1) < 1]
        if slower:
            lines += [f"In {dtype} ours is slower than the best peer on {', '.join(slower)}.", ""]
        lines += [*table(ENTROPY, levels), ""]
    text = "Inputs from certain to uniform; `real` are a language model's states, plain `real` at its own temperature."
    return ["## What the entropy decides", "", text, "", *lines] if lines else []


ENTROPY = [
    key("inputs", "inputs", left=True),
    Column("N, D, V", lambda row: size(row).partition(" = ")[2], left=True),
    key("entropy, nats", "entropy"),
    key("rho", "rho"),
    key("ours, ms", "ms"),
    Column("exact, ms", lambda row: digits(row["group"].ms(goals.EXACT, "ours, triton, exact"))),
    Column("bare products, ms", lambda row: digits((row["group"].roles("bare").fastest() or {}).get("ms"))),
    Column("of the bare products", lambda row: digits(of_bare(row, row["group"]))),
    Column("times best peer", lambda row: digits(row["times"])),
    Column("best peer", lambda row: row["rival"]["provider"] if row["rival"] else "", left=True),
]


def scaling(rows: Rows, images: dict[str, str]) -> list[str]:
    here, lines = rows.where(suite="scaling"), []
    for name in images:
        if name.startswith("scaling-"):
            lines += picture(name, name.replace("-", " "), images)
    if here:
        columns = [*(Column(axis.upper(), whole(axis)) for axis in "ndv"), key("dtype", "dtype", left=True), provider()]
        columns += [key("ms", "ms"), key("spread, %", "spread"), key("MB", "peak_mb"), key("rho", "rho")]
        ordered = sorted(here, key=lambda row: (row.get("axis", ""), row.get("value", 0), row["ms"]))
        lines += fold("The figures as a table", [*table(columns, ordered), ""])
    largest = rows.where(suite="largest")
    if largest:
        columns = [
            provider(),
            key("dtype", "dtype", left=True),
            Column("largest N", whole("n")),
            Column("memory budget, GiB", lambda row: digits(ratio(row.get("budget_bytes"), 2**30))),
            key("limited by", "limited_by", left=True),
            Column("tried up to N", whole("tried")),
            key("ms", "ms"),
            key("MB", "peak_mb"),
        ]
        ordered = sorted(largest, key=lambda row: -row.get("n", 0))
        lines += ["### The largest N that fits", "", *table(columns, ordered), ""]
    return ["## Scaling", "", *lines] if lines else []


def whole(name: str) -> Callable[[dict], str]:
    """A size, which is never rounded."""
    return lambda row: f"{row[name]:,}" if name in row else ""


def bandwidth(rows: Rows) -> list[str]:
    lines = []
    for suite in ("step_kto", "reference_points"):
        for group in rows.where(suite=suite).groups("shape", "n", "dtype", "way").values():
            columns = [
                provider(chief_of(group)),
                key("ms", "ms"),
                key("spread, %", "spread"),
                key("GB/s", "gb_per_s"),
                Column("over the copy", lambda row, group=group: digits(of_bare(row, group))),
                times_column(group),
                key("error", "value_error"),
                key("gradient error", "gradient_error"),
                key("MB", "peak_mb"),
            ]
            row = group[0]
            tokens = f"{row['n']:,} tokens" if "n" in row else ""
            lines += [f"### `{suite}`: {joined(row['shape'], tokens, row['dtype'], row.get('way'))}", ""]
            lines += [*table(columns, sorted(group, key=lambda row: row["ms"])), ""]
    text = "Bound by memory: GB/s are of the bytes that must move, and a copy moves as many."
    return ["## Losses of given log-probabilities", "", text, "", *lines] if lines else []


STEP = [
    Column("tokens/s", lambda row: digits(tokens_per_s(row))),
    key("ms", "ms"),
    key("spread, %", "spread"),
    key("forwards", "forwards"),
    key("rho", "rho"),
    key("loss error", "loss_error"),
    key("gradient norm error", "gradient_norm_error"),
    key("MB", "peak_mb"),
    key("note", "note", left=True),
]


def end_to_end(rows: Rows, images: dict[str, str]) -> list[str]:
    lines = picture("end-to-end", "Training tokens/s by provider", images)
    for suite, title in (("end_to_end", "Training"), ("rollout", "Rollouts")):
        for (shape, dtype), group in without_quick(rows.where(suite=suite).groups("shape", "dtype")).items():
            lines += [f"### {title}: {joined(shape, dtype)}", ""]
            lines += [*table([provider(), *STEP], sorted(group, key=lambda row: -(tokens_per_s(row) or 0))), ""]
    for (shape, dtype), group in without_quick(rows.where(suite="factors").groups("shape", "dtype")).items():
        name = report_figures.slug("factors", shape, dtype)
        lines += [f"### What each feature is worth: {joined(shape, dtype)}", ""]
        lines += ["From above, each row has one feature more switched off; a factor below 1 is one that it gained.", ""]
        lines += picture(name, "The factor of each feature", images)
        lines += [*table([provider(), *factor_columns(group), *STEP[1:]], group), ""]
    return ["## From end to end", "", *lines] if lines else []


def factor_columns(group: Rows) -> list[Column]:
    first = tokens_per_s(group[0])
    before = {id(row): tokens_per_s(last) for last, row in itertools.pairwise(group)}
    return [
        STEP[0],
        Column("factor", lambda row: digits(ratio(before.get(id(row)), tokens_per_s(row)))),
        Column("together", lambda row: digits(ratio(first, tokens_per_s(row)))),
    ]


def own_goals(results: Results) -> list[goals.Outcome]:
    return goals.gpu(GPU_RUNS) if results.machine.get("gpu") else goals.cpu(results.rows)


def goal_lines(results: Results) -> list[str]:
    sets = {"On this machine": own_goals(results)}
    if not results.machine.get("gpu"):
        sets["On a GPU"] = goals.gpu(GPU_RUNS)
    lines = []
    for title, found in sets.items():
        lines += [f"### {title}: {goals.counts(found)}", ""]
        lines += [line for goal in found for line in (escaped(goal.paragraph()), "")]
    return ["## The goals", "", *lines]


def who(nodeid: str) -> str:
    """The provider in a test's id: the last of its parameters, behind " - " or behind shape and dtype."""
    inner = re.search(r"\[(.*)\]$", nodeid)
    return re.sub(r"^\w+-(bf16|fp32)-", "", inner[1].split(" - ")[-1]) if inner else nodeid.split("::")[-1]


def not_timed(results: Results) -> list[str]:
    reasons: dict[str, dict[str, None]] = {}
    for nodeid, reason in results.not_timed.items():
        name, text = who(nodeid), escaped(reason).removeprefix("Skipped: ")
        reasons.setdefault(text.removeprefix(f"{name}: "), {})[name] = None
    lines = [f"- {'; '.join(names)}: {reason}" for reason, names in reasons.items()]
    return ["## Not timed", "", *lines, ""] if lines else []


def page(results: Results, images: dict[str, str]) -> str:
    rows = results.rows
    lines = [
        f"<!-- Generated: change nothing here, but run {command(results)} -->",
        "",
        f"# Benchmarks: {machine_name(results)}",
        "",
        *machine(results),
        "",
        "Again, on any machine:",
        "",
        *again(results),
        "",
        *picture("head", "Forward and backward of the LM head by provider", images),
        *summary(rows),
        *fold("How to read this page", [LEGEND, ""]),
        *heads(rows, images),
        *entropy(rows, images),
        *scaling(rows, images),
        *bandwidth(rows),
        *end_to_end(rows, images),
        *goal_lines(results),
        *not_timed(results),
    ]
    return "\n".join(lines).rstrip() + "\n"


def readme(results: Results, images: dict[str, str], link: str) -> list[str]:
    """One paragraph, one table, one picture."""
    rows, shape = results.rows, chief_shape(results.rows)
    groups = {
        (suite, place[1]): group
        for suite in ("head", "objective")
        for place, group in chief_groups(rows, suite).items()
        if place[0] == shape
    }
    lines = []
    if groups:
        sizes = size(next(iter(groups.values()))[0])
        what = f"Forward and backward at {sizes}, in ms, and in brackets how many times as long as ours takes"
        lines += [f"{what} ({machine_name(results)}):", "", *readme_table(groups), ""]
    lines += end_to_end_lines(rows)
    counts = goals.counts(own_goals(results))
    text = f" Of the goals on this machine: {counts}." if counts else ""
    lines += picture("readme", "Forward and backward of the LM head by provider", images)
    return [*lines, f"[All figures, what they mean and how to run them again]({link}).{text}"]


def end_to_end_lines(rows: Rows) -> list[str]:
    """Our loop against TRL's trainer as it comes and in its fastest configuration."""
    found = []
    for place, group in without_quick(rows.where(suite="end_to_end").groups("shape", "dtype")).items():
        ours = next((tokens_per_s(row) for row in group.where(provider=goals.STEP_KTO)), None)
        theirs = {row["provider"]: tokens_per_s(row) for row in group if row["provider"].startswith(goals.TRAINER)}
        fastest = max(theirs, key=lambda name: theirs[name] or 0.0, default="")
        names = dict.fromkeys(name for name in (goals.TRAINER, fastest) if theirs.get(name))
        times = (f"{digits(ratio(ours, theirs[name]))} times {name}" for name in names)
        if ours:
            found.append(joined(f"{digits(ours)} ({place[1]})", *times))
    return [f"Training from end to end, tokens/s with Step-KTO: {'; '.join(found)}.", ""] if found else []


def readme_table(groups: dict[tuple, Rows]) -> list[str]:
    """Each provider by the faster of its variants (eager, compiled, chunked); ours by the row that stands for it."""
    dtypes = list(dict.fromkeys(dtype for _, dtype in groups))
    lines: dict[tuple, dict] = {}
    for (suite, dtype), group in groups.items():
        ours = chief_of(group)
        assert ours is not None
        families = group.roles(*RIVALS, *["bare"] * (suite == "head")).families()
        for name, row in {f"**{ours['provider']}**": ours, **families}.items():
            line = lines.setdefault((suite, name), {"name": name, "ms": row["ms"], "suite": suite})
            times = "" if row is ours else f" ({digits(ratio(row['ms'], ours['ms']))}x)"
            line[dtype] = f"{digits(row['ms'])}{times}"
    columns = [Column("", lambda line: line["name"], left=True)]
    columns += [Column(f"{dtype}, ms", lambda line, dtype=dtype: line.get(dtype, "")) for dtype in dtypes]
    return table(columns, sorted(lines.values(), key=lambda line: (line["suite"] != "head", line["ms"])))


def section(text: str, name: str, inner: Sequence[str], path: Path) -> str:
    """The text with what stands between its two markers replaced; without any markers as it is."""
    start, end = f"<!-- {name}: start -->", f"<!-- {name}: end -->"
    if start not in text and end not in text:
        return text
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ResultsError(f"{path.name}: write {start} and {end} once each, in this order")
    before, rest = text.split(start)
    return before + "\n".join([start, *inner, end]) + rest.split(end)[1]


def write(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


class Output(NamedTuple):
    texts: dict[Path, str]
    figures: dict[Path, Callable]


def generate(results: Results, out: Path | None, readme_path: Path | None) -> Output:
    """Everything there is to write, nothing of it drawn or written yet."""
    name = "benchmarks-gpu" if results.machine.get("gpu") else "benchmarks"
    folder = out or ROOT / "docs"
    images = folder if out else folder / "images"
    prefix = name.replace("benchmarks", "bench")
    drawn = report_figures.pictures(results.rows)
    files = {figure: images / f"{prefix}-{figure}.png" for figure in drawn}
    text_path = folder / f"{name}.md"
    texts = {text_path: page(results, {figure: relative(path, folder) for figure, path in files.items()})}
    if readme_path and readme_path.exists():
        near = readme_path.resolve().parent
        links = {figure: relative(path.resolve(), near) for figure, path in files.items()}
        inner = readme(results, links, relative(text_path.resolve(), near))
        texts[readme_path] = section(readme_path.read_text(), name, inner, readme_path)
    return Output(texts, {files[figure]: draw for figure, draw in drawn.items()})


def stale(output: Output) -> list[Path]:
    return [path for path, text in output.texts.items() if not path.exists() or path.read_text() != text]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS.json")
    parser.add_argument("--out", type=Path, help="a folder for page and images (default: docs/ and docs/images/)")
    parser.add_argument(
        "--readme", type=Path, help="with markers for its section (default: the project's; with --out none)"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the texts on disk differ")
    options = parser.parse_args(arguments)
    try:
        readme_path = options.readme or (None if options.out else ROOT / "README.md")
        output = generate(read(options.results), options.out, readme_path)
    except ResultsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    changed = stale(output)
    if options.check:
        for path in changed:
            print(f"{shown(path)} is not what these results give: run this again without --check", file=sys.stderr)
        return 1 if changed else 0
    drawn = {path: report_figures.png(draw()) for path, draw in output.figures.items()}
    texts = {path: text.encode() for path, text in output.texts.items() if path in changed}
    for path, content in (drawn | texts).items():
        write(path, content)
        print(shown(path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
