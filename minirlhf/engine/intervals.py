"""Intervals: a figure with the limits that resampling, or Student's t, gives it.

Whatever is resampled must be independent: prompts within a run, seeds over runs. With a handful of
seeds a bootstrap interval is too narrow; there Student's t is asked.

Sources: Efron and Tibshirani (1993, "An introduction to the bootstrap", chapter 13) for percentile
intervals; Student (1908), "The probable error of a mean".
"""

from typing import NamedTuple

import numpy as np

FEWEST = 10  # prompts of a kind: with fewer, percentile intervals exclude the truth too often


class Interval(NamedTuple):
    """A figure and the limits of its interval; a limit that cannot be told is nan."""

    mean: float
    low: float
    high: float


def percentile(value: float, draws: np.ndarray, coverage: float = 0.95) -> Interval:
    """`value`, between the percentiles of its resampled values [draws] that are finite."""
    known = draws[np.isfinite(draws)]
    if not len(known):
        return Interval(value, np.nan, np.nan)
    tail = (1 - coverage) / 2
    low, high = np.quantile(known, [tail, (1 + coverage) / 2])
    return Interval(value, float(low), float(high))


def bootstrap_mean(
    values: np.ndarray,
    rng: np.random.Generator,
    *,
    coverage: float = 0.95,
    draws: int = 2000,
    fewest: int = FEWEST,
) -> Interval:
    """Mean of independent values [N] with its percentile interval (nan limits if N < fewest)."""
    if not len(values):
        return Interval(np.nan, np.nan, np.nan)
    mean = float(np.mean(values))
    # an unknown value makes the mean unknown, and so its limits, whatever draws may miss it
    if len(values) < fewest or np.isnan(mean):
        return Interval(mean, np.nan, np.nan)
    resampled = rng.choice(values, (draws, len(values)))
    return percentile(mean, resampled.mean(1), coverage)


def student_t(values: np.ndarray, coverage: float = 0.95) -> Interval:
    """Mean of the values [N] that are known, with Student's t interval (nan limits if N < 2)."""
    rows = student_t_rows(values[None], coverage, fewest=2)
    mean, low, high = np.stack(rows)[:, 0].tolist()
    return Interval(mean, low, high)


def student_t_rows(values: np.ndarray, coverage: float = 0.95, *, fewest: int = 3) -> Interval:
    """student_t of every row of values [K, N] at once: mean, low, high, each [K].

    For a band over many steps: rows with fewer than `fewest` known values have no limits, where
    they would fill the picture and say nothing.
    """
    from scipy import stats  # costs 0.7 s: only where a table of runs is made

    n = (~np.isnan(values)).sum(1)
    mean = np.nansum(values, 1) / np.where(n > 0, n, np.nan)
    freedom = np.maximum(n - 1, 1)
    variance = np.nansum((values - mean[:, None]) ** 2, 1) / freedom
    error = np.sqrt(variance) / np.sqrt(np.maximum(n, 1))  # of the mean
    half = stats.t.ppf((1 + coverage) / 2, freedom) * error
    half = np.where(n >= fewest, half, np.nan)
    return Interval(mean, mean - half, mean + half)
