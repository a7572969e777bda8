"""Many values in a few numbers."""

import pytest

from stats.summary import latency, median_ratio, spread


def test_latency_gives_median_and_ninetieth_percentile() -> None:
    assert latency([float(i) for i in range(11)]) == {"median": 5.0, "p90": 9.0}
    assert latency([3.0]) == {"median": 3.0, "p90": 3.0}


def test_spread_gives_the_ends() -> None:
    assert spread([2.04, 1.0, 3.0]) == [1.0, 3.0]


def test_median_ratio_holds_each_value_against_its_turn() -> None:
    assert median_ratio([2.0, 30.0, 5.0], [1.0, 10.0, 5.0]) == pytest.approx(2.0)


def test_median_ratio_refuses_turns_without_a_partner() -> None:
    with pytest.raises(ValueError, match="longer than"):
        median_ratio([1.0], [1.0, 2.0])
