"""Bradley-Terry strengths against the closed form for two players and simulated games."""

import math

import numpy as np
import pytest

from stats.bradley_terry import fit_bradley_terry


def test_two_players_have_the_log_odds_of_their_wins() -> None:
    games = [(0, 1, 1.0)] * 300 + [(1, 0, 1.0)] * 100
    first, second = fit_bradley_terry(games, 2)
    assert first.value == first.low == first.high == 0
    assert second.value == pytest.approx(-math.log(300.25 / 100.25))
    assert second.low < second.value < second.high


def test_ties_are_half_a_win_of_each() -> None:
    tied = fit_bradley_terry([(0, 1, 0.5)] * 50, 2)
    assert tied[1].value == pytest.approx(0)
    assert tied[1].low == pytest.approx(0)


def test_strengths_of_simulated_players_are_found() -> None:
    true = np.array([0.0, 0.7, -0.5, 1.2])
    draws = np.random.default_rng(0)
    games = []
    for _ in range(4000):
        first, second = draws.choice(4, 2, replace=False)
        won = draws.random() < 1 / (1 + math.exp(true[second] - true[first]))
        games.append((int(first), int(second), float(won)))
    found = fit_bradley_terry(games, 4)
    for strength, value in zip(found, true, strict=True):
        assert strength.value == pytest.approx(value, abs=0.2)
        assert strength.low - 0.05 <= value <= strength.high + 0.05


def test_winner_of_every_game_has_a_finite_strength() -> None:
    found = fit_bradley_terry([(0, 1, 0.0)] * 5, 2)
    assert 1 < found[1].value < 10


@pytest.mark.parametrize(
    ("games", "message"),
    [
        ([], "there is no game"),
        ([(0, 0, 1.0)], "players 0 and 0 are not two of 3"),
        ([(0, 3, 1.0)], "players 0 and 3 are not two of 3"),
        ([(0, 1, 1.0)], "no games link player 2 with player 0"),
    ],
)
def test_games_that_say_nothing_are_refused(games: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_bradley_terry(games, 3)
