"""Resampled intervals against the normal approximation, and how often they hold the truth."""

import numpy as np
import pytest

from stats.bootstrap import bootstrap_difference, bootstrap_mean


def test_mean_and_interval_are_those_of_the_normal_approximation_for_many_values() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 2000)
    estimate = bootstrap_mean(values)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert estimate.value == pytest.approx(values.mean())
    assert (estimate.low, estimate.high) == pytest.approx(
        (values.mean() - half, values.mean() + half), abs=0.01
    )
    assert estimate.p is None


def test_interval_is_wider_for_more_confidence_and_the_same_for_the_same_seed() -> None:
    values = [0, 1, 1, 0, 1, 0, 0, 0, 1, 1]
    usual, sure = bootstrap_mean(values), bootstrap_mean(values, confidence=0.99)
    assert sure.low < usual.low < usual.high < sure.high
    assert bootstrap_mean(values) == usual
    assert bootstrap_mean(values, seed=1) != usual or usual.low == 0.2


def test_intervals_hold_the_truth_in_about_so_many_cases() -> None:
    draws = np.random.default_rng(2)
    held = 0
    for _ in range(200):
        estimate = bootstrap_mean(draws.binomial(1, 0.3, 150).tolist())
        held += estimate.low <= 0.3 <= estimate.high
    assert held >= 180  # of 200 at 95 %, fewer with probability below 1e-3


def test_pairs_cancel_what_tasks_have_in_common() -> None:
    draws = np.random.default_rng(3)
    common = draws.normal(0, 10, 100)
    first, second = common + draws.normal(0, 0.1, 100), common + 1 + draws.normal(0, 0.1, 100)
    difference = bootstrap_difference(first.tolist(), second.tolist())
    assert 0.9 < difference.low < 1 < difference.high < 1.1
    assert difference.p == pytest.approx(2 / 10_001)


def test_no_difference_has_a_p_of_one() -> None:
    difference = bootstrap_difference([1, 0, 1], [1, 0, 1])
    assert (difference.value, difference.low, difference.high, difference.p) == (0, 0, 0, 1)


def test_nothing_to_resample_is_refused() -> None:
    with pytest.raises(ValueError, match="no value"):
        bootstrap_mean([])
    with pytest.raises(ValueError, match="2 and 1 values are no pairs"):
        bootstrap_difference([1, 2], [1])
