"""Estimators of rates over problems: Pass@k without bias, and bootstrap intervals."""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

CHUNK = 4_000_000  # numbers of the resampled values that are in memory together


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k samples of a problem hold a right one, without bias, from n samples with c right ones.

    1 - C(n-c, k) / C(n, k), equation 1 of Chen et al. 2021 (arXiv 2107.03374), in whole numbers and rounded once.

    Raises:
        ValueError: unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {n} samples with {c} right ones: needs 0 <= c <= n and 1 <= k <= n")
    every = math.comb(n, k)
    return (every - math.comb(n - c, k)) / every


def mean(values: NDArray) -> NDArray:
    """Means over problems: values (..., problems) -> (...), nan without problems."""
    return ratio(np.stack([values, np.ones_like(values)], axis=-1))


def ratio(values: NDArray) -> NDArray:
    """Ratios of two sums over problems: values (..., problems, 2) -> (...), nan where the second sum is 0."""
    above, below = np.moveaxis(values.sum(axis=-2), -1, 0)
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below != 0)


def bootstrap(
    values: ArrayLike,
    statistic: Callable[[NDArray], NDArray],
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
) -> tuple[float, float]:
    """A percentile bootstrap interval of a statistic (Efron and Tibshirani 1993, chapter 13).

    Args:
        values: (problems, ...), numbers; whole problems are drawn with replacement.
        statistic: (resamples, problems, ...) -> (resamples,), such as `mean` or `ratio`; nan where a resample has no
            value (a ratio whose denominator is 0). Those resamples are left out.
        seed: the interval is the same for the same values and seed.

    Returns:
        (low, high), which hold the share `level` of the resamples between them; (nan, nan) where none has a value.
    """
    x = np.asarray(values, dtype=np.float64)
    if not len(x):
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    rows = max(1, CHUNK // x.size)
    found = np.concatenate(
        [
            statistic(x[rng.integers(len(x), size=(min(rows, resamples - start), len(x)))])
            for start in range(0, resamples, rows)
        ]
    )
    found = found[~np.isnan(found)]
    if not len(found):
        return math.nan, math.nan
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
