"""The Inside tab in a browser, over a scripted server."""

from typing import Any

import pytest

from serve.backends.protocol import QueueFullError
from tests.browser import Browser
from tests.serve.ui.conftest import LiveServer, Pace, delay_cancellation, wait_until

pytestmark = pytest.mark.browser


@pytest.fixture
def page(live: LiveServer, browser: Browser) -> Any:
    browser.troubles.clear()
    live.say("def hello(name):\n    return name\n")
    page = browser.open(f"{live.url}/ui/")
    page.get_by_role("tab", name="Inside").click()
    page.fill("#inside-prompt textarea", "hi")
    yield page
    page.context.close()
    assert browser.troubles == []


def run(page: Any, *, count: int) -> Any:
    """Ask, wait for so many tokens, and return their elements."""
    page.click("#inside-run")
    page.locator("#inside-tokens .token").nth(count - 1).wait_for()
    page.locator("#inside-run").wait_for()
    return page.locator("#inside-tokens .token")


def count_tokens(live: LiveServer, text: str) -> int:
    return len(live._tokenizer.encode(text)) + 1


def test_answer_is_shown_token_by_token(page: Any, live: LiveServer) -> None:
    live.say("hello fox")
    tokens = run(page, count=count_tokens(live, "hello fox"))
    assert "hello fox" in "".join(tokens.all_inner_texts())
    (request,) = live.backend.requests
    assert request.is_traced
    assert request.arms[0].params.logprobs == 8


def test_chosen_measure_gives_the_colour(page: Any, live: LiveServer) -> None:
    live.say("the quick brown fox")
    tokens = run(page, count=3)
    colours = set()
    for measure in ("Temperature", "Entropy", "Surprise"):
        page.locator("#inside-color label").filter(has_text=measure).click()
        page.wait_for_timeout(300)
        colours.add(
            tuple(
                tokens.nth(i).evaluate("e => getComputedStyle(e).backgroundColor")
                for i in range(tokens.count() - 1)
            )
        )
    # The script's temperature and entropy are the same for all tokens, surprises are not.
    assert any(len(set(found)) > 1 for found in colours)
    assert any(len(set(found)) == 1 for found in colours)


def test_token_shows_its_alternatives_when_pointed_at(page: Any, live: LiveServer) -> None:
    live.say("hello fox")
    tokens = run(page, count=2)
    tokens.first.hover()
    details = page.locator("#inside-details")
    details.get_by_text("entropy", exact=False).first.wait_for()
    text = details.inner_text()
    assert "1.5" in text
    assert "%" in text


def test_tokens_are_reached_by_keyboard(page: Any, live: LiveServer) -> None:
    live.say("hello fox")
    tokens = run(page, count=2)
    tokens.first.focus()
    before = page.locator("#inside-details").inner_text()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(
        "before => document.querySelector('#inside-details').innerText != before", arg=before
    )
    assert tokens.nth(1).evaluate("e => e === document.activeElement")


def test_plot_follows_the_answer(page: Any, live: LiveServer) -> None:
    run(page, count=3)
    plot = page.locator("#inside-plot svg[role=img]")
    plot.wait_for()
    assert "emperature" in (plot.get_attribute("aria-label") or "")


def test_markup_of_a_model_is_shown_as_text(page: Any, live: LiveServer) -> None:
    text = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
    live.say(text)
    tokens = run(page, count=count_tokens(live, text))
    assert text in "".join(tokens.all_inner_texts())
    for i in range(0, tokens.count(), 5):
        tokens.nth(i).hover()
    assert page.evaluate("window.hacked") is None


def test_stop_ends_the_work_on_the_server(page: Any, live: LiveServer) -> None:
    live.say("hello fox " * 2000)
    live.backend.gate = Pace(0.2)  # type: ignore[assignment]
    delay_cancellation(page)
    page.click("#inside-run")
    page.locator("#inside-tokens .token").nth(3).wait_for()
    page.click("#inside-stop")
    page.locator("#inside-run").wait_for()
    wait_until(lambda: live.backend.num_open == 0)


def test_refusal_is_a_readable_message(page: Any, live: LiveServer) -> None:
    live.backend.error = QueueFullError("queue is full", retry_after_s=3)
    page.click("#inside-run")
    problem = page.locator("#inside-note .problem")
    problem.wait_for()
    assert "full" in problem.inner_text()
