"""Line plots as inline SVG, whose text keeps its size at any width."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeGuard

Point = tuple[float, float | None]
_HEIGHT = 150
_INNER = 1000  # the lines' own coordinates, stretched to the plot
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """A linear axis.

    Attributes:
        label: what is measured and its unit.
        low, high: its ends, low < high.
        ticks: places on it and what is written there.
    """

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]

    def share(self, value: float) -> float:
        """Return where a value lies, 0 at the low end and 1 at the high one."""
        return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A named line.

    Attributes:
        name: in the legend.
        points: in order of x; y is None where there is a gap.
        is_right: it is measured on the right axis.
        is_area: what lies below it is shaded.
        style: number of its colour and dashes; None: its own place.
    """

    name: str
    points: Sequence[Point]
    is_right: bool = False
    is_area: bool = False
    style: int | None = None


def make_axis(
    label: str, values: Iterable[float | None], *, least: float = 1.0, num_ticks: int = 4,
    is_exact: bool = False,
) -> Axis:  # fmt: skip
    """Return an axis from 0 to a round number that is not below any value.

    Args:
        label: of the axis.
        values: to be shown, not negative; None and what is not finite are left out.
        least: the axis reaches it at least, > 0.
        num_ticks: about how many ticks, beside the one at 0.
        is_exact: it ends at the greatest value, round or not.
    """
    top = max([least, *(v for v in values if _is_finite(v))])
    step = round_step(top / num_ticks)
    count = math.floor(top / step + 1e-9) if is_exact else math.ceil(top / step - 1e-9)
    ticks = tuple((i * step, format_number(i * step)) for i in range(count + 1))
    return Axis(label=label, low=0.0, high=top if is_exact else count * step, ticks=ticks)


def round_step(step: float) -> float:
    """Return the next number that is 1, 2, 2.5 or 5 times a power of ten; step > 0."""
    power = 10.0 ** math.floor(math.log10(step))
    return float(next(s * power for s in _STEPS if s * power >= step * (1 - 1e-9)))


def format_number(value: float) -> str:
    """Return a number in few characters."""
    if abs(value) >= 10_000:
        return f"{value / 1000:.4g}k"
    return f"{value:.4g}"


def thin(points: Sequence[Point], most: int) -> list[Point]:
    """Return at most so many points that look the same: of each stretch the lowest and highest.

    Args:
        points: in order of x.
        most: even, >= 2.
    """
    if len(points) <= most:
        return list(points)
    kept: list[Point] = []
    count = most // 2
    for i in range(count):
        stretch = points[i * len(points) // count : (i + 1) * len(points) // count]
        known = [point for point in stretch if _is_finite(point[1])]
        if not known:
            kept.append(stretch[0])
            continue
        ends = {min(known, key=_height), max(known, key=_height)}
        kept.extend(sorted(ends, key=lambda point: point[0]))
    return kept


def line_plot(
    lines: Sequence[Line], *, title: str, x: Axis, left: Axis, right: Axis | None = None
) -> str:
    """Return the HTML of a plot with its legend.

    Lines differ in colour and in how they are dashed.

    Args:
        lines: to draw.
        title: of the plot.
        x, left, right: axes; a line on the right needs the right one.
    """
    styled = [(i if line.style is None else line.style, line) for i, line in enumerate(lines)]
    drawn = "".join(_line(i, line, x, (right or left) if line.is_right else left)
                    for i, line in styled)  # fmt: skip
    told = "; ".join(f"{line.name}: {_range(line.points)}" for line in lines)
    has_points = any(_is_finite(value) for line in lines for _, value in line.points)
    empty = '<text class="plot-empty" x="50%" y="50%">No data yet</text>'
    side = " two-axes" if right else ""
    name = title if right else f"{title}, {left.label}"
    return (
        f'<figure class="plot{side}"><figcaption><strong>{escape(name)}</strong>'
        f"{''.join(_legend(i, line, left, right) for i, line in styled)}</figcaption>"
        f'<svg role="img" aria-label="{escape(f"{name}. {told}")}" width="100%" '
        f'height="{_HEIGHT}" overflow="visible" data-low="{x.low:g}" data-high="{x.high:g}">'
        f"{_grid(x, left, right)}"
        f'<svg width="100%" height="{_HEIGHT}" viewBox="0 0 {_INNER} {_INNER}" '
        f'preserveAspectRatio="none" overflow="visible">{drawn}</svg>'
        f'{"" if has_points else empty}<line class="plot-mark" y1="0" y2="{_HEIGHT}"></line>'
        "</svg></figure>"
    )


def _line(index: int, line: Line, x: Axis, y: Axis) -> str:
    stretches: list[list[str]] = [[]]
    for place, value in line.points:
        if _is_finite(value):
            stretches[-1].append(
                f"{x.share(place) * _INNER:.1f} {(1 - y.share(value)) * _INNER:.1f}"
            )
        elif stretches[-1]:
            stretches.append([])
    drawn = [stretch for stretch in stretches if stretch]
    path = "".join("M" + "L".join(stretch) for stretch in drawn)
    area = ""
    if line.is_area:
        shape = "".join(
            f"M{s[0].split()[0]} {_INNER}L{'L'.join(s)}L{s[-1].split()[0]} {_INNER}Z" for s in drawn
        )
        area = f'<path class="plot-area line-{index}" d="{shape}"></path>'
    return f'{area}<path class="plot-line line-{index}" d="{path}"></path>'


def _grid(x: Axis, left: Axis, right: Axis | None) -> str:
    parts = []
    for value, text in left.ticks:
        y = (1 - left.share(value)) * _HEIGHT
        parts.append(
            f'<line class="plot-grid" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"></line>'
            f'<text class="plot-tick at-left" x="0" dx="-7" y="{y:.1f}" dy="4">'
            f"{escape(text)}</text>"
        )
    for value, text in right.ticks if right else ():
        y = (1 - right.share(value)) * _HEIGHT if right else 0.0
        parts.append(
            f'<text class="plot-tick at-right" x="100%" dx="7" y="{y:.1f}" dy="4">'
            f"{escape(text)}</text>"
        )
    for value, text in x.ticks:
        share = x.share(value)
        parts.append(
            f'<text class="plot-tick at-bottom" x="{share:.2%}" y="{_HEIGHT}" dy="17">'
            f"{escape(text)}</text>"
        )
    parts.append(f'<text class="plot-label" x="50%" y="{_HEIGHT}" dy="33">{escape(x.label)}</text>')
    return "".join(parts)


def _legend(index: int, line: Line, left: Axis, right: Axis | None) -> str:
    sample = (
        f'<path class="plot-area line-{index}" d="M0 4H26V12H0Z"></path>' if line.is_area else ""
    )
    where = ""
    if right:
        where = f", {right.label} (right)" if line.is_right else f", {left.label} (left)"
    return (
        f'<span class="plot-key"><svg width="26" height="12" aria-hidden="true">'
        f'{sample}<path class="plot-line line-{index}" d="M0 4L26 4"></path></svg>'
        f"{escape(line.name + where)}</span>"
    )


def _range(points: Sequence[Point]) -> str:
    known = [value for _, value in points if _is_finite(value)]
    if not known:
        return "no data"
    return f"{format_number(min(known))} to {format_number(max(known))}"


def _is_finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _height(point: Point) -> float:
    assert point[1] is not None
    return point[1]
