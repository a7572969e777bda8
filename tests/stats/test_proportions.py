"""The Wilson interval against published values and a search; McNemar by hand."""

import math
from statistics import NormalDist

import pytest

from stats.proportions import mcnemar_p, wilson_interval

# Newcombe, Two-sided confidence intervals for the single proportion (1998), table I, method 3.
PUBLISHED = [
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0, 0.1611),
    (1, 29, 0.0061, 0.1718),
]


@pytest.mark.parametrize(("successes", "trials", "low", "high"), PUBLISHED)
def test_interval_has_the_published_ends(
    successes: int, trials: int, low: float, high: float
) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("successes", "trials"), [(3, 10), (4.5, 9), (0, 5), (7, 7), (40, 100)])
def test_interval_holds_the_rates_that_the_votes_do_not_contradict(
    successes: float, trials: int
) -> None:
    z = NormalDist().inv_cdf(0.975)
    rate = successes / trials
    steps = [i / 100_000 for i in range(100_001)]
    fitting = [p for p in steps if abs(rate - p) <= z * math.sqrt(p * (1 - p) / trials) + 1e-12]
    expected = (min(fitting), max(fitting))
    assert wilson_interval(successes, trials) == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize(("confidence", "z"), [(0.9, 1.644854), (0.95, 1.959964), (0.99, 2.575829)])
def test_interval_has_the_confidence_asked_for(confidence: float, z: float) -> None:
    half = z / (2 * math.sqrt(10 + z * z))  # what the formula becomes at a rate of 1/2
    assert wilson_interval(5, 10, confidence=confidence) == pytest.approx((0.5 - half, 0.5 + half))


@pytest.mark.parametrize(
    ("successes", "trials", "match"),
    [(0, 0, "0 of 0"), (-1, 5, "-1 of 5"), (6, 5, "6 of 5"), (math.nan, 5, "nan of 5")],
)
def test_impossible_counts_are_refused(successes: float, trials: int, match: str) -> None:
    with pytest.raises(ValueError, match=f"must be 0 to all of at least 1 trial, got {match}"):
        wilson_interval(successes, trials)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95, math.nan])
def test_impossible_confidence_is_refused(confidence: float) -> None:
    with pytest.raises(ValueError, match="confidence must be between 0 and 1"):
        wilson_interval(1, 2, confidence=confidence)


def test_mcnemar_is_the_binomial_of_disagreements() -> None:
    assert mcnemar_p(0, 0) == 1
    assert mcnemar_p(5, 5) == 1
    assert mcnemar_p(0, 6) == mcnemar_p(6, 0) == pytest.approx(2 / 64)
    assert mcnemar_p(2, 8) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert mcnemar_p(900, 1100) == pytest.approx(8.5e-6, rel=0.05)


def test_mcnemar_refuses_negative_counts() -> None:
    with pytest.raises(ValueError, match="must not be negative, got -1 and 3"):
        mcnemar_p(-1, 3)
