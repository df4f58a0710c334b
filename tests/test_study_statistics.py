"""The study's statistics against brute force, tables, and simulated studies."""

import itertools
import math

import numpy as np
import pytest

from stepkto_fast.estimators import pass_at_k
from stepkto_fast.study import statistics
from stepkto_fast.study.statistics import METRICS, Estimate, contrast, draws, over_seeds, t_interval, t_quantile


def values(rng, seeds=4, problems=9):
    """Ratios with denominators that differ: (seeds, problems, 2)."""
    below = rng.integers(0, 2, (seeds, problems))
    return np.stack([below * rng.integers(0, 2, below.shape), below], axis=-1).astype(float)


def resampled(x, of_seeds, of_problems):
    """The ratio of one resample, by indices in plain Python."""
    rows = [s for s, many in enumerate(of_seeds) for _ in range(many)]
    columns = [p for p, many in enumerate(of_problems) for _ in range(many)]
    above = sum(x[s, p, 0] for s in rows for p in columns)
    below = sum(x[s, p, 1] for s in rows for p in columns)
    return above / below if below else math.nan


@pytest.mark.parametrize("chunk", [10**6, 9 * 7], ids=["at once", "in chunks"])
def test_intervals_are_those_of_brute_force(monkeypatch, chunk):
    monkeypatch.setattr(statistics, "CHUNK", chunk)
    rng, resamples = np.random.default_rng(0), 40
    a, b = values(rng), values(rng)
    found = contrast([(1.0, a), (-1.0, b)], seed=3, resamples=resamples)
    rows, brute = max(1, chunk // 9), []
    for start in range(0, resamples, rows):
        many = min(rows, resamples - start)
        for of_problems, of_seeds in zip(draws(9, many, (3, start, 0)), draws(4, many, (3, start, 1)), strict=True):
            brute.append(resampled(a, of_seeds, of_problems) - resampled(b, of_seeds, of_problems))
    known = [x for x in brute if not math.isnan(x)]
    low, high = np.quantile(known, [0.025, 0.975])
    seeds = [resampled(a[s : s + 1], [1], [1] * 9) - resampled(b[s : s + 1], [1], [1] * 9) for s in range(4)]
    half = 3.182446305 * np.std(seeds, ddof=1) / 2
    assert found.value == pytest.approx(resampled(a, [1] * 4, [1] * 9) - resampled(b, [1] * 4, [1] * 9))
    assert found.low == pytest.approx(min(low, np.mean(seeds) - half))
    assert found.high == pytest.approx(max(high, np.mean(seeds) + half))
    assert found.seeds == 4


def test_draws_are_with_replacement_and_the_same_for_all_arms():
    found = draws(50, 2000, (0, 0, 0))
    assert (found.sum(axis=1) == 50).all()
    assert found.mean(axis=0) == pytest.approx(np.ones(50), abs=0.15)
    assert found.astype(float).var() == pytest.approx(1 - 1 / 50, abs=0.05)
    assert (found == draws(50, 2000, (0, 0, 0))).all()
    assert (found != draws(50, 2000, (1, 0, 0))).any()
    x = values(np.random.default_rng(1), 5, 40)
    assert contrast([(1.0, x), (-1.0, x)]) == Estimate(0.0, 0.0, 0.0, 5)  # paired: an arm against itself


def test_another_seed_draws_anew_and_the_same_one_does_not():
    x = values(np.random.default_rng(1), 2, 200)
    x[1] = x[0]  # no difference of seeds: the bootstrap decides
    found = [contrast([(1.0, x)], seed=seed, resamples=500) for seed in (0, 0, 1)]
    assert found[0] == found[1]
    assert found[0].low != found[2].low


# Two-sided 95 % and 99 % of Student's t as in any table.
@pytest.mark.parametrize(
    ("p", "df", "expected"),
    [
        (0.975, 1, 12.706), (0.975, 2, 4.303), (0.975, 3, 3.182), (0.975, 4, 2.776), (0.975, 5, 2.571),
        (0.975, 9, 2.262), (0.975, 30, 2.042), (0.995, 2, 9.925), (0.995, 4, 4.604), (0.95, 7, 1.895), (0.5, 3, 0.0),
    ],
)  # fmt: skip
def test_t_quantiles(p, df, expected):
    assert t_quantile(p, df) == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize(("p", "df"), [(0.4, 3), (1.0, 3), (0.9, 0)])
def test_t_quantiles_that_are_none(p, df):
    with pytest.raises(ValueError, match="df >= 1"):
        t_quantile(p, df)


def test_t_intervals():
    assert t_interval(np.array([1.0, 2.0, 3.0])) == pytest.approx(
        (2 - 4.30265 / 3**0.5, 2 + 4.30265 / 3**0.5), abs=1e-4
    )
    assert t_interval(np.array([1.0, math.nan, 2.0, 3.0])) == t_interval(np.array([1.0, 2.0, 3.0]))
    assert all(math.isnan(x) for x in t_interval(np.array([1.0, math.nan])))
    assert over_seeds([1.0, math.nan, 3.0])[0] == 2.0
    assert over_seeds([1.0, math.nan, 3.0]).seeds == 2
    assert math.isnan(over_seeds([]).value)


def simulated(rng, gain=0.0, seeds=5, problems=60):
    """Two arms whose chances have effects of problems, of seeds, and of each arm's own seeds."""
    shared = rng.normal(size=problems)[None] + 0.3 * rng.normal(size=(seeds, 1))
    arms = []
    for plus in (gain, 0.0):
        chance = 1 / (1 + np.exp(-(shared + plus + 1.0 * rng.normal(size=(seeds, 1)))))
        hits = (rng.random(chance.shape) < chance).astype(float)
        arms.append(np.stack([hits, np.ones_like(hits)], axis=-1))
    return arms


def test_verdicts_keep_their_level_where_the_bootstrap_alone_does_not():
    rng, studies = np.random.default_rng(11), 400
    wrong = bootstrap_wrong = 0
    for _ in range(studies):
        a, b = simulated(rng)
        terms = [(1.0, a), (-1.0, b)]
        wrong += contrast(terms, resamples=400).sign != 0
        low, high = statistics._bootstrap(terms, 0, 400, 0.95)
        bootstrap_wrong += not low <= 0 <= high
    # Three standard errors above 5 % of 400; the bootstrap of five seeds alone is beyond.
    assert wrong <= 0.05 * studies + 3 * math.sqrt(0.05 * 0.95 * studies)
    assert bootstrap_wrong > 0.05 * studies + 3 * math.sqrt(0.05 * 0.95 * studies)


def test_effects_are_found():
    rng = np.random.default_rng(5)
    found = [contrast([(1.0, a), (-1.0, b)], resamples=300) for a, b in (simulated(rng, gain=3.0) for _ in range(60))]
    assert sum(e.verdict(1) == "better" for e in found) >= 50
    assert sum(e.verdict(-1) == "worse" for e in found) == sum(e.verdict(1) == "better" for e in found)


def test_one_seed_gives_no_verdict():
    a, b = simulated(np.random.default_rng(0), gain=5.0, seeds=1)
    found = contrast([(1.0, a), (-1.0, b)], resamples=200)
    assert found.value > 0
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert found.seeds == 1
    assert found.verdict(1) == "no difference"


def test_what_has_no_denominator():
    x = np.zeros((3, 5, 2))
    found = contrast([(1.0, x)], resamples=50)
    assert all(math.isnan(v) for v in found[:3])
    assert found.sign == found.seeds == 0
    x[0, :, 1] = 1
    x[1, :, 1] = 1
    assert contrast([(1.0, x)], resamples=200) == Estimate(0.0, 0.0, 0.0, 2)


def test_a_seed_without_a_ratio_in_one_arm_counts_in_none():
    rng = np.random.default_rng(2)
    a, b = values(rng, 4, 30), values(rng, 4, 30)
    b[3] = 0
    both = contrast([(1.0, a), (-1.0, b)], resamples=200)
    assert both == contrast([(1.0, a[:3]), (-1.0, b[:3])], resamples=200)
    assert both.seeds == 3
    assert both.value != pytest.approx(float(np.diff([x[..., 0].sum() / x[..., 1].sum() for x in (b, a)])[0]))


def test_shares_stay_between_0_and_1():
    x = np.ones((3, 20, 2))
    x[0, :10, 0] = 0
    found = contrast([(1.0, x)], resamples=200, share=True)
    assert 0 <= found.low < found.value < found.high == 1
    assert contrast([(1.0, x)], resamples=200).high > 1


def test_terms_of_different_problems_are_refused():
    with pytest.raises(ValueError, match="values of one shape"):
        contrast([(1.0, np.ones((2, 5, 2))), (-1.0, np.ones((2, 6, 2)))])


def brute(greedy):
    """Each metric of greedy solutions, solution by solution."""
    rows = list(zip(greedy["right"], greedy["first_error"], greedy["steps"], strict=True))
    rows = [(x == "1", int(first, 36), int(steps, 36)) for x, first, steps in rows]
    wrong = [(first, steps) for _, first, steps in rows if first]
    right = [first for x, first, _ in rows if x]
    return {
        "pass@1": len(right) / len(rows),
        "flawed_correct": sum(first > 0 for first in right) / len(right),
        "first_error": sum(first for first, _ in wrong) / len(wrong),
        "before_error": sum((first - 1) / steps for first, steps in wrong) / len(wrong),
    }


def test_metrics_are_those_of_brute_force():
    greedy = {"right": "110101", "first_error": "0a0350", "steps": "9cf655", "tokens": 1.0}
    samples = {"greedy": greedy, "k": 8, "samples_right": "081234", "majority_right": "010011"}
    for name, expected in brute(greedy).items():
        assert contrast([(1.0, METRICS[name].parts(greedy)[None])], resamples=10).value == pytest.approx(expected), name
    counts = [int(x) for x in samples["samples_right"]]
    for k in (4, 8):
        drawn = list(itertools.combinations(range(8), k))
        chance = [sum(min(c) < right for c in drawn) / len(drawn) for right in counts]  # the first `right` are right
        value = contrast([(1.0, METRICS[f"pass@{k}"].parts(samples)[None])], resamples=10).value
        assert value == pytest.approx(sum(chance) / 6)
        assert value == pytest.approx(sum(pass_at_k(8, right, k) for right in counts) / 6)
    assert contrast([(1.0, METRICS["maj@8"].parts(samples)[None])], resamples=10).value == pytest.approx(0.5)
