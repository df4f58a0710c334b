"""Pass@k against enumeration, bootstrap intervals against exact and against slow ones."""

import itertools
import math
import random
from fractions import Fraction

import numpy as np
import pytest

from stepkto_fast import estimators
from stepkto_fast.estimators import bootstrap, mean, pass_at_k, ratio


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_pass_at_k_is_the_share_of_draws_with_a_right_sample(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == sum(map(any, draws)) / len(draws)


def test_pass_at_k_is_without_bias():
    """Over all outcomes of n samples of chance p its expectation is 1 - (1 - p)^k; the plug-in estimate's is not."""
    n, k, p = 6, 4, Fraction(1, 5)
    weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    expected = float(1 - (1 - p) ** k)
    assert sum(float(w) * pass_at_k(n, c, k) for c, w in enumerate(weights)) == pytest.approx(expected, abs=1e-12)
    assert sum(float(w) * (1 - (1 - c / n) ** k) for c, w in enumerate(weights)) < expected - 0.01


def test_pass_at_k_is_exact_for_many_samples():
    assert pass_at_k(10_000, 1, 5_000) == 0.5
    assert pass_at_k(10_000, 1, 1) == 1e-4
    assert pass_at_k(10_000, 5_001, 5_000) == 1.0


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)])
def test_pass_at_k_refuses_counts_that_cannot_be(n, c, k):
    with pytest.raises(ValueError, match="needs 0 <= c <= n"):
        pass_at_k(n, c, k)


def test_intervals_of_a_mean_are_those_of_the_exact_bootstrap_distribution():
    """The bootstrap mean of right and wrong answers is a binomial share, whose quantiles are known."""
    right = [1] * 30 + [0] * 70
    cumulative = np.cumsum([math.comb(100, c) * 0.3**c * 0.7 ** (100 - c) for c in range(101)])
    low, high = (np.searchsorted(cumulative, q) / 100 for q in (0.05, 0.95))
    assert bootstrap(right, mean, seed=1, resamples=40_000, level=0.9) == pytest.approx((low, high), abs=0.011)
    narrow = bootstrap(right, mean, seed=1, level=0.5)
    assert low < narrow[0] < 0.3 < narrow[1] < high


def test_intervals_of_a_ratio_are_those_of_a_slow_bootstrap():
    rng = random.Random(3)
    problems = [(rng.randrange(3), rng.randrange(1, 6)) for _ in range(25)]
    slow = []
    for _ in range(4000):
        drawn = rng.choices(problems, k=25)
        slow.append(sum(a for a, _ in drawn) / sum(b for _, b in drawn))
    slow.sort()
    found = bootstrap(problems, ratio, seed=0, resamples=4000)
    assert found == pytest.approx((slow[100], slow[3899]), abs=0.03)
    assert found[0] < ratio(np.array(problems)) < found[1]


def test_resamples_without_a_value_are_left_out():
    rare = [(1, 1)] + [(0, 0)] * 9
    assert bootstrap(rare, ratio, seed=0) == (1.0, 1.0)
    assert all(map(math.isnan, bootstrap([(0, 0)] * 4, ratio, seed=0)))
    assert all(map(math.isnan, bootstrap([], mean, seed=0)))
    with np.errstate(all="raise"):
        assert math.isnan(ratio(np.zeros((3, 2))))


def test_intervals_depend_on_the_seed_and_on_nothing_else(monkeypatch):
    values = np.linspace(0, 1, 40) ** 3
    first = bootstrap(values, mean, seed=5)
    assert bootstrap(values, mean, seed=5) == first != bootstrap(values, mean, seed=6)
    monkeypatch.setattr(estimators, "CHUNK", 100)
    assert bootstrap(values, mean, seed=5) == first
