"""What the study's results say: comparisons in words, ablations beside their base, the search, the head's drift."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..recipe import Recipe
from .plan import ABLATIONS, FAMILIES, Family, Pair, settings_of, tuned
from .statistics import METRICS, Estimate, Run, Study, Where, over_seeds
from .words import capital, counted, gap, judged, listed, settings_text

COMMAND = "python -m stepkto_fast.study"
FAMILY = FAMILIES["cpu"]
NARROW = 0.05  # no bound of an interval beyond this: what difference there may be is small


class Arm(NamedTuple):
    """What an arm does, and which labels it sees."""

    text: str
    outcomes: str
    steps: str
    seed_set: bool = False


ARMS = {
    "rft": Arm("fine-tunes on the model's own right answers", "yes", "no"),
    "kto": Arm("KTO on outcomes alone", "yes", "no"),
    "kto_more": Arm("`kto` with more prompts: as many more checked solutions as the PRM's seed set has", "yes", "no"),
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
    "step_beta_quarter": "a quarter of the step beta",
    "step_beta_times_4": "four times the step beta",
    "step_sum": "sum over steps instead of the mean",
    "after_mask": "steps behind the first wrong one are unlabelled",
    "kto_points_mismatched": "outcome-only KTO with KTO's mismatched pairs",
    "noise_05": "5 % of the step labels turned over",
    "noise_10": "10 % of the step labels turned over",
    "noise_20": "20 % of the step labels turned over",
    "reference_initial": "reference M_0 instead of M_t",
    "trunk_policy": "the head reads the policy's states",
    "trunk_trained": "the head trains a copy of the policy",
}
QUESTIONS = (
    ("Step labels or none", "step_kto", "kto"),
    ("Step labels or more prompts", "step_kto", "kto_more"),
    ("A PRM's labels or none", "step_kto_prm", "kto"),
    ("A PRM's labels or more prompts", "step_kto_prm", "kto_more"),
    ("A PRM's labels or exact ones", "step_kto_prm", "step_kto"),
    ("Step-KTO or fine-tuning on right answers", "step_kto", "rft"),
)
ASKED = ("pass@1", "flawed_correct")  # the metrics of the questions
DIFFERENCES = ("pass@1", "maj@8", "flawed_correct")  # those of the table of all differences
# metric -> what it means to be better and worse
WORDS = {
    "pass@1": ("a higher Pass@1", "a lower Pass@1"),
    "flawed_correct": ("fewer flawed right answers", "more flawed right answers"),
}
IMAGES = {
    "main": "Pass@1 and flawed right answers by iteration",
    "arms": "All arms by iteration",
    "differences": "Differences from outcome-only KTO",
    "shifted": "Pass@1 on longer chains",
    "drift": "AUROC of the PRM head by iteration",
    "ablations": "Ablations: differences from the base",
}


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

    def last(self, difficulty: str) -> int:
        """The last model's number: the iterations that runs were set to, whether or not any came so far."""
        runs = [r for r in self.study.records if r["stage"] == "main" and r["difficulty"] == difficulty]
        return max((setting(r, "iterations") for r in runs), default=Recipe.iterations)

    def difference(self, difficulty: str, a: str, b: str, metric: str, where: Where = "test") -> Estimate | None:
        return self.study.difference(("main", difficulty, a), ("main", difficulty, b), where, metric)

    def title(self, difficulty: str) -> str:
        """A difficulty with the lengths of its chains."""
        few, most = operations(self, difficulty)
        return f"{difficulty} ({few} to {most} operations)"

    def seeds(self, difficulty: str) -> int:
        """How many seeds the differences of arms are of where nothing is missing: the most that any has."""
        arms = [self.study.level(("main", difficulty, arm), "test", "pass@1") for arm in self.arms(difficulty)]
        return max((e.seeds for e in arms if e), default=0)

    def picture(self, name: str) -> list[str]:
        return [f"![{IMAGES[name]}]({self.images[name]})", ""] if name in self.images else []


def setting(record: dict, key: str) -> Any:
    """What a run was set to: its recipe holds what differs from the defaults."""
    return record["overrides"].get(key, record["recipe"].get(key, getattr(Recipe, key, None)))


def operations(page: Page, difficulty: str) -> tuple[int, int]:
    """The lengths of the chains of a difficulty."""
    run = next((r for r in page.study.records if (r["stage"], r["difficulty"]) == ("main", difficulty)), None)
    if run is None:
        return page.family.difficulties[difficulty].trained
    return setting(run, "min_operations"), setting(run, "max_operations")


def cost(record: dict) -> float | None:
    """CPU seconds of a run's training; None where a part of them was spent before it was continued."""
    if record.get("resumed") or "failed" in record:
        return None
    return record.get("train_cpu_seconds", record["cpu_seconds"])


def of_last(key: str) -> Callable[[dict], float | None]:
    return lambda record: record["iterations"][-1].get(key)


# ---- comparisons in words ----


class Compared(NamedTuple):
    """A difference of two arms in one metric at one difficulty."""

    metric: str
    difficulty: str
    difference: Estimate
    verdict: str


def compare(page: Page, a: str, b: str, where: Where = "test") -> list[Compared]:
    """a - b in the metrics of the questions, at each difficulty where a seed of both has finished."""
    return [
        Compared(m, d, e, judged(e, METRICS[m].good))
        for m in ASKED
        for d in page.difficulties()
        if (e := page.difference(d, a, b, m, where)) is not None
    ]


def sentence(found: list[Compared], a: str, b: str) -> str:
    """What the differences a - b show, each with its size."""
    parts = []
    for kind, place in (("better", 0), ("worse", 1)):
        said = _by_metric([x for x in found if x.verdict == kind])
        if said:
            parts.append(f"`{a}` has {listed(f'{WORDS[m][place]} ({of})' for m, of in said.items())} than `{b}`")
    for kind, text in (
        ("no difference", f"no difference could be shown between `{a}` and `{b}` in {{}}"),
        ("too few seeds", f"too few seeds for a verdict on `{a}` minus `{b}`, so far {{}}"),
    ):
        said = _by_metric([x for x in found if x.verdict == kind])
        if said:
            parts.append(text.format(listed(f"{METRICS[m].title} ({of})" for m, of in said.items())))
    return "; ".join(parts)


def _by_metric(found: list[Compared]) -> dict[str, str]:
    """metric -> the difficulties, each with its difference."""
    metrics = list(dict.fromkeys(x.metric for x in found))
    texts = {}
    for m in metrics:
        of = [x for x in found if x.metric == m]
        gaps = (f"{x.difficulty} {gap(x.difference, METRICS[m], unit=n == 0)}" for n, x in enumerate(of))
        texts[m] = ", ".join(gaps)
    return texts


def answer(page: Page, a: str, b: str) -> str:
    """Whether a wins over b, by how much, and on how much of what was planned that rests."""
    found, note = compare(page, a, b), scope(page, a, b)
    if not found:
        return f"Not answered yet: no seed of both `{a}` and `{b}` has finished." + (f" {note}" if note else "")
    kinds = {x.verdict for x in found} - {"too few seeds"}
    if not kinds:
        word = "Not answered yet"
    elif kinds == {"no difference"}:
        word = "Not shown either way"
    elif not _complete(page, a, b):
        word = "So far"
    elif "better" not in kinds:
        word = "No"
    else:
        word = "Mixed" if "worse" in kinds else "In part" if "no difference" in kinds else "Yes"
    return f"{word}: {sentence(found, a, b)}. {note}"


def scope(page: Page, a: str, b: str) -> str:
    """How many seeds a - b rests on at each difficulty, of those planned, what is not answered, and what failed."""
    planned, notes, missing = len(page.family.seeds), [], []
    for difficulty in _planned(page):
        e = page.difference(difficulty, a, b, "pass@1")
        if e is None:
            missing.append(difficulty)
        else:
            notes.append(f"{difficulty} {e.seeds} of {planned}")
    notes = [f"Seeds: {listed(notes)}"] if notes else []
    if notes and missing:
        notes.append(f"{listed(missing)} not answered yet")
    for name in (a, b):
        runs = [r for d in page.difficulties() for r in page.study.runs("main", d, name).values()]
        if failed := sum("failed" in r for r in runs):
            notes.append(f"{counted(failed, 'run')} of `{name}` failed")
    return f"{capital('; '.join(notes))}." if notes else ""


def _planned(page: Page) -> list[str]:
    return list(dict.fromkeys([*page.family.difficulties, *page.difficulties()]))


def _complete(page: Page, a: str, b: str) -> bool:
    """Whether all planned runs of two arms are done, failed or not."""
    return all(
        seed in page.study.runs("main", difficulty, name)
        for difficulty in page.family.difficulties
        for name in (a, b)
        for seed in page.family.seeds
    )


def growth(page: Page, a: str, b: str, metric: str) -> str | None:
    """Whether a - b in a metric grows or falls from M_1 to the last model, in words."""
    found: dict[str, list[str]] = {}
    for difficulty in page.difficulties():
        last = page.last(difficulty)
        runs: tuple[Run, Run] = ("main", difficulty, a), ("main", difficulty, b)
        e = page.study.change(*runs, 1, last, metric) if last > 1 else None
        if e is not None and e.seeds > 1:
            kind = judged(e, 1)
            found.setdefault(kind, []).append(f"{difficulty} ({gap(e, METRICS[metric])} to M_{last})")
    words = {
        "better": "grows on", "worse": "falls on", "no difference": "could not be shown to change on",
    }  # fmt: skip
    phrases = [f"{word} {listed(found[kind])}" for kind, word in words.items() if kind in found]
    return f"in {METRICS[metric].title} it {', it '.join(phrases)}" if phrases else None


def narrow(e: Estimate, planned: int) -> bool:
    """Whether nothing is shown by all planned seeds and an interval that leaves no room for a large difference."""
    return e.seeds >= planned and e.sign == 0 and max(abs(e.low), abs(e.high)) <= NARROW


def rows_of(page: Page, difficulty: str) -> list[tuple[str, Run]]:
    initial: Run = ("initial", difficulty, "initial")
    first = [("M_0", initial)] if page.study.runs(*initial) else []
    return first + [(f"`{name}`", ("main", difficulty, name)) for name in page.arms(difficulty)]


def pairs(page: Page) -> list[tuple[str, str]]:
    """Those of the questions, all arms against outcome-only KTO and against RFT, and the step loss alone."""
    arms = {arm: None for difficulty in page.difficulties() for arm in page.arms(difficulty)}
    asked = [(a, b) for _, a, b in QUESTIONS]
    against = [(a, b) for b in ("kto", "rft") for a in arms if a != b and (a, b) != ("kto", "rft")]
    found = dict.fromkeys([*asked, ("step_kto", "step_only"), *against])
    return [(a, b) for a, b in found if a in arms and b in arms]


def all_differences(page: Page) -> Iterator[Estimate]:
    """Every difference of last models that a table judges."""
    for a, b in pairs(page):
        for difficulty in page.difficulties():
            yield from (e for m in DIFFERENCES if (e := page.difference(difficulty, a, b, m)) is not None)
    for v in variants(page):
        yield from v.differences.values()


# ---- the PRM head ----


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
    """What the change of the head's AUROC shows, of the arms."""
    found: dict[str, list[str]] = {}
    for stage, difficulty, name in heads(page):
        if stage == "main" and (change := drift_of(page, (stage, difficulty, name))):
            e, first, last = change
            found.setdefault(judged(e, 1), []).append(f"`{name}` on {difficulty} ({gap(e)} from M_{first} to M_{last})")
    words = {
        "worse": "Self-labelling drifts: the PRM head tells right from wrong steps less well, its AUROC falls, with",
        "better": "The PRM head's AUROC rises with",
        "no difference": "No drift could be shown: the PRM head's AUROC could not be shown to change with",
        "too few seeds": "Too few seeds for a verdict on the drift of the PRM head's AUROC with",
    }
    return [f"{word} {listed(found[kind])}." for kind, word in words.items() if kind in found]


# ---- ablations ----


class Variant(NamedTuple):
    """An ablation beside its base, over the seeds of which both runs finished. `runs`: of the variant; `failed`: how
    many of them."""

    name: str
    difficulty: str
    base: str
    text: str
    differences: dict[str, Estimate]
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
            common = sorted(set(runs) & set(others))
            costs = [(x, y) for s in common if (x := cost(runs[s])) and (y := cost(others[s]))]
            changed: dict[str, Any] = {}
            for s in common[:1]:
                changed = {k: v for k, v in runs[s]["overrides"].items() if setting(others[s], k) != v}
            text = VARIANTS.get(name) or settings_text(changed or some["overrides"])
            times = sum(x for x, _ in costs) / sum(y for _, y in costs) if costs else None
            failed = sum("failed" in r for r in runs.values())
            found.append(Variant(name, difficulty, base, text, differences, len(runs), failed, times))
    return found


def failed_variants(found: list[Variant]) -> list[str]:
    """A line on those of which runs failed, if any did."""
    names = [f"`{v.name}` ({v.failed} of {counted(v.runs, 'run')})" for v in found if v.failed]
    return [f"Failed: {listed(names)}."] if names else []


def noise_of(name: str) -> float | None:
    """The share of labels that a variant turns over; None where it does not: noise is no choice that one has."""
    return ABLATIONS[name][1].get("step_label_noise") if name in ABLATIONS else None


# ---- the search ----


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
