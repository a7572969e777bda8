"""How far two lists of values go together."""

import math
from collections import Counter
from collections.abc import Sequence


def pearson(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Pearson's correlation; NaN if one of the two never changes.

    Args:
        first, second: equally many values, at least one.
    """
    count = len(first)
    means = math.fsum(first) / count, math.fsum(second) / count
    away = [(a - means[0], b - means[1]) for a, b in zip(first, second, strict=True)]
    scale = math.sqrt(math.fsum(a * a for a, _ in away) * math.fsum(b * b for _, b in away))
    return math.fsum(a * b for a, b in away) / scale if scale else math.nan


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's correlation, of ranks; equal values share the mean of theirs."""
    return pearson(_ranks(first), _ranks(second))


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for index in order[start:end]:
            ranks[index] = (start + end - 1) / 2
        start = end
    return ranks


def matthews(pairs: Sequence[tuple[str, str]]) -> float:
    """Return Matthews' correlation of (known, said) classes; 0 if one of the two never changes.

    With more than two classes it is Gorodkin's (2004) generalisation.
    """
    count = len(pairs)
    right = sum(known == said for known, said in pairs)
    known, said = Counter(pair[0] for pair in pairs), Counter(pair[1] for pair in pairs)
    agreed = sum(known[label] * said[label] for label in known)
    spans = [count * count - sum(n * n for n in of.values()) for of in (known, said)]
    scale = math.sqrt(spans[0] * spans[1])
    return (right * count - agreed) / scale if scale else 0.0
