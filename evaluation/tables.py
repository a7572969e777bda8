"""Tables of reports, in Markdown."""

from collections.abc import Sequence

from stats.bootstrap import Estimate


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    return [_row(head), "|---" * len(head) + "|", *map(_row, rows)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def describe_estimate(estimate: Estimate) -> dict[str, float]:
    """Return an estimate as reports keep it."""
    found = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
    return found if estimate.p is None else {**found, "p": estimate.p}
