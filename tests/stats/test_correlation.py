"""Correlations, by hand and by their definitions."""

import math

import pytest

from stats.correlation import matthews, pearson, spearman


def test_pearson_is_that_of_a_line_and_of_an_example() -> None:
    assert pearson([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert pearson([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # By hand: means 2.5 and 2.25; sums 5, 6.75 and 4.5.
    assert pearson([1, 2, 3, 4], [1, 2, 4, 2]) == pytest.approx(2.5 / math.sqrt(5 * 4.75))
    assert math.isnan(pearson([1, 1], [1, 2]))


def test_spearman_sees_order_only_and_shares_ranks() -> None:
    assert spearman([1, 2, 3], [1, 100, 1000]) == pytest.approx(1)
    # Ranks 0, 1.5, 1.5, 3 and 0, 1, 2, 3.
    assert spearman([1, 5, 5, 9], [1, 2, 3, 4]) == pytest.approx(
        pearson([0, 1.5, 1.5, 3], [0, 1, 2, 3])
    )


def test_matthews_is_that_of_the_four_counts() -> None:
    counts = {("1", "1"): 6, ("1", "0"): 2, ("0", "1"): 1, ("0", "0"): 3}
    pairs = [pair for pair, count in counts.items() for _ in range(count)]
    expected = (6 * 3 - 1 * 2) / math.sqrt((6 + 1) * (6 + 2) * (3 + 1) * (3 + 2))
    assert matthews(pairs) == pytest.approx(expected)
    assert matthews([("a", "a"), ("b", "b"), ("c", "c")]) == pytest.approx(1)
    assert matthews([("a", "a"), ("b", "a")]) == 0.0
