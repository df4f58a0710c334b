"""pytest-benchmark's JSON as rows: what the report, its goals and its figures read."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

FORWARD, BOTH = "forward", "forward and backward"
CHIEF_OPS = {"head": "linear_logp", "objective": "linear_step_kto", "kl": "linear_logp_kl"}  # of the suites of heads
GROUP = "op", "shape", "dtype", "inputs", "way"
QUICK = "quick"  # the shape that shows that everything runs
RIVALS = "peer", "torch"  # whom ours is compared with: other libraries and plain torch
ASIDE = ", exact", ", reference"  # in the names of ours that stand for nothing but themselves
SAME = "processor", "gpu", "torch", "torch_threads", "instructions"
AGAIN = "pytest bench --benchmark-only --benchmark-json="


class ResultsError(Exception):
    """A file that no report can be made of; one line with its name and what to do."""


class Rows(list[dict]):
    """Benchmarks as flat dictionaries: `extra_info` with the median in ms and the spread (IQR) in per cent of it."""

    def where(self, **wanted) -> "Rows":
        return Rows(row for row in self if all(row.get(name) == value for name, value in wanted.items()))

    def roles(self, *roles: str) -> "Rows":
        return Rows(row for row in self if row["role"] in roles)

    def values(self, name: str) -> list:
        """The different ones, in the order of the file."""
        return list(dict.fromkeys(row[name] for row in self if name in row))

    def groups(self, *names: str) -> dict[tuple, "Rows"]:
        found: dict[tuple, Rows] = {}
        for row in self:
            found.setdefault(tuple(row.get(name) for name in names), Rows()).append(row)
        return found

    def fastest(self) -> dict | None:
        return min(self, key=lambda row: row["ms"], default=None)

    def families(self) -> dict[str, dict]:
        """The fastest of each provider's variants, which stand behind a comma: compiled, chunked."""
        found: dict[str, Rows] = {}
        for row in self:
            found.setdefault(row["provider"].partition(",")[0], Rows()).append(row)
        return {name: min(rows, key=lambda row: row["ms"]) for name, rows in found.items()}

    def ms(self, *providers: str) -> float | None:
        """The fastest of several providers' medians."""
        return min((row["ms"] for row in self if row["provider"] in providers), default=None)


class Results(NamedTuple):
    """One or more runs of one machine and commit."""

    rows: Rows
    machine: dict
    commit: dict
    date: str
    not_timed: dict[str, str]  # the reason for each test
    paths: list[Path]


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    return None if numerator is None or not denominator else numerator / denominator


def digits(value: float | None, unit: str = "") -> str:
    """Three significant digits, and nothing for nothing."""
    if value is None:
        return ""
    if isinstance(value, int) and abs(value) < 1000:
        return f"{value}{unit}"
    if value and not 1e-4 <= abs(value) < 1e12:
        return f"{value:.2e}{unit}"
    rounded = float(f"{value:.3g}")
    places = max(0, 2 - int(f"{rounded:e}".partition("e")[2])) if rounded else 0
    return f"{rounded:,.{places}f}{unit}"


def is_chief(row: dict) -> bool:
    """Whether it can stand for ours: neither the exact backward nor the reference backend."""
    return row["role"] == "ours" and not any(name in row["provider"] for name in ASIDE)


def chief_of(group: Rows) -> dict | None:
    """The row that stands for ours: the fastest of those that can."""
    return (Rows(filter(is_chief, group)) or group.roles("ours")).fastest()


def best_rival(group: Rows) -> dict | None:
    return group.roles(*RIVALS).fastest()


def times_best_rival(row: dict, group: Rows) -> float | None:
    """How many times as fast as the best rival: of the rows at hand, since a run may be split over files."""
    rival = best_rival(group)
    return ratio(rival["ms"], row["ms"]) if rival else row.get("of_best_peer")


def of_bare(row: dict, group: Rows) -> float | None:
    bare = group.roles("bare").fastest()
    return ratio(row["ms"], bare["ms"]) if bare else row.get("of_bare")


def chief_inputs(rows: Rows) -> str | None:
    """The peaked inputs that most rows have; else any."""
    names = [row["inputs"] for row in rows if "inputs" in row]
    peaked = [name for name in names if name.startswith("peaked")]
    return max(peaked or names, key=(peaked or names).count, default=None)


def chief_groups(rows: Rows, suite: str) -> dict[tuple, Rows]:
    """(shape, dtype) with the rows of the suite's chief op, forward and backward on the chief inputs, where ours is
    among them."""
    here = rows.where(suite=suite, op=CHIEF_OPS[suite], way=BOTH)
    groups = here.where(inputs=chief_inputs(here)).groups("shape", "dtype")
    return without_quick({place: group for place, group in groups.items() if chief_of(group)})


def without_quick(groups: dict[tuple, Rows]) -> dict[tuple, Rows]:
    """By (shape, dtype): where there is any other shape, the quick one says nothing."""
    return {place: group for place, group in groups.items() if place[0] != QUICK} or groups


def chief_shape(rows: Rows) -> str | None:
    """The one that the goals are stated for, else what has most rows."""
    shapes = [row["shape"] for row in rows.where(suite="head")]
    return "32k" if "32k" in shapes else max(shapes, key=shapes.count, default=None)


def size(row: dict) -> str:
    names = [name for name in ("n", "d", "v") if name in row]
    return f"{', '.join(name.upper() for name in names)} = {', '.join(str(row[name]) for name in names)}"


def tokens_per_s(row: dict) -> float | None:
    return row.get("tokens_per_s") or ratio(row.get("tokens"), row["ms"] / 1e3)


def load(path: Path) -> dict:
    remedy = f"write it again: {AGAIN}{path.name}"
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise ResultsError(f"{path.name}: {error.strerror}; {remedy}") from None
    except ValueError as error:
        raise ResultsError(f"{path.name} is not JSON ({error}): the run may have been cut short; {remedy}") from None
    known = isinstance(data, dict) and {"machine_info", "commit_info", "benchmarks"} <= data.keys()
    if not known or not all(isinstance(bench, dict) and "fullname" in bench for bench in data["benchmarks"]):
        raise ResultsError(f"{path.name} is JSON, but not pytest-benchmark's; {remedy}")
    return data


def flat(bench: dict) -> dict | None:
    """None for what is no row of these suites."""
    extra, stats = bench.get("extra_info") or {}, bench.get("stats") or {}
    if not {"suite", "provider"} <= extra.keys() or not stats.get("median"):
        return None
    spread = 100 * stats["iqr"] / stats["median"] if stats.get("rounds", 1) > 1 and "iqr" in stats else None
    known = {name: value for name, value in extra.items() if value is not None}
    row = {"op": "", "shape": "", "dtype": "", "role": "peer"} | known
    if "peak_bytes" in row:
        row["peak_mb"] = row["peak_bytes"] / 1e6
    return row | {"ms": 1e3 * stats["median"], "spread": spread, "rounds": stats.get("rounds", 1)}


def short(name: str) -> str:
    """A test's id without the folder that pytest was called from."""
    path, _, test = name.partition("::")
    return f"{path.rpartition('/')[2]}::{test}"


def read(paths: Iterable[Path]) -> Results:
    """All files as one; a benchmark that is in several counts as in the last."""
    files = {path: load(path) for path in paths}
    (first, data), *others = files.items()
    for path, other in others:
        differ = [name for name in SAME if data["machine_info"].get(name) != other["machine_info"].get(name)]
        if data["commit_info"].get("id") != other["commit_info"].get("id"):
            differ.append("commit")
        if differ:
            what = f"{path.name} and {first.name} differ in {', '.join(differ)}: one table would compare what cannot be"
            raise ResultsError(f"{what}; make a report of each")
    benches = {short(bench["fullname"]): bench for file in files.values() for bench in file["benchmarks"]}
    rows = Rows(row for row in map(flat, benches.values()) if row)
    if not rows:
        remedy = f"run the suites of this commit: {AGAIN}{first.name}"
        raise ResultsError(f"{first.name} holds no benchmarks with a suite and a provider; {remedy}")
    missing = {name: why for file in files.values() for name, why in file.get("not_timed", {}).items()}
    missing = {name: why for name, why in missing.items() if short(name) not in benches}
    commit = data["commit_info"] | {"dirty": any(file["commit_info"].get("dirty") for file in files.values())}
    return Results(rows, data["machine_info"], commit, str(data.get("datetime", ""))[:10], missing, list(files))
