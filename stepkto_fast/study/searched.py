"""What the search tried, and what it chose."""

from typing import Any, NamedTuple

from .findings import ARMS, Page, setting
from .plan import Pair, settings_of, tuned


class Tried(NamedTuple):
    """One setting of the search. `rate`: mean Pass@1 of the last model on validation problems, a failed run's 0.
    `kl`: its mean KL from M_0, of the runs that finished. `initial`: Pass@1 of M_0."""

    arm: str
    difficulty: str
    pair: Pair
    seeds: int
    failed: int
    rate: float
    kl: float | None
    initial: float | None
    chosen: bool


def searched(page: Page) -> list[Tried]:
    """All that was tried. Chosen is what the main runs of an arm are set to, before there are any what the search
    ended with."""
    found = []
    for difficulty in page.study.difficulties("search"):
        for name in page.study.names("search", difficulty):
            runs = list(page.study.runs("search", difficulty, name).values())
            arm, overrides = runs[0]["arm"], runs[0]["overrides"]
            pair: Pair = overrides["learning_rate"], overrides.get("beta")
            finished = [r for r in runs if "failed" not in r]
            right = [_share_right(r["greedy"][-1]) for r in finished]
            starts = [_share_right(r["greedy"][0]) for r in runs if r["greedy"]]
            kl = [x for r in finished if (x := r["iterations"][-1].get("kl_from_initial")) is not None]
            main = next(iter(page.study.runs("main", difficulty, arm).values()), None)
            if main is not None:
                chosen = setting(main, "learning_rate") == pair[0] and pair[1] in (None, setting(main, "beta"))
            else:
                chosen = settings_of(pair) == found_by_search(page, difficulty, arm)
            found.append(
                Tried(
                    arm, difficulty, pair, len(runs), len(runs) - len(finished), sum(right) / len(runs),
                    sum(kl) / len(kl) if kl else None, sum(starts) / len(starts) if starts else None, chosen,
                )
            )  # fmt: skip
    order = list(ARMS)
    places = {d: n for n, d in enumerate(page.study.difficulties("search"))}

    def place(t: Tried) -> tuple:
        at = order.index(t.arm) if t.arm in order else len(order)
        return places[t.difficulty], at, t.arm, t.pair[1] or 0.0, t.pair[0]

    return sorted(found, key=place)


def found_by_search(page: Page, difficulty: str, arm: str) -> dict[str, Any] | None:
    """What the search of an arm ended with; None while it is not over."""
    records = [r for r in page.study.records if r["stage"] == "search"]
    return tuned(page.family, difficulty, arm, records) if difficulty in page.family.difficulties else None


def _share_right(greedy: dict) -> float:
    return greedy["right"].count("1") / len(greedy["right"])


def pair_text(pair: Pair) -> str:
    """A setting of the search: learning rate and beta."""
    return " and ".join(f"{x:g}" for x in pair if x is not None)
