"""The statistics of the study: its result files as arrays, and intervals over seeds and problems.

Every figure is a ratio of two sums over seeds and problems; a mean's second sum counts. All seeds of an arm, and all
arms, answer the same problems, so a difference is taken seed by seed and problem by problem. Its interval must hold
two kinds of chance, another seed and another set of problems, and is the hull of two intervals:

- a percentile bootstrap that draws seeds and problems, both with replacement and independently of each other (the
  pigeonhole bootstrap, Owen 2007, doi 10.1214/07-AOAS122), the same draws for all arms;
- Student's t interval of the seeds' own values: the bootstrap of five seeds alone is too narrow.

A difference counts as shown where both exclude 0, which is where their hull does. One seed has no interval: other
problems alone are not what the study is asked about.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..estimators import CHUNK, pass_at_k, ratio
from .results import digits, sampled

RESAMPLES = 4000
Verdict = Literal["better", "worse", "no difference"]
Term = tuple[float, NDArray]
Run = tuple[str, str, str]  # stage, difficulty, name
Where = int | Literal["test", "shifted"]

# ---- intervals ----


class Estimate(NamedTuple):
    """A value with its interval (low, high), nan where there is none. `seeds`: how many of them have a value."""

    value: float
    low: float
    high: float
    seeds: int

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies on one side of 0; 0 elsewhere, and with fewer than two seeds."""
        if self.seeds < 2 or math.isnan(self.low):
            return 0
        return int(self.low > 0) - int(self.high < 0)

    def as_share(self) -> "Estimate":
        """With an interval that stays in [0, 1]."""
        return self._replace(low=max(self.low, 0.0), high=min(self.high, 1.0))

    def verdict(self, good: int) -> Verdict:
        """What a difference shows of its first arm. `good`: 1 where more is better, -1 where less is."""
        return "no difference" if self.sign == 0 else "better" if self.sign == good else "worse"


def contrast(
    terms: Sequence[Term], *, seed: int = 0, resamples: int = RESAMPLES, level: float = 0.95, share: bool = False
) -> Estimate:
    """A weighted sum of ratios with its interval: one term for a level, (1, a) and (-1, b) for a difference a - b.

    Args:
        terms: (weight, values) with values (seeds, problems, 2), whose ratio is that of the two sums over both axes, as
            in `estimators.ratio`. All have the same seeds and problems in the same order. A seed where any of them has
            no ratio counts in none.
        seed: of the draws; all calls with as many seeds and problems have the same draws.
        share: the value lies in [0, 1], and so does the interval.

    Returns:
        The hull of both intervals; none where fewer than two seeds have a value.

    Raises:
        ValueError: where terms differ in shape.
    """
    if len(shapes := {np.shape(values) for _, values in terms}) != 1:
        raise ValueError(f"terms need values of one shape (seeds, problems, 2), got {sorted(shapes)}")
    of_seeds = np.array(sum(weight * ratio(values) for weight, values in terms), dtype=float)
    has_value = ~np.isnan(of_seeds)
    terms, of_seeds = [(weight, values[has_value]) for weight, values in terms], of_seeds[has_value]
    if not len(of_seeds):
        return Estimate(math.nan, math.nan, math.nan, 0)
    value = sum(weight * float(ratio(values.sum(axis=0))) for weight, values in terms)
    low = high = math.nan
    if len(of_seeds) > 1:
        intervals = [_bootstrap(terms, seed, resamples, level), t_interval(of_seeds, level)]
        low, high = min(x[0] for x in intervals), max(x[1] for x in intervals)
        if share:
            low, high = max(low, 0.0), min(high, 1.0)
    # What is 0 but for the rounding of sums is 0.
    value, low, high = (round(x, 12) + 0.0 for x in (value, low, high))
    return Estimate(value, low, high, len(of_seeds))


def over_seeds(values: ArrayLike, level: float = 0.95) -> Estimate:
    """The mean of one value a seed, with its t interval; nan are left out."""
    x = np.asarray(values, dtype=float)
    x = x[~np.isnan(x)]
    return Estimate(float(x.mean()) if len(x) else math.nan, *t_interval(x, level), len(x))


def t_interval(values: NDArray, level: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean of (seeds,) values; nan are left out, (nan, nan) with fewer than two others."""
    x = values[~np.isnan(values)]
    if len(x) < 2:
        return math.nan, math.nan
    half = t_quantile((1 + level) / 2, len(x) - 1) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return float(x.mean()) - half, float(x.mean()) + half


@cache
def t_quantile(p: float, df: int) -> float:
    """The p-quantile, 0.5 <= p < 1, of Student's t with `df` degrees of freedom.

    Bisection of Abramowitz and Stegun 1964, equations 26.7.3 and 26.7.4: the distribution as a finite sum in the angle
    atan(t / sqrt(df)).
    """
    if not (0.5 <= p < 1 and df >= 1):
        raise ValueError(f"t_quantile({p}, {df}): needs 0.5 <= p < 1 and df >= 1")
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, df) < 2 * p - 1 else (low, middle)
    return math.sqrt(df) * math.tan((low + high) / 2)


def _t_within(angle: float, df: int) -> float:
    """P(|T| <= sqrt(df) tan(angle))."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = df % 2
    term, total = cosine if odd else 1.0, 0.0
    for k in range(1 + odd, df, 2):  # the exponents of the cosine, raised by one
        total += term
        term *= cosine**2 * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def _bootstrap(terms: Sequence[Term], seed: int, resamples: int, level: float) -> tuple[float, float]:
    seeds, problems, _ = terms[0][1].shape
    # (problems, seeds * 2): one product with the problems' counts sums each resample over problems.
    flat = [(weight, np.swapaxes(values, 0, 1).reshape(problems, -1)) for weight, values in terms]
    rows = max(1, CHUNK // problems)
    found = []
    for start in range(0, resamples, rows):
        many = min(rows, resamples - start)
        of_problems = draws(problems, many, (seed, start, 0)).astype(float)
        of_seeds = draws(seeds, many, (seed, start, 1))[:, :, None]
        # (many, seeds, 2) -> (many, 1, 2): what is left for `ratio` to sum has one entry.
        sums = [(w, (of_seeds * (of_problems @ x).reshape(many, seeds, 2)).sum(1, keepdims=True)) for w, x in flat]
        found.append(np.asarray(sum(weight * ratio(x) for weight, x in sums)))
    every = np.concatenate(found)
    low, high = np.nanquantile(every, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@lru_cache(maxsize=8)
def draws(units: int, resamples: int, seed: tuple[int, ...]) -> NDArray[np.uint16]:
    """How often each unit is drawn when as many are drawn with replacement: (resamples, units)."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(units, np.full(units, 1 / units), size=resamples).astype(np.uint16)


# ---- what is measured ----


@dataclass(frozen=True)
class Metric:
    """`parts` gives of an evaluation the two numbers of each problem, (problems, 2), whose sums' ratio it is.

    `good`: 1 where more is better, -1 where less is. `share`: in [0, 1], shown in per cent. `sampled`: needs samples.
    """

    title: str
    good: int
    share: bool
    parts: Callable[[dict], NDArray]
    sampled: bool = False


def _pair(above: ArrayLike, below: ArrayLike) -> NDArray:
    return np.stack(np.broadcast_arrays(np.asarray(above, float), np.asarray(below, float)), axis=-1)


def _right(greedy: dict) -> NDArray:
    return _pair(digits(greedy["right"]), 1)


def _flawed(greedy: dict) -> NDArray:
    right = digits(greedy["right"])
    return _pair(right * (digits(greedy["first_error"]) > 0), right)


def _first_error(greedy: dict) -> NDArray:
    first = digits(greedy["first_error"])
    return _pair(first, first > 0)


def _before_error(greedy: dict) -> NDArray:
    first, steps = digits(greedy["first_error"]), digits(greedy["steps"])
    return _pair(np.where(first > 0, (first - 1) / np.maximum(steps, 1), 0), first > 0)


def _majority(samples: dict) -> NDArray:
    return _pair(digits(samples["majority_right"]), 1)


def _any_of(k: int) -> Callable[[dict], NDArray]:
    def parts(samples: dict) -> NDArray:
        chances = np.array([pass_at_k(samples["k"], c, k) for c in range(samples["k"] + 1)])
        return _pair(chances[digits(samples["samples_right"])], 1)

    return parts


METRICS = {
    "pass@1": Metric("Pass@1", 1, True, _right),
    "maj@8": Metric("Maj@8", 1, True, _majority, sampled=True),
    "pass@4": Metric("Pass@4", 1, True, _any_of(4), sampled=True),
    "pass@8": Metric("Pass@8", 1, True, _any_of(8), sampled=True),
    "flawed_correct": Metric("flawed right answers", -1, True, _flawed),
    "first_error": Metric("first error", 1, False, _first_error),
    "before_error": Metric("before the first error", 1, True, _before_error),
}


@dataclass(eq=False)
class Study:
    """The results with what is computed of them, each figure once.

    A run is addressed by stage, difficulty and name; `where` is an iteration's greedy evaluation, or the last model's
    on the `test` or the `shifted` problems. Seeds whose run failed count nowhere, not as far as they came either: all
    iterations of an arm are of the same seeds.
    """

    records: Sequence[dict]
    resamples: int = RESAMPLES
    _runs: dict[Run, dict[int, dict]] = field(default_factory=dict)
    _kept: dict[tuple, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for record in self.records:
            key = (record["stage"], record["difficulty"], record["name"])
            self._runs.setdefault(key, {})[record["seed"]] = record

    def difficulties(self, stage: str | None = None) -> list[str]:
        """Those of a stage, or of all; easy before hard, others behind them."""
        found = {d for s, d, _ in self._runs if stage in (None, s)}
        return sorted(found, key=lambda d: (["easy", "hard"].index(d) if d in ("easy", "hard") else 2, d))

    def names(self, stage: str, difficulty: str, order: Iterable[str] = ()) -> list[str]:
        """The arms or variants that have a result: those of `order` first, others behind them by name."""
        places = {name: n for n, name in enumerate(order)}
        found = {n for s, d, n in self._runs if (s, d) == (stage, difficulty)}
        return sorted(found, key=lambda n: (places.get(n, len(places)), n))

    def runs(self, stage: str, difficulty: str, name: str) -> dict[int, dict]:
        """Results by seed, those of failed runs too; none where nothing has run."""
        found = self._runs.get((stage, difficulty, name), {})
        return {seed: found[seed] for seed in sorted(found)}

    def level(self, run: Run, where: Where, metric: str) -> Estimate | None:
        """A figure of an arm over its seeds; None where nothing has run."""
        return self._contrast([(1.0, run, where)], metric)

    def difference(self, a: tuple[str, str, str], b: Run, where: Where, metric: str) -> Estimate | None:
        """a - b over the seeds that both have; None where they have none in common."""
        return self._contrast([(1.0, a, where), (-1.0, b, where)], metric)

    def change(self, a: Run, b: Run, first: int, last: int, metric: str) -> Estimate | None:
        """How much a - b grows from one iteration to another."""
        return self._contrast([(1.0, a, last), (-1.0, b, last), (-1.0, a, first), (1.0, b, first)], metric)

    def progress(self, run: Run, first: int, last: int, metric: str) -> Estimate | None:
        """How much a figure of an arm grows from one iteration to another."""
        return self._contrast([(1.0, run, last), (-1.0, run, first)], metric)

    def over(self, run: Run, of: Callable[[dict], Any]) -> Estimate | None:
        """The mean over seeds of a number of each result; None where no result has it."""
        values = [of(record) for record in self.runs(*run).values() if "failed" not in record]
        known = [float(x) for x in values if x is not None]
        return over_seeds(known) if known else None

    def _contrast(self, terms: Sequence[tuple[float, Run, Where]], metric: str) -> Estimate | None:
        key = (tuple(terms), metric)
        if key not in self._kept:
            self._kept[key] = self._compute(terms, METRICS[metric])
        return self._kept[key]

    def _compute(self, terms: Sequence[tuple[float, Run, Where]], metric: Metric) -> Estimate | None:
        found = []
        for weight, run, where in terms:
            of_seed = {seed: evaluation(record, where, metric) for seed, record in self.runs(*run).items()}
            found.append((weight, {seed: x for seed, x in of_seed.items() if x is not None}))
        common = sorted(set.intersection(*(set(of_seed) for _, of_seed in found)))
        if not common:
            return None
        values = [(weight, np.stack([metric.parts(of_seed[seed]) for seed in common])) for weight, of_seed in found]
        estimate = contrast(values, resamples=self.resamples, share=metric.share and len(terms) == 1)
        return None if math.isnan(estimate.value) else estimate


def evaluation(record: dict, where: Where, metric: Metric) -> dict | None:
    """The evaluation of a result that a metric is of; None where it was not made, and of a failed run."""
    if "failed" in record:
        return None
    greedy = record.get("greedy", [])
    if isinstance(where, int):
        return None if metric.sampled or where >= len(greedy) else greedy[where]
    if where == "test" and greedy and not metric.sampled:
        return greedy[-1]
    found = sampled(record).get(where)
    return found if found is None or metric.sampled else found["greedy"]
