"""pass@k against counting all subsets."""

from itertools import combinations

import pytest

from stats.pass_at_k import pass_at_k


@pytest.mark.parametrize("num_samples", [1, 4, 7])
def test_is_the_share_of_subsets_with_a_passing_sample(num_samples: int) -> None:
    for num_passed in range(num_samples + 1):
        passed = [i < num_passed for i in range(num_samples)]
        for k in range(1, num_samples + 1):
            subsets = list(combinations(passed, k))
            share = sum(map(any, subsets)) / len(subsets)
            assert pass_at_k(num_samples, num_passed, k) == pytest.approx(share)


def test_large_numbers_are_exact() -> None:
    assert pass_at_k(1000, 1, 100) == pytest.approx(0.1)


@pytest.mark.parametrize("arguments", [(5, 1, 0), (5, 1, 6), (5, 6, 1), (5, -1, 1), (0, 0, 1)])
def test_impossible_counts_are_refused(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="cannot estimate"):
        pass_at_k(*arguments)
