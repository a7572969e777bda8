"""Intervals by resampling: how sure a mean over tasks is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stats.proportions import CONFIDENCE

NUM_RESAMPLES = 10_000
_MAX_VALUES_AT_ONCE = 4_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean and its interval.

    Attributes:
        value: the mean.
        low, high: ends of the interval.
        p: two-sided, of a mean of 0; where a difference was asked for.
    """

    value: float
    low: float
    high: float
    p: float | None = None


def bootstrap_mean(
    values: Sequence[float], *, confidence: float = CONFIDENCE, seed: int = 0
) -> Estimate:
    """Return the mean over tasks with the interval of means of tasks drawn with replacement.

    Args:
        values: one for each task, at least 1.
        confidence: between 0 and 1.
        seed: of the draws.

    Raises:
        ValueError: there is no value.

    Source: Efron, Bootstrap methods: another look at the jackknife (1979); percentile interval.
    """
    means = _resampled_means(np.asarray(values, dtype=np.float64), seed)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(value=float(np.mean(values)), low=float(low), high=float(high))


def bootstrap_difference(
    first: Sequence[float], second: Sequence[float], *, confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Estimate:  # fmt: skip
    """Return the mean of `second - first` over tasks that both did, resampled in pairs.

    Args:
        first, second: one value for each task, in one order.
        confidence: between 0 and 1.
        seed: of the draws.

    Returns:
        The difference, its interval and p: twice the share of resampled means on the wrong side of
        0, with one counted on each side, so that it is never 0.

    Raises:
        ValueError: there is no value, or not as many of each.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} values are no pairs")
    gaps = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    means = _resampled_means(gaps, seed)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    wrong = min(int((means <= 0).sum()), int((means >= 0).sum()))
    p = min(1.0, 2 * (wrong + 1) / (len(means) + 1))
    return Estimate(value=float(gaps.mean()), low=float(low), high=float(high), p=p)


def _resampled_means(
    values: "np.ndarray[tuple[int], np.dtype[np.float64]]", seed: int
) -> np.ndarray:
    if not len(values):
        raise ValueError("there is no value to resample")
    draws = np.random.default_rng(seed)
    at_once = max(1, _MAX_VALUES_AT_ONCE // len(values))
    parts = []
    for start in range(0, NUM_RESAMPLES, at_once):
        shape = (min(at_once, NUM_RESAMPLES - start), len(values))
        parts.append(values[draws.integers(len(values), size=shape)].mean(axis=1))
    return np.concatenate(parts)
