"""Tables of reports, in Markdown."""

from collections.abc import Mapping, Sequence

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


def percent(estimate: Mapping[str, float] | None) -> str:
    """Return a share and its interval in percent; nothing for none."""
    if estimate is None:
        return ""
    value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
    return f"{value:.2f} [{low:.1f}, {high:.1f}]"


def points(estimate: Mapping[str, float]) -> str:
    """Return a difference of shares and its interval in points."""
    value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def tested_points(estimate: Mapping[str, float]) -> str:
    """Return the same with the p of no difference."""
    return f"{points(estimate)}, {p_value(estimate['p'])}"


def p_value(p: float) -> str:
    """Return a p in words that follow a comma."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
