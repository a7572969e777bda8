"""Differences that may be looked at as often as one likes: tests that stay valid under peeking."""

import math
from dataclasses import dataclass

from stats.bootstrap import Estimate
from stats.proportions import CONFIDENCE

LEAST_COUNT = 20
"""Observations of each arm before anything is said: the method is of many."""

MIXING = 0.1
"""Standard deviation of the differences that it looks for, of outcomes between 0 and 1. It decides
how soon which differences are found, not how often none is called one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Observations between 0 and 1, in three numbers.

    Attributes:
        count: how many.
        total: their sum.
        squares: the sum of their squares.
    """

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def plus(self, value: float) -> "Sample":
        """Return the sample with one more observation."""
        return Sample(
            count=self.count + 1, total=self.total + value, squares=self.squares + value * value
        )

    @property
    def mean(self) -> float:
        """Of at least one observation."""
        return self.total / self.count

    @property
    def variance(self) -> float:
        """Of the observations and two more, a 0 and a 1: equal ones say nothing of the next."""
        count, total, squares = self.count + 2, self.total + 1, self.squares + 1
        return (squares - total * total / count) / (count - 1)


def difference_of_arms(
    first: Sample, second: Sample, *, confidence: float = CONFIDENCE, mixing: float = MIXING
) -> Estimate | None:
    """Return the difference of two means, with an interval that holds at all times together.

    However often it is looked at, the interval leaves the true difference out at any time at all in
    at most 1 - confidence of experiments, for outcomes of many units.

    Args:
        first, second: outcomes of different units.
        confidence: between 0 and 1.
        mixing: see `MIXING`.

    Returns:
        `second - first`, its interval and always-valid p; None while there are too few of either.

    Source: Johari, Koomen, Pekelis and Walsh, Always valid inference: continuous monitoring of A/B
    tests (2022): the mixture sequential probability ratio test with a normal mixture.
    """
    if min(first.count, second.count) < LEAST_COUNT:
        return None
    variance = first.variance / first.count + second.variance / second.count
    return _always_valid(second.mean - first.mean, variance, confidence, mixing)


def difference_of_pairs(
    gaps: Sample, *, confidence: float = CONFIDENCE, mixing: float = MIXING
) -> Estimate | None:
    """Return the same of units that saw both arms.

    Args:
        gaps: (1 + second - first) / 2 of each, so that they are between 0 and 1.
        confidence, mixing: see `difference_of_arms`.
    """
    if gaps.count < LEAST_COUNT:
        return None
    return _always_valid(2 * gaps.mean - 1, 4 * gaps.variance / gaps.count, confidence, mixing)


def _always_valid(value: float, variance: float, confidence: float, mixing: float) -> Estimate:
    spread = variance + mixing * mixing
    growth = math.log(spread / variance) / 2
    reach = 2 * variance * spread / (mixing * mixing)
    half = math.sqrt(reach * (growth - math.log(1 - confidence)))
    p = min(1.0, math.exp(growth - value * value / reach))
    return Estimate(value=value, low=value - half, high=value + half, p=p)
