"""The number of pairs against simulation."""

import math

import numpy as np
import pytest

from stats.power import pairs_needed


def test_so_many_pairs_show_the_difference_with_the_power_asked_for() -> None:
    # Discordant pairs: 15 % in favour of one, 10 % of the other: a difference of 5 points.
    p_win, p_loss = 0.15, 0.10
    deviation = math.sqrt(p_win + p_loss - (p_win - p_loss) ** 2)
    count = pairs_needed(0.05, deviation)
    draws = np.random.default_rng(0)
    gaps = draws.choice([1, -1, 0], p=[p_win, p_loss, 1 - p_win - p_loss], size=(2000, count))
    z = gaps.mean(1) / (gaps.std(1) / math.sqrt(count))
    # 0.8 with a standard error of 0.009.
    assert (np.abs(z) > 1.96).mean() == pytest.approx(0.8, abs=0.035)


def test_half_the_difference_takes_four_times_as_many() -> None:
    assert pairs_needed(0.05, 0.5) == pytest.approx(4 * pairs_needed(0.1, 0.5), rel=0.01)
    assert pairs_needed(-0.1, 0.5) == pairs_needed(0.1, 0.5) == 197


@pytest.mark.parametrize(
    ("difference", "deviation", "settings"),
    [(0.0, 1.0, {}), (math.nan, 1.0, {}), (0.1, -1.0, {}), (0.1, 1.0, {"power": 1.0})],
)
def test_impossible_arguments_are_refused(
    difference: float, deviation: float, settings: dict[str, float]
) -> None:
    with pytest.raises(ValueError, match="difference|deviation"):
        pairs_needed(difference, deviation, **settings)
