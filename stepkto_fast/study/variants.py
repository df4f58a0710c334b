"""The ablations beside their base, and how many differences the page judges with them."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from .findings import ASKED, DIFFERENCES, VARIANTS, Page, pairs, setting
from .plan import ABLATIONS
from .statistics import Estimate, Run
from .words import counted, listed, settings_text


class Variant(NamedTuple):
    """An ablation beside its base, over the seeds of which both runs finished.

    `differences`: of the last models; `earlier`: in Pass@1, of those before; `runs`: of the variant, and `failed`: how
    many of them; `same`: whether every greedy solution was judged as the base's.
    """

    name: str
    difficulty: str
    base: str
    text: str
    differences: dict[str, Estimate]
    earlier: dict[int, Estimate]
    same: bool
    runs: int
    failed: int
    cost: float | None

    @property
    def seeds(self) -> int:
        return max((e.seeds for e in self.differences.values()), default=0)


def variants(page: Page) -> list[Variant]:
    """All ablations that have a result, in the order of VARIANTS."""
    found = []
    for difficulty in page.study.difficulties("ablations"):
        for name in page.study.names("ablations", difficulty, VARIANTS):
            run: Run = ("ablations", difficulty, name)
            runs = page.study.runs(*run)
            some = next(iter(runs.values()))
            base = some.get("arm") or ("step_kto_prm" if setting(some, "label_source") == "head" else "step_kto")
            against: Run = ("main", difficulty, base)
            others = page.study.runs(*against)
            differences = {m: e for m in ASKED if (e := page.study.difference(run, against, "test", m))}
            earlier = by_model(page, run, against, page.last(difficulty) - 1)
            common = sorted(set(runs) & set(others))
            same = bool(common) and all(runs[s]["greedy"] == others[s]["greedy"] for s in common)
            own, of_base = cost(runs.values()), cost(others.values())
            changed: dict[str, Any] = {}
            for s in common[:1]:
                changed = {k: v for k, v in runs[s]["overrides"].items() if setting(others[s], k) != v}
            text = VARIANTS.get(name) or settings_text(changed or some["overrides"])
            times = own / of_base if own and of_base else None
            failed = sum("failed" in r for r in runs.values())
            found.append(Variant(name, difficulty, base, text, differences, earlier, same, len(runs), failed, times))
    return found


# The step loss alone, at one learning rate and beta, and what adds outcome loss to it.
WITH_OUTCOMES: dict[str, dict[tuple[str, str], str]] = {
    "outcome_none": {
        ("ablations", "step_weight_3"): "both, the step loss weighs 3",
        ("main", "step_kto"): "both, each weighs 1",
        ("ablations", "step_weight_0.3"): "both, the step loss weighs 0.3",
    },
    "unweighted_outcome_none": {
        ("ablations", "outcome_right"): "outcomes of right answers alone",
        ("ablations", "classes_unweighted"): "both, each weighs 1",
        ("ablations", "outcome_wrong"): "outcomes of wrong answers alone",
    },
}


class WithOutcomes(NamedTuple):
    """A run that has outcome loss, beside the same settings without it, over common seeds: Pass@1 of each model, and
    flawed right answers of the last."""

    alone: str
    stage: str
    name: str
    text: str
    models: dict[int, Estimate]
    flawed: Estimate | None


def with_outcomes(page: Page, difficulty: str) -> list[WithOutcomes]:
    """What the outcome loss does to the step loss, all else equal."""
    found = []
    for alone, runs in WITH_OUTCOMES.items():
        for (stage, name), text in runs.items():
            pair: tuple[Run, Run] = (stage, difficulty, name), ("ablations", difficulty, alone)
            if models := by_model(page, *pair, page.last(difficulty)):
                flawed = page.study.difference(*pair, "test", "flawed_correct")
                found.append(WithOutcomes(alone, stage, name, text, models, flawed))
    return found


def by_model(page: Page, a: Run, b: Run, last: int) -> dict[int, Estimate]:
    """a - b in Pass@1, of M_1 to M_last."""
    return {t: e for t in range(1, last + 1) if (e := page.study.difference(a, b, t, "pass@1"))}


def failed_variants(found: list[Variant]) -> list[str]:
    """A line on those of which runs failed, if any did."""
    names = [f"`{v.name}` ({v.failed} of {counted(v.runs, 'run')})" for v in found if v.failed]
    return [f"Failed: {listed(names)}."] if names else []


def noise_of(name: str) -> float | None:
    """The share of labels that a variant turns over; None where it does not: noise is no choice that one has."""
    return ABLATIONS[name][1].get("step_label_noise") if name in ABLATIONS else None


def all_differences(page: Page) -> Iterator[Estimate]:
    """Every difference that a table judges."""
    for a, b in pairs(page):
        for difficulty in page.difficulties():
            yield from (e for m in DIFFERENCES if (e := page.difference(difficulty, a, b, m)) is not None)
    for v in variants(page):
        yield from v.differences.values()
        yield from v.earlier.values()
    for difficulty in page.study.difficulties("ablations"):
        for x in with_outcomes(page, difficulty):
            if x.name != "step_kto":  # minus outcome_none: among the variants, the other way round
                yield from x.models.values()
                if x.flawed is not None:
                    yield x.flawed


def cost(records: Iterable[dict]) -> float | None:
    """CPU seconds of training: the fewest of some runs, since what else a machine does can only add to them. A run that
    was continued spent a part of them before."""
    whole = [r for r in records if not r.get("resumed") and "failed" not in r]
    return min((r.get("train_cpu_seconds", r["cpu_seconds"]) for r in whole), default=None)
