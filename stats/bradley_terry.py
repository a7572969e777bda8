"""Strengths of players from games between pairs of them."""

import math
from collections.abc import Sequence

import numpy as np

from stats.bootstrap import Estimate
from stats.proportions import CONFIDENCE

NUM_RESAMPLES = 1000
_MAX_STEPS = 1000
_TOLERANCE = 1e-10
# Added to each pair that played, so that a player who won every game has a finite strength.
_PRIOR = 0.5

Game = tuple[int, int, float]


def fit_bradley_terry(
    games: Sequence[Game], num_players: int, *, confidence: float = CONFIDENCE, seed: int = 0
) -> list[Estimate]:
    """Return the strengths under which the outcomes are likeliest, the first player's being 0.

    One of strength s beats one of strength t with probability 1 / (1 + exp(t - s)).

    Args:
        games: (first, second, outcome): 1 if the first won, 0 if the second did, 0.5 for a tie,
            which counts as half a win of each.
        num_players: players are 0 to this less 1; each must be linked with each by games.
        confidence: of the intervals, by resampling games.
        seed: of the draws.

    Raises:
        ValueError: there is no game, a player is out of range, or players are not linked.

    Source: Bradley and Terry, Rank analysis of incomplete block designs (1952); Hunter, MM
    algorithms for generalized Bradley-Terry models (2004).
    """
    wins = np.zeros((num_players, num_players))
    for first, second, outcome in games:
        if not (0 <= first < num_players and 0 <= second < num_players and first != second):
            raise ValueError(f"players {first} and {second} are not two of {num_players}")
        wins[first, second] += outcome
        wins[second, first] += 1 - outcome
    _check_linked(wins + wins.T > 0)
    value = _strengths(wins)
    draws = np.random.default_rng(seed)
    players = np.array([(first, second) for first, second, _ in games])
    outcomes = np.array([outcome for *_, outcome in games])
    linked = wins + wins.T > 0
    sampled = []
    for _ in range(NUM_RESAMPLES):
        chosen = draws.integers(len(games), size=len(games))
        resampled = np.zeros_like(wins)
        first, second = players[chosen].T
        np.add.at(resampled, (first, second), outcomes[chosen])
        np.add.at(resampled, (second, first), 1 - outcomes[chosen])
        sampled.append(_strengths(resampled, linked))
    low, high = np.quantile(sampled, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return [
        Estimate(value=float(v), low=float(a), high=float(b))
        for v, a, b in zip(value, low, high, strict=True)
    ]


def _strengths(wins: np.ndarray, linked: np.ndarray | None = None) -> np.ndarray:
    """Return the strengths for a matrix of wins of rows over columns."""
    linked = wins + wins.T > 0 if linked is None else linked
    wins = wins + _PRIOR * linked / 2
    played = wins + wins.T
    won = wins.sum(axis=1)
    power = np.ones(len(wins))
    for _ in range(_MAX_STEPS):
        rates = played / (power[:, None] + power[None, :])
        new = won / rates.sum(axis=1)
        new /= math.exp(float(np.log(new).mean()))
        if np.abs(np.log(new / power)).max() < _TOLERANCE:
            power = new
            break
        power = new
    strengths = np.log(power)
    return np.asarray(strengths - strengths[0])


def _check_linked(linked: np.ndarray) -> None:
    if not len(linked) or not linked.any():
        raise ValueError("there is no game")
    reached, new = {0}, [0]
    while new:
        here = new.pop()
        found = {int(other) for other in np.flatnonzero(linked[here])} - reached
        reached |= found
        new += sorted(found)
    if len(reached) < len(linked):
        missing = min(set(range(len(linked))) - reached)
        raise ValueError(f"no games link player {missing} with player 0")
