"""Shares, and how sure they are."""

import math
from statistics import NormalDist

CONFIDENCE = 0.95


def wilson_interval(
    successes: float, trials: int, *, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion.

    Args:
        successes: 0 to `trials`. A tie may count as half of one: halves vary less than the
            successes and failures that the formula is about, so the interval errs on the wide side.
        trials: at least 1.
        confidence: between 0 and 1, both excluded.

    Returns:
        Its two ends, from 0 to 1; `successes / trials` is between them.

    Raises:
        ValueError: an argument is out of range.

    Source: Wilson, Probable inference, the law of succession, and statistical inference (1927).
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"must be 0 to all of at least 1 trial, got {successes} of {trials}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    rate = successes / trials
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    scale = 1 + z * z / trials
    centre = (rate + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(rate * (1 - rate) / trials + (z / (2 * trials)) ** 2)
    # At a rate of 0 or 1 an end is that rate, which rounding would miss.
    return min(rate, max(0.0, centre - half)), max(rate, min(1.0, centre + half))


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Return how likely so uneven a split of disagreements is if both are equally good.

    Two answer the same questions; those that both or neither get right say nothing of which is
    better. The test is exact, from the binomial distribution, and two-sided.

    Args:
        only_first, only_second: questions that only one of them gets right.

    Returns:
        From 0 to 1; 1 without a disagreement.

    Raises:
        ValueError: a count is negative.

    Source: McNemar, Note on the sampling error of the difference between correlated proportions or
    percentages (1947).
    """
    if min(only_first, only_second) < 0:
        raise ValueError(f"counts must not be negative, got {only_first} and {only_second}")
    only_first, only_second = int(only_first), int(only_second)
    count = only_first + only_second
    tail = sum(math.comb(count, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**count)
