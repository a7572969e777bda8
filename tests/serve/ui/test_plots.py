"""Line plots: axes, gaps, thinning, and what assistive technology is told."""

import math
import re

import pytest

from serve.ui.plots import Axis, Line, Point, format_number, line_plot, make_axis, round_step, thin

X = Axis(label="time", low=-10.0, high=0.0, ticks=((-10.0, "before"), (0.0, "now")))


def plot(points: list[Point], **changes: object) -> str:
    lines = [Line(name="Speed", points=points)]
    left = make_axis("tokens/s", [y for _, y in points])
    return line_plot(lines, title="Throughput", x=X, left=left)


def path_of(markup: str) -> str:
    found = re.findall(r'class="plot-line line-0" d="([^"]*)"', markup)
    return str(found[-1])


@pytest.mark.parametrize(
    ("step", "rounded"),
    [(0.03, 0.05), (0.2, 0.2), (0.21, 0.25), (1.0, 1.0), (3.1, 5.0), (7.0, 10.0), (120.0, 200.0)],
)
def test_step_is_round(step: float, rounded: float) -> None:
    assert round_step(step) == pytest.approx(rounded)


@pytest.mark.parametrize("top", [0.9, 1.0, 7.3, 42.0, 999.0, 12345.0])
def test_axis_reaches_every_value(top: float) -> None:
    axis = make_axis("", [0.0, top])
    assert axis.high >= top
    assert 3 <= len(axis.ticks) <= 7


def test_axis_ignores_what_is_not_finite() -> None:
    assert make_axis("", [None, math.nan, math.inf, 3.0]).high == 3.0


def test_axis_of_nothing_reaches_its_least() -> None:
    assert make_axis("", [], least=4).high == 4


def test_exact_axis_ends_at_the_greatest_value() -> None:
    axis = make_axis("", [130.0], is_exact=True)
    assert axis.high == 130
    assert axis.ticks[-1][0] <= 130


def test_axis_share_grows_and_stays_inside() -> None:
    axis = make_axis("", [10.0])
    shares = [axis.share(value) for value in (-5.0, 0.0, 2.5, 10.0, 99.0)]
    assert shares == [0.0, 0.0, 0.25, 1.0, 1.0]


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.75, "0.75"), (1200.0, "1200"), (25_000.0, "25k")]
)
def test_number_is_short(value: float, text: str) -> None:
    assert format_number(value) == text


def test_gap_breaks_the_line() -> None:
    markup = plot([(-10, 1.0), (-8, 2.0), (-6, None), (-4, math.nan), (-2, 1.0), (0, 2.0)])
    assert path_of(markup).count("M") == 2


def test_greater_values_lie_higher() -> None:
    heights = [float(y) for y in re.findall(r" ([\d.]+)", path_of(plot([(-10, 0.0), (0, 1.0)])))]
    assert heights == [1000.0, 0.0]


def test_plot_without_data_says_so() -> None:
    assert "No data yet" in plot([])


def test_plot_with_data_does_not_say_that_there_is_none() -> None:
    assert "No data yet" not in plot([(0, 0.0)])


def test_plot_tells_its_ranges() -> None:
    assert 'aria-label="Throughput, tokens/s. Speed: 1 to 2"' in plot([(-10, 1.0), (0, 2.0)])


def test_plot_is_one_image() -> None:
    assert plot([]).count('role="img"') == 1


def test_plot_labels_its_axes() -> None:
    markup = plot([])
    assert all(f">{text}</text>" in markup for text in ("before", "now", "time"))


def test_lines_on_two_axes_tell_which() -> None:
    lines = [Line(name="T", points=[]), Line(name="H", points=[], is_right=True)]
    markup = line_plot(
        lines, title="", x=X, left=make_axis("none", []), right=make_axis("nats", [])
    )
    assert "T, none (left)" in markup
    assert "H, nats (right)" in markup


def test_names_are_escaped() -> None:
    markup = line_plot(
        [Line(name='<b>"', points=[])], title="<i>", x=X, left=make_axis("<u>", [])
    )  # fmt: skip
    assert not re.search(r"<[biu]>", markup)
    assert 'label="&lt;i&gt;' in markup


def test_few_points_are_all_kept() -> None:
    points: list[Point] = [(0, 1.0), (1, None), (2, 3.0)]
    assert thin(points, 4) == points


def test_thinning_keeps_peaks_and_order() -> None:
    points: list[Point] = [(float(i), 9.0 if i == 517 else i % 2) for i in range(1000)]
    kept = thin(points, 100)
    assert (517.0, 9.0) in kept
    assert kept == sorted(kept)
    assert len(kept) <= 100


def test_thinning_keeps_gaps() -> None:
    points: list[Point] = [(float(i), None if 400 <= i < 600 else 1.0) for i in range(1000)]
    assert any(y is None for _, y in thin(points, 100))
