"""What the study's results say: comparisons in words, ablations beside their base, the search, the head's drift."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..recipe import Recipe
from .plan import FAMILIES, Family
from .statistics import METRICS, Estimate, Run, Study, Where
from .words import capital, counted, gap, judged, listed

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
    "classes_unweighted": "right and wrong are not brought to the same weight",
    "outcome_none": "the step loss alone, at the base's learning rate and beta",
    "unweighted_outcome_none": "as `classes_unweighted`, the step loss alone",
    "outcome_right": "as `classes_unweighted`, no outcome loss of wrong answers",
    "outcome_wrong": "as `classes_unweighted`, no outcome loss of right answers",
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
    ("Both losses or the step loss alone", "step_kto", "step_only"),
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
    """What a run was set to; the default of what is not in its recipe, for a setting that came later."""
    return record["overrides"].get(key, record["recipe"].get(key, getattr(Recipe, key, None)))


def operations(page: Page, difficulty: str) -> tuple[int, int]:
    """The lengths of the chains of a difficulty."""
    run = next((r for r in page.study.records if (r["stage"], r["difficulty"]) == ("main", difficulty)), None)
    if run is None:
        return page.family.difficulties[difficulty].trained
    return setting(run, "min_operations"), setting(run, "max_operations")


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
    notes = [f"Finished seeds: {listed(notes)}"] if notes else []
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
    """Whether a - b in a metric moves in favour of a or of b from M_1 to the last model, in words."""
    found: dict[str, list[str]] = {}
    for difficulty in page.difficulties():
        last = page.last(difficulty)
        runs: tuple[Run, Run] = ("main", difficulty, a), ("main", difficulty, b)
        e = page.study.change(*runs, 1, last, metric) if last > 1 else None
        if e is not None and e.seeds > 1:
            kind = judged(e, METRICS[metric].good)
            found.setdefault(kind, []).append(f"{difficulty} ({gap(e, METRICS[metric])} to M_{last})")
    words = {
        "better": f"moves in favour of `{a}` on", "worse": f"moves in favour of `{b}` on",
        "no difference": "could not be shown to change on",
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
    """Those of the questions, all arms against outcome-only KTO and against RFT, and Step-KTO against more prompts and
    DPO."""
    arms = {arm: None for difficulty in page.difficulties() for arm in page.arms(difficulty)}
    asked = [(a, b) for _, a, b in QUESTIONS]
    against = [(a, b) for b in ("kto", "rft") for a in arms if a != b and (a, b) != ("kto", "rft")]
    found = dict.fromkeys([*asked, ("step_kto", "kto_more"), ("step_kto", "dpo"), *against])
    return [(a, b) for a, b in found if a in arms and b in arms]
