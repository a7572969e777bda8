"""What a server's metrics say over time: levels, and rates from counters."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

HISTORY_S = 180.0
# Over a longer pause no rate is told: nobody looked.
MAX_PAUSE_S = 10.0
_SERIES = re.compile(r"([A-Za-z_:][\w:]*)(?:\{.*\})?\s+(\S+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """The metrics at one time.

    Attributes:
        time_s: on any clock that does not go back.
        sums: of each metric over its label sets; None: there was no answer.
    """

    time_s: float
    sums: Mapping[str, float] | None


def parse_metrics(text: str) -> dict[str, float]:
    """Return each metric's sum over its label sets.

    Args:
        text: in Prometheus's format; buckets of histograms and what is no number are left out.
    """
    sums: dict[str, float] = {}
    for line in text.splitlines():
        found = _SERIES.match(line)
        if found is None or found[1].endswith("_bucket"):
            continue
        try:
            value = float(found[2])
        except ValueError:
            continue
        if math.isfinite(value):
            sums[found[1]] = sums.get(found[1], 0.0) + value
    return sums


def keep_recent(samples: Sequence[Sample], sample: Sample) -> list[Sample]:
    """Return the samples with one more, without those that are too old to show."""
    return [*(s for s in samples if sample.time_s - s.time_s <= HISTORY_S), sample]


def level(sample: Sample, name: str) -> float | None:
    """Return a metric's value; None: it is not known."""
    return None if sample.sums is None else sample.sums.get(name)


def rate(earlier: Sample, later: Sample, names: Sequence[str]) -> float | None:
    """Return by how much counters, added up, grew per second.

    A counter that is smaller than before began anew with its server: what it shows came since.

    Args:
        earlier, later: samples next to each other.
        names: of the counters.

    Returns:
        At least 0; None: it is not known.
    """
    pause_s = later.time_s - earlier.time_s
    if not 0 < pause_s <= MAX_PAUSE_S:
        return None
    grown, is_known = 0.0, False
    for name in names:
        before, after = level(earlier, name), level(later, name)
        # A metric with labels appears when it is first counted.
        if after is None or earlier.sums is None:
            continue
        is_known = True
        grown += after if before is None or after < before else after - before
    return grown / pause_s if is_known else None


def levels(samples: Sequence[Sample], name: str) -> list[tuple[float, float | None]]:
    """Return a metric over time, in seconds before the last sample (0 or less)."""
    return [(s.time_s - samples[-1].time_s, level(s, name)) for s in samples]


def rates(samples: Sequence[Sample], names: Sequence[str]) -> list[tuple[float, float | None]]:
    """Return the rate of counters over time, in seconds before the last sample (0 or less)."""
    return [
        (later.time_s - samples[-1].time_s, rate(earlier, later, names))
        for earlier, later in zip(samples, samples[1:], strict=False)
    ]


def share(sample: Sample, part: str, whole: str) -> float | None:
    """Return what part of one counter another is, 0 to 1; None: nothing was counted yet."""
    total, found = level(sample, whole), level(sample, part)
    return found / total if total and found is not None else None
