"""How many pairs a comparison needs before a difference of some size would be seen."""

import math
from statistics import NormalDist

POWER = 0.8


def pairs_needed(
    difference: float,
    deviation: float,
    *,
    confidence: float = 0.95,
    power: float = POWER,
    is_exact: bool = False,
) -> int:
    """Return how many pairs show a difference, two-sided, with some power.

    Args:
        difference: that there is, not 0.
        deviation: standard deviation of the difference of one pair.
        confidence: of the interval that leaves 0 out.
        power: share of comparisons that show it.
        is_exact: by McNemar's exact test, which wants one more disagreement than the normal
            approximation.

    Raises:
        ValueError: an argument is out of range.

    Source: the normal approximation of a paired test, in any textbook, with the continuity
    correction of Fleiss, Statistical methods for rates and proportions.
    """
    if difference == 0 or not math.isfinite(difference):
        raise ValueError(f"no number of pairs shows a difference of {difference}")
    if deviation < 0 or not 0 < confidence < 1 or not 0 < power < 1:
        raise ValueError("deviation must be >= 0, confidence and power between 0 and 1")
    normal = NormalDist()
    reach = normal.inv_cdf((1 + confidence) / 2) + normal.inv_cdf(power)
    count = (reach * deviation / difference) ** 2
    if is_exact and count:
        count *= (1 + math.sqrt(1 + 4 / (count * abs(difference)))) ** 2 / 4
    return max(2, math.ceil(count))
