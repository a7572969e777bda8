"""The Experiments tab: its HTML, and in a browser."""

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from serve.experiments.plan import parse_experiments
from serve.ui.experiments_view import _signed_axis, render_report
from tests.browser import Browser
from tests.serve.ui.conftest import LiveServer

REPORT: dict[str, Any] = {
    "name": "trial",
    "unit": "user",
    "confidence": 0.95,
    "arms": [
        {
            "label": label, "model": "smollm2", "fields": {}, "weight": 1.0, "exposures": 30,
            "units": 20, "first_token_s": 0.25, "seconds": 1.5, "completion_tokens": 40.2,
            "failures": 1,
        }
        for label in ("plain", "<b>")
    ],
    "outcomes": {
        "rating": {
            "arms": {
                "plain": {"count": 30, "units": 20, "mean": 0.4},
                "<b>": {"count": 29, "units": 20, "mean": 0.6},
            },
            "differences": {
                "<b>": {"value": 0.2, "low": -0.05, "high": 0.45, "p": 0.1, "verdict": "undecided"}
            },
            "series": {
                "<b>": [
                    {"created": 1000.0 + 60 * n, "value": 0.2, "low": -0.4 + n / 50,
                     "high": 0.8 - n / 50, "p": 0.5}
                    for n in range(10)
                ]
            },
        }
    },
}  # fmt: skip


def test_report_shows_arms_means_differences_and_their_course() -> None:
    html = render_report(REPORT)
    text = re.sub(r"<[^>]+>", " ", html)
    for part in ("Divides users", "plain", "0.25 s", "1.50 s", "0.400", "+0.200 [-0.050, +0.450]",
                 "undecided, p = 0.100", "minutes since the first point", "95 %"):  # fmt: skip
        assert part in text
    assert "<b>" not in html
    assert html.count("plot-line") >= 3


def test_report_without_feedback_says_how_to_give_it() -> None:
    html = render_report({**REPORT, "unit": "paired", "outcomes": {}})
    assert "Everybody gets all arms" in html
    assert "POST /v1/feedback" in html


def test_report_of_few_says_so() -> None:
    outcome = {
        "arms": {"plain": {"count": 1, "units": 1, "mean": 1.0},
                 "b": {"count": 0, "units": 0, "mean": None}},
        "differences": {"b": None}, "series": {"b": []},
    }  # fmt: skip
    html = render_report({**REPORT, "outcomes": {"accepted": outcome}})
    assert "too little feedback" in html
    assert "plot" not in html


@pytest.mark.parametrize(("low", "high"), [(-0.4, 0.8), (0.0, 0.3), (-0.2, 0.0), (0.0, 0.0)])
def test_signed_axis_holds_its_ends_and_zero(low: float, high: float) -> None:
    axis = _signed_axis("x", low, high)
    assert axis.low <= low <= high <= axis.high
    assert axis.low < axis.high
    assert any(abs(value) < 1e-12 for value, _ in axis.ticks)


@pytest.fixture
def experiment(live: LiveServer) -> Iterator[LiveServer]:
    """The server with an experiment that has had feedback."""
    live.stop()
    arms = [{"label": "plain", "model": "smollm2"}, {"label": "adapt", "model": "smollm2@adapt"}]
    live.plan = parse_experiments([{"name": "trial", "arms": arms}])
    live.start()
    for number in range(60):
        body = {"model": "trial", "user": str(number),
                "messages": [{"role": "user", "content": "hi"}]}  # fmt: skip
        answer = httpx.post(f"{live.url}/v1/chat/completions", json=body)
        rating = 0.9 if answer.headers["x-proa-arm"] == "adapt" else 0.1
        feedback = {"id": answer.json()["id"], "rating": rating}
        assert httpx.post(f"{live.url}/v1/feedback", json=feedback).status_code == 200
    yield live
    live.plan = ()


@pytest.mark.browser
def test_tab_shows_the_effect_of_an_experiment(experiment: LiveServer, browser: Browser) -> None:
    browser.troubles.clear()
    page = browser.open(f"{experiment.url}/ui/")
    page.get_by_role("tab", name="Experiments").click()
    report = page.locator("#experiments-report")
    report.get_by_text("better, p < 0.001").wait_for()
    assert report.locator("figure.plot").count() == 1
    assert page.locator("#experiments-name input").input_value() == "trial"
    page.context.close()
    assert browser.troubles == []


@pytest.mark.browser
def test_tab_of_a_server_without_experiments_says_how_to_start_them(
    live: LiveServer, browser: Browser
) -> None:
    browser.troubles.clear()
    page = browser.open(f"{live.url}/ui/")
    page.get_by_role("tab", name="Experiments").click()
    page.locator("#experiments-report").get_by_text("runs no experiments").wait_for()
    page.context.close()
    assert browser.troubles == []
