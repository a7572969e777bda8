"""An answer token by token: escaping, colour scales, classes, and the data of the details."""

import html
import json
import math
import re
from typing import Any

import pytest

from serve.ui.tokens import (
    CLASSES,
    SMALLEST_LOGPROB,
    Token,
    measure_range,
    read_tokens,
    render_legend,
    render_plot,
    render_token,
    scales_css,
    spell,
)

HOSTILE = "</span><script>alert(1)</script>' onfocus=alert(2) x=\""


def make_token(text: str = "a", **changes: Any) -> Token:
    fields: dict[str, Any] = {
        "token_id": 7, "token_class": "X", "temperature": 0.3, "entropy": 1.5, "logprob": -0.5,
        "alternatives": ((text, -0.5), ("b", -1.5)),
    }  # fmt: skip
    return Token(text=text, **{**fields, **changes})


def details_of(markup: str) -> list[Any]:
    found = re.search(r"data-token='([^']*)'", markup)
    assert found is not None
    told = json.loads(html.unescape(found[1]))
    assert isinstance(told, list)
    return told


def style_value(markup: str, name: str) -> float:
    found = re.search(rf"--{name}:([^;]+);", markup)
    assert found is not None
    return float(found[1])


def make_choice(**entry: Any) -> dict[str, Any]:
    trace = {"token": "a", "token_id": 7, "class": "X", "temperature": 0.3, "entropy": 1.5,
             "logprob": -0.5, **entry}  # fmt: skip
    top = [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -1.5}]
    return {"decoding_trace": [trace], "logprobs": {"content": [{"top_logprobs": top}]}}


def test_token_is_read_with_its_alternatives() -> None:
    assert read_tokens(make_choice()) == [make_token()]


def test_choice_without_a_trace_has_no_tokens() -> None:
    assert read_tokens({"delta": {"role": "assistant"}, "logprobs": None}) == []


def test_token_of_a_strategy_without_classes_is_read() -> None:
    (token,) = read_tokens(make_choice(**{"class": None}))
    assert token.token_class is None


@pytest.mark.parametrize(
    ("text", "spelt"),
    [(" a", "\u2423a"), ("\n", "\u21b5"), ("\t", "\u21e5"), ("\x00", "\u2400"),
     ("\u202e", "\\u202e"), ("", "(nothing)")],
    ids=["space", "newline", "tab", "control", "direction", "empty"],
)  # fmt: skip
def test_what_cannot_be_seen_is_spelt(text: str, spelt: str) -> None:
    assert spell(text) == spelt


def test_hostile_text_makes_no_markup() -> None:
    markup = render_token(make_token(HOSTILE, token_class=HOSTILE), 0)
    assert markup.count("<") == 2  # the token's own two tags
    assert "<script" not in markup


def test_hostile_text_does_not_leave_its_attribute() -> None:
    markup = render_token(make_token(HOSTILE), 0)
    tag = markup[: markup.index(">")]
    assert "onfocus" not in re.sub(r"'[^']*'|\"[^\"]*\"", "", tag)


def test_hostile_text_arrives_whole_in_the_details() -> None:
    told = details_of(render_token(make_token(HOSTILE), 0))
    assert told[0] == spell(HOSTILE)


def test_newline_breaks_the_line_and_is_shown() -> None:
    assert "<i>\u21b5</i>\n   </span>" in render_token(make_token("\n   "), 0)


def test_direction_of_text_is_not_turned() -> None:
    markup = render_token(make_token("\u202eabc", alternatives=()), 0)
    assert "\u202e" not in markup


def test_only_the_first_token_is_a_stop_of_the_tab_key() -> None:
    stops = [' tabindex="0"' in render_token(make_token(), place) for place in range(3)]
    assert stops == [True, False, False]


def test_blank_token_has_a_name() -> None:
    assert f'aria-label="{spell(" ")}"' in render_token(make_token(" "), 0)


def test_details_tell_probability_and_surprise() -> None:
    told = details_of(render_token(make_token(logprob=-1.0), 0))
    assert told[5:7] == [1.0, pytest.approx(math.exp(-1), abs=1e-3)]


def test_details_mark_the_chosen_alternative() -> None:
    told = details_of(render_token(make_token(), 0))
    assert [(text, chosen) for text, _, chosen in told[7]] == [("a", 1), ("b", 0)]


def test_chosen_token_that_is_not_among_the_likeliest_is_added() -> None:
    token = make_token("z", logprob=-7.0, alternatives=(("a", -0.1), ("b", -3.0)))
    assert details_of(render_token(token, 0))[7][-1] == ["z", pytest.approx(math.exp(-7), 1e-2), 1]


def test_measures_that_are_not_known_are_told_as_such() -> None:
    token = make_token(temperature=None, entropy=math.nan, logprob=None)
    markup = render_token(token, 0)
    assert details_of(markup)[3:7] == [None] * 4
    assert 'style=""' in markup


def test_token_that_cannot_come_is_infinitely_surprising() -> None:
    token = make_token(logprob=SMALLEST_LOGPROB)
    assert token.surprise == math.inf
    assert details_of(render_token(token, 0))[5] == "infinite"


@pytest.mark.parametrize("field", ["temperature", "entropy"])
def test_colour_follows_the_measure(field: str) -> None:
    values = [0.0, 0.3, 0.8, 2.0]
    shown = [
        style_value(render_token(make_token(**{field: value}), 0), field[0]) for value in values
    ]
    assert shown == values


def test_colour_follows_the_surprise() -> None:
    logprobs = [0.0, -0.1, -2.0, -11.0, SMALLEST_LOGPROB]
    shown = [style_value(render_token(make_token(logprob=x), 0), "s") for x in logprobs]
    assert shown == sorted(shown)
    assert len(set(shown)) == len(shown)


def test_range_leaves_out_what_is_not_finite() -> None:
    logprobs = [-0.5, SMALLEST_LOGPROB, None, -2.0]
    tokens = [make_token(logprob=x) for x in logprobs]
    assert measure_range(tokens, "surprise") == (0.5, 2.0)


def test_range_of_nothing_is_none() -> None:
    assert measure_range([make_token(entropy=math.nan)], "entropy") is None


def test_scale_of_equal_values_does_not_divide_by_zero() -> None:
    assert style_value(scales_css([make_token(), make_token()]), "t-span") == 1


def test_scales_hold_the_ends() -> None:
    css = scales_css([make_token(entropy=0.5), make_token(entropy=3.0)])
    assert (style_value(css, "e-low"), style_value(css, "e-span")) == (0.5, 2.5)


def test_legend_has_the_numbers_of_each_scale() -> None:
    legend = render_legend([make_token(temperature=0.3), make_token(temperature=0.8)])
    assert "<span>0.30</span>" in legend
    assert "<span>0.80</span>" in legend


def test_legend_tells_a_constant_temperature() -> None:
    assert "0.70 everywhere" in render_legend([make_token(temperature=0.7)])


@pytest.mark.parametrize("name", CLASSES)
def test_legend_explains_a_class_that_is_there(name: str) -> None:
    assert f"{CLASSES[name]} (2)" in render_legend([make_token(token_class=name)] * 2)


def test_legend_without_classes_names_none() -> None:
    assert "class-key" not in render_legend([make_token(token_class=None)])


def test_legend_of_nothing_is_empty() -> None:
    assert render_legend([]) == ""


def test_growing_answer_only_appends() -> None:
    tokens = [make_token(text, entropy=i) for i, text in enumerate(["a", "\n", " b"])]
    short = "".join(render_token(t, i) for i, t in enumerate(tokens[:2]))
    assert "".join(render_token(t, i) for i, t in enumerate(tokens)).startswith(short)


def test_plot_tells_both_lines() -> None:
    plot = render_plot([make_token(temperature=0.3), make_token(temperature=0.8)])
    assert "Temperature: 0.3 to 0.8; Entropy: 1.5 to 1.5" in plot


def test_plot_of_a_long_answer_is_thinned() -> None:
    tokens = [make_token(entropy=float(i % 7)) for i in range(4000)]
    assert render_plot(tokens).count("L") < 4000


def test_plot_of_nothing_says_so() -> None:
    assert "No data yet" in render_plot([])
