"""The Compare tab in a browser, over a scripted server."""

from typing import Any

import pytest

from serve.backends.protocol import QueueFullError
from tests.browser import Browser
from tests.serve.ui.conftest import LiveServer, Pace, delay_cancellation, wait_until

pytestmark = pytest.mark.browser

ARMS = ("hello fox", "the quick brown fox")


@pytest.fixture
def page(live: LiveServer, browser: Browser) -> Any:
    browser.troubles.clear()
    live.say(*ARMS)
    page = browser.open(f"{live.url}/ui/")
    page.get_by_role("tab", name="Compare").click()
    page.fill("#compare-text textarea", "hi")
    yield page
    page.context.close()
    assert browser.troubles == []


def compare(page: Any) -> None:
    """Ask, and wait until it can be voted on."""
    page.click("#compare-run")
    page.wait_for_selector("#compare-vote-tie:not([disabled])")


def test_arms_answer_side_by_side_from_one_prompt(page: Any, live: LiveServer) -> None:
    compare(page)
    texts = page.locator("#compare-view .arm .markdown").all_inner_texts()
    assert [text.strip() for text in texts] == list(ARMS)
    (request,) = live.backend.requests
    assert [arm.params.strategy.name for arm in request.arms] == ["fixed", "adapt"]
    assert len({arm.params.seed for arm in request.arms}) == 1


def test_random_numbers_differ_if_they_are_not_to_be_common(page: Any, live: LiveServer) -> None:
    page.locator("#compare-common input").uncheck()
    compare(page)
    (request,) = live.backend.requests
    assert len({arm.params.seed for arm in request.arms}) == 2


def test_four_arms_can_be_asked(page: Any, live: LiveServer) -> None:
    page.locator("#compare-count label").filter(has_text="4").click()
    page.wait_for_selector("#compare-d-model")
    compare(page)
    assert page.locator("#compare-view .arm").count() == 4
    page.wait_for_selector("#compare-vote-d:not([disabled])")


def test_vote_is_kept_and_counted(page: Any, live: LiveServer) -> None:
    compare(page)
    page.click("#compare-vote-b")
    page.locator("#compare-view .arm.best").wait_for()
    row = page.locator("#compare-tally tbody tr")
    row.wait_for()
    cells = row.locator("td").all_inner_texts()
    wins = dict(zip((cell.partition("T 0.7")[0] for cell in cells[:2]), cells[2:4], strict=True))
    assert [count for name, count in wins.items() if "adapt" in name] == ["1"]
    assert [count for name, count in wins.items() if "fixed" in name] == ["0"]


def test_blind_arms_are_named_after_the_vote(page: Any, live: LiveServer) -> None:
    page.locator("#compare-blind input").check()
    compare(page)
    assert "smollm2" not in page.locator("#compare-view").inner_text()
    page.click("#compare-vote-tie")
    page.locator("#compare-view .arm").get_by_text("smollm2").first.wait_for()


def test_blind_vote_counts_for_the_arm_that_was_shown(page: Any, live: LiveServer) -> None:
    page.locator("#compare-blind input").check()
    compare(page)
    place = page.locator("#compare-view .arm .markdown").first.inner_text().strip()
    page.click("#compare-vote-a")
    page.locator("#compare-view .arm.best").wait_for()
    (ballot,) = live.votes.ballots()
    assert ballot.vote == ARMS.index(place)


def test_refusal_is_a_readable_message(page: Any, live: LiveServer) -> None:
    live.backend.error = QueueFullError("queue is full", retry_after_s=3)
    page.click("#compare-run")
    problem = page.locator("#compare-view .problem")
    problem.wait_for()
    assert "full" in problem.inner_text()
    live.backend.error = None


def test_stop_ends_all_arms(page: Any, live: LiveServer) -> None:
    live.say("hello fox " * 2000)
    live.backend.gate = Pace(0.1)  # type: ignore[assignment]
    delay_cancellation(page)
    page.click("#compare-run")
    page.get_by_text("hello fox hello").first.wait_for()
    page.click("#compare-stop")
    page.get_by_text("Stopped").wait_for()
    wait_until(lambda: live.backend.num_open == 0)
    page.wait_for_selector("#compare-run")
    assert not page.locator("#compare-stop").is_visible()
    assert page.locator("#compare-vote-a").is_disabled()


def test_markup_of_a_model_is_shown_as_text(page: Any, live: LiveServer) -> None:
    live.say("<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>")
    compare(page)
    assert "<script>window.hacked" in page.locator("#compare-view .arm").first.inner_text()
    assert page.evaluate("window.hacked") is None
