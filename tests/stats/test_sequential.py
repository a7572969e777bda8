"""Always-valid differences: simulated experiments that are looked at every day."""

import math

import numpy as np
import pytest

from stats.sequential import LEAST_COUNT, Sample, difference_of_arms, difference_of_pairs


def sample(values: np.ndarray) -> Sample:
    return Sample(count=len(values), total=float(values.sum()), squares=float((values**2).sum()))


def called(draws: np.random.Generator, rates: tuple[float, float], days: int, a_day: int) -> bool:
    """Return whether a look on any day calls a winner."""
    shape = (days, a_day)
    arms = [(draws.random(shape) < rate).astype(float) for rate in rates]
    for day in range(1, days + 1):
        found = difference_of_arms(*(sample(arm[:day].ravel()) for arm in arms))
        if found is not None and (found.low > 0 or found.high < 0):
            return True
    return False


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5])
def test_equal_arms_have_a_winner_in_at_most_one_of_twenty_experiments_under_daily_peeking(
    rate: float,
) -> None:
    draws = np.random.default_rng(int(100 * rate))
    wrong = sum(called(draws, (rate, rate), 60, 15) for _ in range(1000))
    assert wrong <= 50


def test_equal_pairs_have_a_winner_in_at_most_one_of_twenty_experiments() -> None:
    draws = np.random.default_rng(1)
    wrong = 0
    for _ in range(1000):
        gaps = draws.choice([0.0, 0.5, 1.0], p=[0.2, 0.6, 0.2], size=(40, 20))
        looks = [difference_of_pairs(sample(gaps[:day].ravel())) for day in range(1, 41)]
        wrong += any(look is not None and look.p < 0.05 for look in looks)
    assert wrong <= 50


def test_real_difference_is_found_sooner_or_later() -> None:
    draws = np.random.default_rng(2)
    found = sum(called(draws, (0.4, 0.5), 60, 30) for _ in range(100))
    assert found >= 90


def test_interval_holds_the_difference_and_narrows() -> None:
    draws = np.random.default_rng(3)
    first, second = (draws.random(5000) < rate for rate in (0.3, 0.45))
    widths = []
    for count in (100, 1000, 5000):
        estimate = difference_of_arms(
            sample(first[:count].astype(float)), sample(second[:count].astype(float))
        )
        assert estimate.low < 0.15 < estimate.high
        widths.append(estimate.high - estimate.low)
    assert widths == sorted(widths, reverse=True)


def test_p_and_interval_agree() -> None:
    first = Sample(count=200, total=80, squares=80)
    for wins in range(60, 140, 5):
        estimate = difference_of_arms(first, Sample(count=200, total=wins, squares=wins))
        assert (estimate.p < 0.05) == (estimate.low > 0 or estimate.high < 0)


def test_formula_by_hand() -> None:
    first, second = Sample(count=100, total=40, squares=40), Sample(count=100, total=55, squares=55)
    variance = sum((n + 1 - (n + 1) ** 2 / 102) / 101 / 100 for n in (40, 55))
    ratio = math.sqrt(variance / (variance + 0.01)) * math.exp(
        0.01 * 0.15**2 / (2 * variance * (variance + 0.01))
    )
    estimate = difference_of_arms(first, second)
    assert estimate.value == pytest.approx(0.15)
    assert estimate.p == pytest.approx(1 / ratio)


def test_few_or_equal_outcomes_say_little() -> None:
    few = Sample(count=LEAST_COUNT - 1)
    assert difference_of_arms(few, Sample(count=100)) is None
    assert difference_of_pairs(few) is None
    none, all_right = Sample(count=20), Sample(count=20, total=20, squares=20)
    assert difference_of_arms(none, none).p == 1
    assert 0 < difference_of_arms(none, all_right).p < 0.05
    assert Sample().plus(0.5).plus(1.0) == Sample(count=2, total=1.5, squares=1.25)
