"""Runs that lost the form of solutions: another number of lines than M_0 writes for the same problems."""

from typing import NamedTuple

from .findings import Page
from .words import counted, fixed, listed

LOST = 0.1  # of the greedy solutions of a model's test problems


class Lost(NamedTuple):
    """A run with a model that lost the form: the model and its share of solutions that did, those of the worst one."""

    name: str
    difficulty: str
    seed: int
    model: int
    share: float


def other_length(record: dict, t: int) -> float:
    """The share of greedy solutions of M_t with another number of lines than M_0's of the same problem."""
    first, later = (record["greedy"][model]["steps"] for model in (0, t))
    return sum(a != b for a, b in zip(first, later, strict=True)) / len(first)


def lost(record: dict) -> Lost | None:
    shares = {t: other_length(record, t) for t in range(1, len(record["greedy"]))}
    worst = max(shares, key=lambda t: shares[t], default=0)
    if not worst or shares[worst] <= LOST:
        return None
    return Lost(record["name"], record["difficulty"], record["seed"], worst, shares[worst])


def lost_of(page: Page, stage: str, name: str, difficulty: str | None = None) -> tuple[list[Lost], int]:
    """Those runs of an arm or a variant that lost the form, and how many there are; at one difficulty or at all."""
    runs = [r for r in _with_models(page, stage) if r["name"] == name and difficulty in (None, r["difficulty"])]
    return [x for r in runs if (x := lost(r))], len(runs)


def share_of_runs(found: list[Lost], runs: int) -> str:
    return f"{len(found)} of {counted(runs, 'run')}"


def lost_form(page: Page) -> list[str]:
    """How many runs of each arm, and of which ablations, lost the form; empty where none did."""
    lines, spared = [], []
    for name in dict.fromkeys(r["name"] for r in _with_models(page, "main")):
        found, runs = lost_of(page, "main", name)
        if found:
            places = (f"{x.difficulty}, seed {x.seed}: {fixed(100 * x.share, 1)} % at M_{x.model}" for x in found)
            lines.append(f"{share_of_runs(found, runs)} of `{name}` ({'; '.join(places)})")
        else:
            spared.append(f"`{name}`")
    names = dict.fromkeys(r["name"] for r in _with_models(page, "ablations"))
    ablated = {name: lost_of(page, "ablations", name) for name in names}
    if some := {name: of for name, of in ablated.items() if of[0]}:
        parts = (f"`{name}` {len(found)} of {runs}" for name, (found, runs) in some.items())
        every = [x for found, _ in some.values() for x in found], sum(runs for _, runs in ablated.values())
        lines.append(f"{share_of_runs(*every)} of ablations ({', '.join(parts)})")
    if not lines:
        return []
    text = (
        "**Lost form.** With feedback some runs come to a model that writes another number of lines than M_0 for more "
        f"than {100 * LOST:g} % of the test problems: {listed(lines)}"
    )
    return [f"{text}; no run of {listed(spared)}." if spared else f"{text}."]


def _with_models(page: Page, stage: str) -> list[dict]:
    return [r for r in page.study.records if r["stage"] == stage and r["greedy"]]
