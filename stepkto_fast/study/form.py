"""Runs that lost the form of solutions: another number of lines than M_0 writes for the same problems."""

from typing import NamedTuple

from .findings import Page
from .words import counted, fixed, fold, listed, table

LOST = 0.1  # of a model's greedy solutions


class Lost(NamedTuple):
    """A run that lost the form. `shares`: of the solutions of test problems that did, by model; `longer`: of the last
    model's of longer chains, where they were tried."""

    stage: str
    name: str
    difficulty: str
    seed: int
    shares: dict[int, float]
    longer: float | None


def other_length(first: dict, later: dict) -> float:
    """The share of greedy solutions with another number of lines than a first evaluation's of the same problems."""
    return sum(a != b for a, b in zip(first["steps"], later["steps"], strict=True)) / len(first["steps"])


def lost(page: Page, record: dict) -> Lost | None:
    """A run that lost the form, or None."""
    greedy, difficulty, seed = record["greedy"], record["difficulty"], record["seed"]
    shares = {t: other_length(greedy[0], greedy[t]) for t in range(1, len(greedy))}
    longer = None
    initial = page.study.runs("initial", difficulty, "initial").get(seed)
    if initial is not None and "final" in record:
        longer = other_length(initial["shifted"]["greedy"], record["final"]["shifted"]["greedy"])
    if max(*shares.values(), longer or 0.0, 0.0) <= LOST:
        return None
    return Lost(record["stage"], record["name"], difficulty, seed, shares, longer)


def lost_of(page: Page, stage: str, name: str, difficulty: str | None = None) -> tuple[list[Lost], int]:
    """Those runs of an arm or a variant that lost the form, and how many there are; at one difficulty or at all."""
    runs = [r for r in _with_models(page, stage) if r["name"] == name and difficulty in (None, r["difficulty"])]
    return [x for r in runs if (x := lost(page, r))], len(runs)


def share_of_runs(found: list[Lost], runs: int) -> str:
    return f"{len(found)} of {counted(runs, 'run')}"


def lost_form(page: Page) -> list[str]:
    """How many runs lost the form; empty where none did."""
    parts, spared, every = [], [], []
    for name in dict.fromkeys(r["name"] for r in _with_models(page, "main")):
        found, runs = lost_of(page, "main", name)
        every += found
        if found:
            parts.append(f"{share_of_runs(found, runs)} of `{name}`")
        else:
            spared.append(f"`{name}`")
    ablated = [x for r in _with_models(page, "ablations") if (x := lost(page, r))]
    if ablated:
        parts.append(f"{share_of_runs(ablated, len(_with_models(page, 'ablations')))} of ablations")
    if not parts:
        return []
    every += ablated
    seeds = (
        f"{d} with {'seeds' if len(of) > 1 else 'seed'} {listed(map(str, of))}"
        for d in dict.fromkeys(x.difficulty for x in every)
        for of in [sorted({x.seed for x in every if x.difficulty == d})]
    )
    text = (
        "**Lost form.** With feedback some runs come to models that write another number of lines than M_0 for more "
        f"than {100 * LOST:g} % of the problems: {listed(parts)}, on {listed(seeds)}"
    )
    return [f"{text}; no run of {listed(spared)}." if spared else f"{text}."]


def lost_table(page: Page) -> list[str]:
    """The runs that lost the form."""
    found = [x for stage in ("main", "ablations") for r in _with_models(page, stage) if (x := lost(page, r))]
    models = sorted({t for x in found for t in x.shares})
    rows = [
        (f"`{x.name}`, {x.difficulty}", x.seed, *(_share(x.shares.get(t)) for t in models), _share(x.longer))
        for x in found
    ]
    titles = ("run", "seed", *(f"M_{t}" for t in models), "longer chains, last model")
    return fold("Runs that lost the form: solutions with another number of lines than M_0's, %", table(titles, rows))


def _share(x: float | None) -> str:
    return "" if x is None else fixed(100 * x, 1)


def _with_models(page: Page, stage: str) -> list[dict]:
    """The runs of a stage that have a model, but for variants that gave the very solutions of their base."""
    runs = [r for r in page.study.records if r["stage"] == stage and r["greedy"]]
    if stage != "ablations":
        return runs
    bases = {(r["difficulty"], r["name"], r["seed"]): r["greedy"] for r in _with_models(page, "main")}
    return [r for r in runs if bases.get((r["difficulty"], r.get("arm"), r["seed"])) != r["greedy"]]
