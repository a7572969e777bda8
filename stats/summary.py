"""Many values in a few numbers."""

from collections.abc import Sequence
from statistics import median, quantiles


def latency(values_ms: Sequence[float]) -> dict[str, float]:
    """Give the median and the 90th percentile."""
    values = list(values_ms)
    ninety = quantiles(values, n=10, method="inclusive")[-1] if len(values) > 1 else values[0]
    return {"median": round(median(values), 2), "p90": round(ninety, 2)}


def spread(values: Sequence[float]) -> list[float]:
    """Give the smallest and the largest value."""
    return [round(min(values), 1), round(max(values), 1)]


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Give the median of the ratios of values measured in turn.

    A machine's speed wanders less from one turn to the next than over them all.
    """
    return median(x / y for x, y in zip(ours, theirs, strict=True))
