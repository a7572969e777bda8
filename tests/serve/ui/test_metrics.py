"""A server's metrics over time: parsing, rates over restarts and pauses, and how they are shown."""

import pytest

from serve.ui.messages import render_message
from serve.ui.metrics import (
    HISTORY_S,
    MAX_PAUSE_S,
    Sample,
    keep_recent,
    level,
    levels,
    parse_metrics,
    rate,
    rates,
    share,
)
from serve.ui.server_view import (
    GENERATED,
    format_bytes,
    format_count,
    render_adapters,
    render_live,
)

TEXT = """# HELP tokens_total Generated tokens.
# TYPE tokens_total counter
tokens_total{model="a",strategy="adapt"} 31.0
tokens_total{model="a",strategy="fixed"} 1.95e+02
running 2
delay_bucket{le="1.0"} 7
delay_bucket{le="+Inf"} 9
delay_count 9
odd{name="a } b \\" c"} 4
usage NaN
"""
ENTRY = {
    "name": "poet", "kind": "side_network", "description": "Rhymes", "num_parameters": 744_043,
    "num_bytes": 3_283_108, "on": None, "removed": None, "speed": None, "is_loaded": True,
    "num_running": 1,
}  # fmt: skip


def sample(time_s: float, **sums: float) -> Sample:
    return Sample(time_s=time_s, sums=sums)


def test_label_sets_are_added_up() -> None:
    assert parse_metrics(TEXT)["tokens_total"] == 226


def test_metric_without_labels_is_read() -> None:
    assert parse_metrics(TEXT)["running"] == 2


def test_buckets_are_left_out() -> None:
    parsed = parse_metrics(TEXT)
    assert "delay_bucket" not in parsed
    assert parsed["delay_count"] == 9


def test_braces_and_quotes_in_labels_are_no_end() -> None:
    assert parse_metrics(TEXT)["odd"] == 4


def test_what_is_no_number_is_not_known() -> None:
    assert "usage" not in parse_metrics(TEXT)


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment", "<html>no metrics</html>"])
def test_text_without_metrics_has_none(text: str) -> None:
    assert parse_metrics(text) == {}


def test_rate_is_the_difference_per_second() -> None:
    assert rate(sample(10, a=100), sample(12, a=150), ["a"]) == 25


def test_rate_adds_counters_up() -> None:
    assert rate(sample(0, a=1, b=10), sample(2, a=3, b=14), ["a", "b"]) == 3


def test_rate_after_a_restart_counts_from_zero() -> None:
    assert rate(sample(0, a=5000), sample(2, a=8), ["a"]) == 4


def test_rate_of_a_counter_that_was_not_there_counts_from_zero() -> None:
    assert rate(sample(0), sample(2, a=8), ["a"]) == 4


def test_rate_over_a_long_pause_is_not_known() -> None:
    assert rate(sample(0, a=1), sample(MAX_PAUSE_S + 1, a=2), ["a"]) is None


def test_rate_of_equal_times_is_not_known() -> None:
    assert rate(sample(5, a=1), sample(5, a=2), ["a"]) is None


@pytest.mark.parametrize("is_first", [True, False])
def test_rate_next_to_no_answer_is_not_known(*, is_first: bool) -> None:
    pair = [Sample(time_s=0, sums=None), sample(2, a=1)]
    earlier, later = pair if is_first else reversed(pair)
    changed = Sample(time_s=earlier.time_s + 2, sums=later.sums)
    assert rate(earlier, changed, ["a"]) is None


def test_rates_have_a_point_for_each_later_sample() -> None:
    samples = [sample(0, a=0), sample(2, a=4), sample(4, a=4)]
    assert rates(samples, ["a"]) == [(-2, 2), (0, 0)]


def test_rates_of_one_sample_are_none() -> None:
    assert rates([sample(0, a=1)], ["a"]) == []


def test_levels_have_gaps_where_there_was_no_answer() -> None:
    samples = [sample(0, a=1), Sample(time_s=2, sums=None), sample(4, a=3)]
    assert levels(samples, "a") == [(-4, 1), (-2, None), (0, 3)]


def test_level_of_an_unknown_metric_is_none() -> None:
    assert level(sample(0, a=1), "b") is None


def test_old_samples_are_dropped() -> None:
    kept = keep_recent([sample(0), sample(100)], sample(HISTORY_S + 50))
    assert [s.time_s for s in kept] == [100, HISTORY_S + 50]


def test_share_is_part_of_the_whole() -> None:
    assert share(sample(0, hits=80, queries=226), "hits", "queries") == pytest.approx(80 / 226)


def test_share_of_nothing_is_not_known() -> None:
    assert share(sample(0, hits=0, queries=0), "hits", "queries") is None


def test_tiles_show_the_speed_between_samples() -> None:
    counts = [dict.fromkeys(GENERATED, value) for value in (0.0, 30.0)]
    shown = render_live([Sample(time_s=2.0 * i, sums=sums) for i, sums in enumerate(counts)])
    assert "<dt>Generating</dt><dd><b>30</b>" in shown


def test_tiles_without_an_answer_say_why() -> None:
    shown = render_live([Sample(time_s=0, sums=None)], "No server answers at <here>.")
    assert 'role="alert">No server answers at &lt;here&gt;.' in shown
    assert "is-stale" in shown


def test_tiles_before_any_sample_show_no_numbers() -> None:
    assert "<b>0</b>" not in render_live([])


@pytest.mark.parametrize(
    ("count", "text"),
    [(12, "12"), (744_043, "744k"), (999_960, "1M"), (108e6, "108M"), (1.35e9, "1.35G")],
)
def test_count_is_short(count: float, text: str) -> None:
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (3_283_108, "3.13 MiB"), (2 * 1024**3, "2 GiB")]
)
def test_bytes_have_a_unit(count: float, text: str) -> None:
    assert format_bytes(count) == text


def test_table_shows_a_side_network_on_the_base() -> None:
    table = render_adapters([ENTRY])
    for text in ("<strong>poet</strong>", ">side network<", ">base<", ">744k<", ">3.13 MiB<"):
        assert text in table


def test_table_shows_what_a_variant_saves() -> None:
    table = render_adapters([{**ENTRY, "kind": "variant", "removed": 0.2, "speed": 1.25}])
    assert ">variant<" in table
    assert ">20.0%<" in table
    assert ">1.25 \u00d7 the base's<" in table


def test_table_escapes_what_a_folder_says() -> None:
    assert "<img" not in render_adapters([{**ENTRY, "description": "<img src=x>", "on": "<img>"}])


def test_table_of_nothing_says_so() -> None:
    assert "Nothing is attached" in render_adapters([])


def test_problem_is_announced_and_escaped() -> None:
    assert render_message("<b>", is_problem=True).endswith('role="alert">&lt;b&gt;</div>')
