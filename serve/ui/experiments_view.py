"""What a server's experiments have shown, as HTML."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from serve.ui.plots import Axis, Line, Point, format_number, line_plot, make_axis, round_step

NOTHING_RUNS = (
    '<p class="empty small">This server runs no experiments; '
    "<code>proa serve --experiments FILE</code> starts them.</p>"
)
_DASH = "\N{EN DASH}"
_HOUR_S, _DAY_S = 3600.0, 86400.0
_NAMES = {
    "rating": "Rating, 0 to 1",
    "accepted": "Accepted, share",
    "preferred": "Preferred, share of comparisons",
}


def render_report(report: Mapping[str, Any]) -> str:
    """Return the arms of an experiment, and for each outcome means, differences and plots."""
    units = {"user": "users", "conversation": "conversations", "request": "requests"}
    who = units.get(str(report["unit"]))
    how = f"Divides {who} among its arms." if who else "Everybody gets all arms and picks one."
    parts = [f'<p class="small">{how}</p>', _arms(report["arms"])]
    for name, outcome in report["outcomes"].items():
        parts.append(f"<h3>{escape(_NAMES.get(name, name))}</h3>")
        parts.append(_means(outcome))
        parts += [
            _effect(label, outcome["arms"], points)
            for label, points in outcome["series"].items()
            if points
        ]
    if not report["outcomes"]:
        parts.append(
            '<p class="empty small">No feedback yet: clients give it with '
            "<code>POST /v1/feedback</code>.</p>"
        )
    else:
        share = format_number(100 * float(report["confidence"]))
        parts.append(
            f'<p class="small">Intervals hold at all times together, with {share} %: look as often '
            "as you like.</p>"
        )
    return "".join(parts)


def _arms(arms: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            str(arm["label"]), str(arm["model"]), f"{arm['weight']:g}", str(arm["exposures"]),
            str(arm["units"]), _seconds(arm["first_token_s"]), _seconds(arm["seconds"]),
            _DASH if arm["completion_tokens"] is None else f"{arm['completion_tokens']:.0f}",
            str(arm["failures"]),
        )
        for arm in arms
    ]  # fmt: skip
    head = (
        "Arm", "Model", "Weight", "Answers", "Units", "First token", "Whole", "Tokens", "Failed",
    )  # fmt: skip
    return _table("Arms", head, rows)


def _means(outcome: Mapping[str, Any]) -> str:
    rows = []
    for label, of in outcome["arms"].items():
        difference = outcome["differences"].get(label)
        mean = _DASH if of["mean"] is None else f"{of['mean']:.3f}"
        shown = verdict = _DASH
        if difference is not None:
            shown = (
                f"{difference['value']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]"
            )
            p = difference["p"]
            verdict = f"{difference['verdict']}, p {'< 0.001' if p < 0.001 else f'= {p:.3f}'}"
        elif label in outcome["differences"]:
            verdict = "too little feedback"
        rows.append((label, str(of["count"]), mean, shown, verdict))
    return _table("Outcome", ("Arm", "Told", "Mean", "Against the first", "Verdict"), rows)


def _table(name: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(text)}</td>" for text in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="table-scroll" tabindex="0" role="region" aria-label="{escape(name)}">'
        f'<table class="facts"><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _effect(label: str, arms: Mapping[str, Any], points: Sequence[Mapping[str, float]]) -> str:
    first = next(iter(arms))
    start_s = points[0]["created"]
    span_s = max(points[-1]["created"] - start_s, 1.0)
    unit_s, unit = (_DAY_S, "days") if span_s > 2 * _DAY_S else (_HOUR_S, "hours")
    if span_s < 2 * _HOUR_S:
        unit_s, unit = 60.0, "minutes"

    def line(name: str, field: str, style: int) -> Line:
        values: list[Point] = [((p["created"] - start_s) / unit_s, p[field]) for p in points]
        return Line(name=name, points=values, style=style)

    ends = [p[field] for p in points for field in ("low", "high")]
    return line_plot(
        [line("Difference", "value", 0), line("Low", "low", 1), line("High", "high", 1)],
        title=f"{label} against {first}",
        x=make_axis(f"{unit} since the first point", [span_s / unit_s], least=span_s / unit_s,
                    is_exact=True),
        left=_signed_axis("difference", min(0.0, *ends), max(0.0, *ends)),
    )  # fmt: skip


def _signed_axis(label: str, low: float, high: float) -> Axis:
    """Return an axis that holds both ends and 0, with round ticks."""
    step = round_step(max(high - low, 1e-3) / 4)
    first, last = int(low // step), -int(-high // step)
    last = max(last, first + 1)
    ticks = tuple((i * step, format_number(i * step)) for i in range(first, last + 1))
    return Axis(label=label, low=first * step, high=last * step, ticks=ticks)


def _seconds(value: float | None) -> str:
    return _DASH if value is None else f"{value:.2f} s"
