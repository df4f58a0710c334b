"""What the study's results say: comparisons in words, ablations beside their base, the search, the head's drift."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..recipe import Recipe
from .plan import FAMILIES, Family
from .statistics import METRICS, Estimate, Metric, Run, Study, Where, over_seeds
from .words import gap, judged, listed, settings_text

COMMAND = "python -m stepkto_fast.study"
FAMILY = FAMILIES["cpu"]


class Arm(NamedTuple):
    """What an arm does, and which labels it sees."""

    text: str
    outcomes: str
    steps: str
    seed_set: bool = False


ARMS = {
    "rft": Arm("fine-tunes on the model's own right answers", "yes", "no"),
    "kto": Arm("KTO on outcomes alone", "yes", "no"),
    "kto_more": Arm("`kto` with as many more rollouts as the PRM's seed set has completions", "yes", "no"),
    "dpo": Arm("DPO on pairs of a right and a wrong answer", "yes", "no"),
    "step_only": Arm("the step loss alone", "no", "yes"),
    "step_kto": Arm("Step-KTO: outcomes and exact step labels", "yes", "yes"),
    "step_kto_prm": Arm("Step-KTO with the step labels of a PRM head, fitted on a seed set", "yes", "no", True),
}
VARIANTS = {
    "points_lagged": "reference points: moving average of earlier batches",
    "points_exact": "reference points: exact KL",
    "points_mismatched": "reference points: KTO's mismatched pairs",
    "step_weight_0.3": "step loss weighs 0.3",
    "step_weight_3": "step loss weighs 3",
    "step_beta_0.2": "step beta 0.2",
    "step_beta_1": "step beta 1",
    "step_beta_quarter": "a quarter of the step beta",
    "step_beta_times_4": "four times the step beta",
    "step_sum": "sum over steps instead of the mean",
    "after_mask": "steps behind the first wrong one are unlabelled",
    "noise_05": "5 % of the step labels turned over",
    "noise_10": "10 % of the step labels turned over",
    "noise_20": "20 % of the step labels turned over",
    "reference_initial": "reference M_0 instead of M_t",
    "trunk_policy": "the head reads the policy's states",
    "trunk_trained": "the head trains a copy of the policy",
}
BASES = ("kto", "rft")  # what every arm is compared with
PAIRS = (
    ("step_kto_prm", "step_kto"),
    ("step_kto", "kto_more"),
    ("step_kto_prm", "kto_more"),
    ("step_kto", "step_only"),
)
TUNED = ("learning_rate", "beta", "step_beta")
IMAGES = {
    "main": "Pass@1 and flawed right answers by iteration",
    "arms": "All arms by iteration",
    "differences": "Differences from outcome-only KTO",
    "shifted": "Pass@1 on longer chains",
    "drift": "F1 of the PRM head by iteration",
    "ablations": "Ablations: differences from the base",
}
NAMES = {
    "pass@1": "Pass@1", "flawed_correct": "Flawed right answers (fewer are better)", "maj@8": "Maj@8",
}  # fmt: skip


@dataclass(eq=False)
class Page:
    """The results, the family that they belong to, and where the figures are."""

    study: Study
    family: Family
    images: Mapping[str, str]

    def difficulties(self) -> list[str]:
        return self.study.difficulties("main")

    def arms(self, difficulty: str) -> list[str]:
        return self.study.names("main", difficulty, ARMS)

    def last(self, difficulty: str, stage: str = "main") -> int:
        """The last model's number."""
        lengths = (len(r["greedy"]) for r in self.study.records if (r["stage"], r["difficulty"]) == (stage, difficulty))
        return max([1, *lengths]) - 1

    def difference(self, difficulty: str, a: str, b: str, metric: str, where: Where = "test") -> Estimate | None:
        return self.study.difference(("main", difficulty, a), ("main", difficulty, b), where, metric)

    def picture(self, name: str) -> list[str]:
        return [f"![{IMAGES[name]}]({self.images[name]})", ""] if name in self.images else []


def setting(record: dict, key: str) -> Any:
    """What a run was set to: its recipe holds what differs from the defaults."""
    return record["overrides"].get(key, record["recipe"].get(key, getattr(Recipe, key, None)))


def cost(record: dict) -> float | None:
    """CPU seconds of a run's training; None where a part of them was spent before it was continued."""
    if record.get("resumed") or "failed" in record:
        return None
    return record.get("train_cpu_seconds", record["cpu_seconds"])


def of_last(key: str) -> Callable[[dict], float | None]:
    return lambda record: None if "failed" in record else record["iterations"][-1].get(key)


def by_verdict(found: Iterable[tuple[str, Estimate]], metric: Metric) -> dict[str, list[str]]:
    """verdict -> the places that have it, each with its difference."""
    groups: dict[str, list[str]] = {}
    for place, e in found:
        groups.setdefault(judged(e, metric.good), []).append(f"{place} ({gap(e, metric, unit=False)})")
    return groups


def compared(page: Page, a: str, b: str, metric: str, where: Where = "test", said: bool = True) -> str | None:
    """A sentence on a - b over all difficulties; None where nothing can be compared."""
    found = [(d, e) for d in page.difficulties() if (e := page.difference(d, a, b, metric, where)) is not None]
    groups = by_verdict(found, METRICS[metric])
    words = {
        "better": f"`{a}` is ahead of `{b}` on",
        "worse": f"`{a}` is behind `{b}` on",
        "no difference": f"no difference could be shown between `{a}` and `{b}` on",
        "too few seeds": f"too few seeds for a verdict between `{a}` and `{b}` on",
    }
    phrases = [f"{word} {listed(groups[kind])}" for kind, word in words.items() if kind in groups]
    return f"{NAMES.get(metric, METRICS[metric].title)}: {'; '.join(phrases)}." if phrases else None


def answer(page: Page, a: str, b: str) -> str:
    """Whether a wins over b, in Pass@1 and in flawed right answers."""
    found: dict[str, dict[str, list[str]]] = {}
    for metric, name in (("pass@1", "Pass@1"), ("flawed_correct", "flawed right answers")):
        for difficulty in page.difficulties():
            e = page.difference(difficulty, a, b, metric)
            if e is not None:
                found.setdefault(judged(e, METRICS[metric].good), {}).setdefault(name, []).append(difficulty)
    places = {kind: listed(f"{name} ({listed(where)})" for name, where in of.items()) for kind, of in found.items()}
    ahead, behind, same = (places.get(kind, "") for kind in ("better", "worse", "no difference"))
    if not (ahead or behind or same):
        return f"Not answered yet: `{a}` and `{b}` have too few seeds in common."
    if not (ahead or behind):
        return f"Not shown: no difference between `{a}` and `{b}` in {same}."
    parts = [f"`{a}` is ahead of `{b}` in {ahead}"] if ahead else []
    parts += [f"`{a}` is behind `{b}` in {behind}"] if behind else []
    parts += [f"no difference could be shown in {same}"] if same else []
    word = "No" if not ahead else "In part" if behind or same else "Yes"
    return f"{word}: {'; '.join(parts)}."


def growth(page: Page, a: str, b: str, metric: str) -> str | None:
    """Whether the lead of a over b grows from M_1 to the last model, in words."""
    good = METRICS[metric].good
    found: dict[str, list[str]] = {}
    for difficulty in page.difficulties():
        last = page.last(difficulty)
        runs: tuple[Run, Run] = ("main", difficulty, a), ("main", difficulty, b)
        e = page.study.change(*runs, 1, last, metric) if last > 1 else None
        if e is not None:
            kind = judged(e, good)
            steps = [page.difference(difficulty, a, b, metric, t) for t in range(1, last + 1)]
            values = [good * x.value for x in steps if x is not None]
            each = all(x < y for x, y in itertools.pairwise(values))
            note = f"M_1 to M_{last}, {'growing' if each else 'not growing'} at each iteration"
            found.setdefault(kind, []).append(f"{difficulty} ({gap(e, METRICS[metric], unit=False)} from {note})")
    words = {
        "better": "grows on", "worse": "shrinks on", "no difference": "could not be shown to change on",
        "too few seeds": "has too few seeds for a verdict on",
    }  # fmt: skip
    phrases = [f"{word} {listed(found[kind])}" for kind, word in words.items() if kind in found]
    name = NAMES[metric].partition(" (")[0].replace("Flawed", "flawed")
    return f"The lead of `{a}` over `{b}` in {name} {'; it '.join(phrases)}." if phrases else None


def rows_of(page: Page, difficulty: str) -> list[tuple[str, Run]]:
    initial: Run = ("initial", difficulty, "initial")
    first = [("M_0", initial)] if page.study.runs(*initial) else []
    return first + [(f"`{name}`", ("main", difficulty, name)) for name in page.arms(difficulty)]


DIFFERENCES = ("pass@1", "maj@8", "pass@8", "flawed_correct", "first_error")


def pairs(page: Page, difficulty: str) -> list[tuple[str, str]]:
    """All arms against each base, then the pairs of their own questions."""
    arms = page.arms(difficulty)
    found = [(a, b) for b in BASES if b in arms for a in arms if a != b and (a, b) != BASES]
    return found + [(a, b) for a, b in PAIRS if a in arms and b in arms]


def heads(page: Page) -> list[Run]:
    """The runs that have a PRM head."""
    found: list[Run] = []
    for stage in ("main", "ablations"):
        for difficulty in page.study.difficulties(stage):
            for name in page.study.names(stage, difficulty, [*ARMS, *VARIANTS]):
                run = (stage, difficulty, name)
                if any(_f1(r, t) is not None for r in page.study.runs(*run).values() for t in range(20)):
                    found.append(run)
    return found


def _f1(record: dict, iteration: int) -> float | None:
    records = record["iterations"]
    return records[iteration].get("prm_f1") if iteration < len(records) else None


def head_f1(page: Page, run: Run, iteration: int) -> Estimate | None:
    return page.study.over(run, lambda record: _f1(record, iteration))


def drift_of(page: Page, run: Run) -> tuple[Estimate, int, int] | None:
    """How much the head's F1 changes from the first to the last model of which it is known, and which those are."""
    known = [t for t in range(page.last(run[1], run[0]) + 1) if head_f1(page, run, t) is not None]
    if len(known) < 2:
        return None
    ends = [[_f1(r, t) for t in (known[0], known[-1])] for r in page.study.runs(*run).values()]
    changes = [last - first for first, last in ends if first is not None and last is not None]
    return (over_seeds(changes), known[0], known[-1]) if changes else None


def drift_sentences(page: Page) -> list[str]:
    """What the change of the head's F1 shows, of the arms."""
    found: dict[str, list[str]] = {}
    for stage, difficulty, name in heads(page):
        if stage == "main" and (change := drift_of(page, (stage, difficulty, name))):
            e, first, last = change
            kind = {"better": "rises", "worse": "falls"}.get(judged(e, 1), judged(e, 1))
            found.setdefault(kind, []).append(f"`{name}` on {difficulty} ({_f1_gap(e)} from M_{first} to M_{last})")
    words = {
        "falls": "Self-labelling drifts: the F1 of the PRM head falls with",
        "rises": "The F1 of the PRM head rises with",
        "no difference": "No drift of the PRM head's F1 could be shown with",
        "too few seeds": "Too few seeds for a verdict on the drift of the PRM head's F1 with",
    }
    return [f"{word} {listed(found[kind])}." for kind, word in words.items() if kind in found]


def _f1_gap(e: Estimate) -> str:
    return f"{e.value:+.3f}" + ("" if math.isnan(e.low) else f" [{e.low:+.3f}, {e.high:+.3f}]")


class Variant(NamedTuple):
    """An ablation beside its base, over the seeds that both have."""

    name: str
    difficulty: str
    base: str
    text: str
    differences: dict[str, Estimate]
    seeds: int
    cost: float | None


def variants(page: Page) -> list[Variant]:
    """All ablations that can be compared, in the order of VARIANTS."""
    found = []
    for difficulty in page.study.difficulties("ablations"):
        for name in page.study.names("ablations", difficulty, VARIANTS):
            run: Run = ("ablations", difficulty, name)
            runs = page.study.runs(*run)
            base = base_of(next(iter(runs.values())))
            against: Run = next(
                (r for r in (("ablations", difficulty, base), ("main", difficulty, base)) if page.study.runs(*r)),
                ("main", difficulty, base),
            )
            others = page.study.runs(*against)
            if run == against:
                continue
            last = page.last(difficulty, "ablations")
            differences = {
                m: e for m in ("pass@1", "flawed_correct") if (e := page.study.difference(run, against, last, m))
            }
            common = sorted(set(runs) & set(others))
            costs = [(x, y) for s in common if (x := cost(runs[s])) and (y := cost(others[s]))]
            changed: dict[str, Any] = {}
            for s in common[:1]:
                changed = {k: v for k, v in runs[s]["overrides"].items() if setting(others[s], k) != v}
            text = VARIANTS.get(name) or settings_text(changed or next(iter(runs.values()))["overrides"])
            times = sum(x for x, _ in costs) / sum(y for _, y in costs) if costs else None
            found.append(Variant(name, difficulty, base, text, differences, len(common), times))
    return found


def base_of(record: dict) -> str:
    """The arm that a variant is one of: the file says it; else by who labels its steps."""
    return record.get("arm") or ("step_kto_prm" if setting(record, "label_source") == "head" else "step_kto")


class Tried(NamedTuple):
    """One setting of the search. `rate`: mean Pass@1 on validation problems, a failed run's 0."""

    arm: str
    difficulty: str
    values: dict[str, Any]
    seeds: int
    failed: int
    rate: float
    flawed: Estimate | None
    chosen: bool


def searched(page: Page) -> list[Tried]:
    found = []
    for difficulty in page.study.difficulties("search"):
        for name in page.study.names("search", difficulty):
            run: Run = ("search", difficulty, name)
            runs = list(page.study.runs(*run).values())
            arm = runs[0].get("arm") or max((a for a in ARMS if name.startswith(a)), key=len, default=name)
            values = {k: runs[0]["overrides"][k] for k in TUNED if k in runs[0]["overrides"]}
            main = next(iter(page.study.runs("main", difficulty, arm).values()), None)
            failed = sum("failed" in r for r in runs)
            right = [0.0 if "failed" in r else _share_right(r["greedy"][-1]) for r in runs]
            flawed = page.study.level(run, page.last(difficulty, "search"), "flawed_correct")
            chosen = main is not None and all(setting(main, k) == v for k, v in values.items())
            found.append(
                Tried(arm, difficulty, values, len(runs), failed, sum(right) / len(right), flawed, chosen)
            )  # fmt: skip
    order = list(ARMS)

    def place(t: Tried) -> tuple:
        values = (t.values.get(key) for key in TUNED)
        return t.difficulty, order.index(t.arm) if t.arm in order else len(order), t.arm, *map(_rank, values)

    return sorted(found, key=place)


def _rank(x: Any) -> tuple[bool, float, str]:
    number = isinstance(x, int | float)
    return not number, float(x) if number else 0.0, str(x)


def _share_right(greedy: dict) -> float:
    return greedy["right"].count("1") / len(greedy["right"])


def all_differences(page: Page) -> Iterator[tuple[Estimate, int]]:
    """Every difference that a table judges, with which direction is good."""
    for difficulty in page.difficulties():
        for a, b in pairs(page, difficulty):
            for m in DIFFERENCES:
                if (e := page.difference(difficulty, a, b, m)) is not None:
                    yield e, METRICS[m].good
    for v in variants(page):
        yield from ((e, METRICS[m].good) for m, e in v.differences.items())
