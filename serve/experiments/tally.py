"""From votes to win rates of pairs of arms, with their confidence intervals."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

from serve.experiments.comparison import BOTH_BAD, TIE, ArmIdentity, Ballots, Vote
from stats.proportions import wilson_interval

Pair = tuple[ArmIdentity, ArmIdentity]


@dataclass(frozen=True, kw_only=True, slots=True)
class PairTally:
    """The votes on two arms.

    Attributes:
        arms: the two, in order.
        wins: of each.
        ties: votes that both are as good.
        both_bad: votes that neither is good.
    """

    arms: Pair
    wins: tuple[int, int] = (0, 0)
    ties: int = 0
    both_bad: int = 0

    @property
    def votes(self) -> int:
        """All votes."""
        return sum(self.wins) + self.ties + self.both_bad

    @property
    def num_rated(self) -> int:
        """The votes that say something about which is better: wins and ties."""
        return sum(self.wins) + self.ties

    @property
    def win_rate(self) -> float | None:
        """Share of the first arm's wins, a tie as half of one; None without a rated vote."""
        if not self.num_rated:
            return None
        return (self.wins[0] + self.ties / 2) / self.num_rated

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson interval of the win rate; None without a rated vote."""
        if not self.num_rated:
            return None
        return wilson_interval(self.wins[0] + self.ties / 2, self.num_rated)


def tally_pairs(ballots: Iterable[Ballots]) -> list[PairTally]:
    """Count the votes on each pair of arms, in the order of the pairs.

    A vote for one of several arms is a win over each of the others; a word counts for every pair.
    Arms that are equal are one and have no votes against each other.
    """
    counts: dict[Pair, dict[Vote, int]] = {}
    for item in ballots:
        for pair, outcome in _outcomes(item.arms, item.vote).items():
            of_pair = counts.setdefault(pair, {})
            of_pair[outcome] = of_pair.get(outcome, 0) + item.count
    return [
        PairTally(
            arms=pair,
            wins=(counts[pair].get(0, 0), counts[pair].get(1, 0)),
            ties=counts[pair].get(TIE, 0),
            both_bad=counts[pair].get(BOTH_BAD, 0),
        )
        for pair in sorted(counts)
    ]


def pairs_of(arms: Iterable[ArmIdentity]) -> set[Pair]:
    """Return each pair of different arms, in order within the pair."""
    return set(combinations(sorted(set(arms)), 2))


def _outcomes(arms: tuple[ArmIdentity, ...], vote: Vote) -> dict[Pair, Vote]:
    """Return what one vote says of each pair that it counts for."""
    if isinstance(vote, str):
        return dict.fromkeys(pairs_of(arms), vote)
    winner = arms[vote]
    return {pair: pair.index(winner) for pair in pairs_of(arms) if winner in pair}
