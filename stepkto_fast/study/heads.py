"""The PRM heads of the runs: how well they tell right from wrong steps, and whether that drifts."""

from .findings import ARMS, VARIANTS, Page
from .statistics import Estimate, Run, over_seeds
from .words import gap, judged, listed


def heads(page: Page) -> list[Run]:
    """The runs that have a PRM head."""
    found: list[Run] = []
    for stage in ("main", "ablations"):
        for difficulty in page.study.difficulties(stage):
            for name in page.study.names(stage, difficulty, [*ARMS, *VARIANTS]):
                run = (stage, difficulty, name)
                if any(head(page, run, t) is not None for t in range(page.last(difficulty) + 1)):
                    found.append(run)
    return found


def _of_head(record: dict, iteration: int, key: str) -> float | None:
    records = record["iterations"]
    return records[iteration].get("prm", {}).get(key) if iteration < len(records) else None


def head(page: Page, run: Run, iteration: int, key: str = "auroc") -> Estimate | None:
    """A figure of the head on test problems' steps, labelled by the exact checker."""
    return page.study.over(run, lambda record: _of_head(record, iteration, key))


def drift_of(page: Page, run: Run) -> tuple[Estimate, int, int] | None:
    """How much the head's AUROC changes from the first to the last model of which it is known, and which those are.

    AUROC is judged and not F1: that follows how many steps are wrong, which become fewer as the policy learns.
    """
    known = [t for t in range(page.last(run[1]) + 1) if head(page, run, t) is not None]
    if len(known) < 2:
        return None
    finished = [r for r in page.study.runs(*run).values() if "failed" not in r]
    ends = [[_of_head(r, t, "auroc") for t in (known[0], known[-1])] for r in finished]
    changes = [last - first for first, last in ends if first is not None and last is not None]
    return (over_seeds(changes), known[0], known[-1]) if changes else None


def drift_sentences(page: Page) -> list[str]:
    """What the change of the head's AUROC shows, of arms and variants."""
    found: dict[str, list[str]] = {}
    for stage, difficulty, name in heads(page):
        if change := drift_of(page, (stage, difficulty, name)):
            e, first, last = change
            found.setdefault(judged(e, 1), []).append(f"`{name}` on {difficulty} ({gap(e)} from M_{first} to M_{last})")
    words = {
        "worse": "Self-labelling drifts: the PRM head tells right from wrong steps less well, its AUROC falls, with",
        "better": "The PRM head's AUROC rises with",
        "no difference": "No drift could be shown: the PRM head's AUROC could not be shown to change with",
        "too few seeds": "Too few seeds for a verdict on the drift of the PRM head's AUROC with",
    }
    return [f"{word} {listed(found[kind])}." for kind, word in words.items() if kind in found]
