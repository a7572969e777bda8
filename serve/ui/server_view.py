"""What a server has and does, as HTML."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from serve.ui.messages import render_problem
from serve.ui.metrics import HISTORY_S, Sample, level, levels, rates, share
from serve.ui.plots import Axis, Line, Point, line_plot, make_axis

# The server counts tokens of whole requests only once they have ended. These grow with each token:
# the first of a request is in one, all others in the other.
GENERATED = (
    "proa_time_to_first_token_seconds_count", "proa_inter_token_latency_seconds_count",
)  # fmt: skip
PROMPT = ("proa_prefix_cache_queries_total",)
HITS = "proa_prefix_cache_hits_total"
RUNNING, WAITING = "proa_num_requests_running", "proa_num_requests_waiting"
KV_USAGE, SIDE_KV_USAGE = "proa_kv_cache_usage_perc", "proa_side_kv_cache_usage_perc"
_COLUMNS = (
    "Name", "Kind", "On", "Parameters", "Memory", "In memory", "Requests", "Removed", "Speed",
)  # fmt: skip
_NOTHING = "\N{EN DASH}"


def render_live(samples: Sequence[Sample], problem: str = "") -> str:
    """Return tiles with what the server does now, and plots of the last minutes.

    Args:
        samples: of its metrics, oldest first.
        problem: why there is no answer now.
    """
    now = samples[-1] if samples else Sample(time_s=0.0, sums=None)
    generated, prompt = rates(samples, GENERATED), rates(samples, PROMPT)
    running, waiting = (levels(samples, name) for name in (RUNNING, WAITING))
    usage, side_usage = (_percent(levels(samples, name)) for name in (KV_USAGE, SIDE_KV_USAGE))
    hits = share(now, HITS, PROMPT[0])
    tiles = (
        ("Running", "requests", _number(level(now, RUNNING))),
        ("Waiting", "requests", _number(level(now, WAITING))),
        ("Generating", "tokens/s", _number(_last(generated))),
        ("Prompts", "tokens/s", _number(_last(prompt))),
        ("KV cache", "in use", _number(_last(usage), " %")),
        ("Prefix cache", "found since start", _number(None if hits is None else hits * 100, " %")),
    )
    plots = (
        _plot("Throughput", "tokens/s", {"Generating": generated, "Prompts": prompt}, least=1),
        _plot("Queue", "requests", {"Running": running, "Waiting": waiting}, least=4),
        _plot("KV cache in use", "%", {"Models": usage, "Side networks": side_usage}, least=10),
    )
    message = render_problem(problem) if problem else ""
    state = " is-stale" if now.sums is None else ""
    shown = "".join(
        f'<div class="tile"><dt>{name}</dt><dd><b>{value}</b> <span>{unit}</span></dd></div>'
        for name, unit, value in tiles
    )
    return (
        f'{message}<dl class="tiles{state}">{shown}</dl><div class="plots">{"".join(plots)}</div>'
    )


def render_adapters(entries: Sequence[dict[str, Any]]) -> str:
    """Return the table of attached adapters and variants."""
    if not entries:
        return '<p class="empty small">Nothing is attached: only the base answers.</p>'
    head = "".join(f'<th scope="col">{name}</th>' for name in _COLUMNS)
    rows = "".join(_row(entry) for entry in entries)
    return (
        '<div class="table-scroll" tabindex="0" role="region" aria-label="Attached adapters and '
        f'variants"><table class="facts"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody>'
        "</table></div>"
    )


def format_count(count: float) -> str:
    """Return a number of things in three digits: 744 thousand is 744k."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        # What rounds to the next unit is told in it.
        if count >= size * 0.9995:
            return f"{float(f'{count / size:.3g}'):g}{unit}"
    return f"{count:g}"


def format_bytes(count: float) -> str:
    """Return an amount of memory in its binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1000 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.3g} {unit}"


def _row(entry: dict[str, Any]) -> str:
    description = entry.get("description") or ""
    name = f"<strong>{escape(entry['name'])}</strong>"
    if description:
        name += f'<span class="about">{escape(description)}</span>'
    removed, speed = entry.get("removed"), entry.get("speed")
    cells = (
        escape(entry["kind"].replace("_", " ")),
        escape(entry.get("on") or "base"),
        format_count(entry["num_parameters"]),
        format_bytes(entry["num_bytes"]),
        "yes" if entry["is_loaded"] else "no, read when asked for",
        str(entry["num_running"]),
        _NOTHING if removed is None else f"{removed:.1%}",
        _NOTHING if speed is None else f"{speed:.2f} \N{MULTIPLICATION SIGN} the base's",
    )
    # On a phone each row is a card, whose cells bear the names of their columns.
    shown = "".join(
        f'<td data-column="{column}">{cell}</td>'
        for column, cell in zip(_COLUMNS[1:], cells, strict=True)
    )
    return f'<tr><th scope="row">{name}</th>{shown}</tr>'


def _plot(title: str, unit: str, points: Mapping[str, Sequence[Point]], *, least: float) -> str:
    """Return a plot over time; what is below the first line is shaded."""
    minutes = range(round(HISTORY_S / 60), 0, -1)
    ticks = (*((-60.0 * i, f"-{i} min") for i in minutes), (0.0, "now"))
    return line_plot(
        [
            Line(name=name, points=line, is_area=i == 0)
            for i, (name, line) in enumerate(points.items())
        ],
        title=title,
        x=Axis(label="time", low=-HISTORY_S, high=0.0, ticks=ticks),
        left=make_axis(unit, (y for line in points.values() for _, y in line), least=least),
    )


def _percent(points: Sequence[Point]) -> list[Point]:
    return [(x, None if y is None else y * 100) for x, y in points]


def _last(points: Sequence[Point]) -> float | None:
    return points[-1][1] if points else None


def _number(value: float | None, unit: str = "") -> str:
    if value is None:
        return _NOTHING
    return f"{value:.0f}{unit}" if value >= 100 or value == int(value) else f"{value:.1f}{unit}"
