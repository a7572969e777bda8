"""Wins, ties and win rates of pairs, and their intervals."""

from itertools import permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.experiments.comparison import ArmIdentity, Ballots, Vote
from serve.experiments.tally import PairTally, pairs_of, tally_pairs
from stats.proportions import wilson_interval

A, B, C, D = (ArmIdentity(label=label, model="m") for label in "ABCD")


def ballots(arms: tuple[ArmIdentity, ...], vote: Vote, count: int = 1) -> Ballots:
    return Ballots(arms=arms, vote=vote, count=count)


COUNTS = st.integers(0, 10_000)


@st.composite
def rated(draw: st.DrawFn) -> PairTally:
    wins = draw(st.tuples(COUNTS, COUNTS))
    return PairTally(arms=(A, B), wins=wins, ties=draw(st.integers(int(not sum(wins)), 10_000)))


@settings(deadline=None)
@given(rated())
def test_interval_contains_the_rate(row: PairTally) -> None:
    assert row.interval is not None
    assert row.win_rate is not None
    assert 0 <= row.interval[0] <= row.win_rate <= row.interval[1] <= 1


@settings(deadline=None)
@given(rated())
def test_interval_is_the_mirror_image_when_arms_are_swapped(row: PairTally) -> None:
    swapped = PairTally(arms=(B, A), wins=(row.wins[1], row.wins[0]), ties=row.ties)
    assert row.interval is not None
    assert swapped.interval is not None
    mirrored = (1 - swapped.interval[1], 1 - swapped.interval[0])
    assert row.interval == pytest.approx(mirrored, abs=1e-12)


@settings(deadline=None)
@given(rated(), st.integers(2, 10))
def test_interval_shrinks_with_more_votes_of_the_same_rate(row: PairTally, factor: int) -> None:
    wins = (row.wins[0] * factor, row.wins[1] * factor)
    more = PairTally(arms=row.arms, wins=wins, ties=row.ties * factor)
    assert row.interval is not None
    assert more.interval is not None
    assert more.interval[1] - more.interval[0] < row.interval[1] - row.interval[0]


@pytest.mark.parametrize("both_bad", [0, 3])
def test_pair_without_a_rated_vote_has_no_rate(both_bad: int) -> None:
    row = PairTally(arms=(A, B), both_bad=both_bad)
    assert (row.win_rate, row.interval) == (None, None)


def test_ties_are_half_a_win() -> None:
    row = PairTally(arms=(A, B), wins=(3, 1), ties=4)
    assert row.win_rate == 5 / 8
    assert row.interval == wilson_interval(5, 8)


def test_both_bad_counts_as_a_vote_and_not_in_the_rate() -> None:
    row = PairTally(arms=(A, B), wins=(1, 1), both_bad=8)
    assert (row.votes, row.win_rate) == (10, 0.5)


def test_votes_on_a_pair_are_counted_by_outcome() -> None:
    votes: list[tuple[Vote, int]] = [(0, 4), (1, 3), ("tie", 2), ("both_bad", 1)]
    (row,) = tally_pairs(ballots((A, B), vote, count) for vote, count in votes)
    assert row == PairTally(arms=(A, B), wins=(4, 3), ties=2, both_bad=1)


def test_order_of_the_arms_does_not_matter() -> None:
    (row,) = tally_pairs([ballots((B, A), 0), ballots((A, B), 1), ballots((A, B), 0)])
    assert row == PairTally(arms=(A, B), wins=(1, 2))


def test_vote_for_one_of_four_is_a_win_over_each_other() -> None:
    assert tally_pairs([ballots((A, B, C, D), 1)]) == [
        PairTally(arms=(A, B), wins=(0, 1)),
        PairTally(arms=(B, C), wins=(1, 0)),
        PairTally(arms=(B, D), wins=(1, 0)),
    ]


@pytest.mark.parametrize(
    ("vote", "expected"), [("tie", {"ties": 1}), ("both_bad", {"both_bad": 1})]
)
def test_word_counts_for_every_pair(vote: Vote, expected: dict[str, int]) -> None:
    assert tally_pairs([ballots((A, B, C), vote)]) == [
        PairTally(arms=pair, **expected)  # type: ignore[arg-type]
        for pair in ((A, B), (A, C), (B, C))
    ]


def test_pairs_are_counted_over_comparisons_of_other_arms_too() -> None:
    rows = tally_pairs([ballots((A, B, C), 0), ballots((A, B), 0), ballots((C, A), 0)])
    assert {row.arms: row.wins for row in rows} == {(A, B): (2, 0), (A, C): (1, 1)}


def test_arms_that_differ_by_label_alone_are_two() -> None:
    assert pairs_of((A, B, A)) == {(A, B)}


def test_equal_arms_have_no_votes_against_each_other() -> None:
    assert tally_pairs([ballots((A, A), 0)]) == []


@pytest.mark.parametrize("vote", [0, 1, "tie"])
def test_equal_arms_beside_another_count_once(vote: Vote) -> None:
    (row,) = tally_pairs([ballots((A, A, B), vote)])
    assert row.votes == 1


def test_tally_equals_one_made_vote_by_vote() -> None:
    """Every order of three arms, each with every vote, against a count by hand."""
    given: list[tuple[tuple[ArmIdentity, ...], Vote]] = list(
        product(permutations((A, B, C)), (0, 1, 2, "tie", "both_bad"))
    )
    for row in tally_pairs(ballots(arms, vote) for arms, vote in given):
        winners = [arms[vote] for arms, vote in given if isinstance(vote, int)]
        assert row.wins == tuple(winners.count(arm) for arm in row.arms)
        assert (row.ties, row.both_bad) == (6, 6)
