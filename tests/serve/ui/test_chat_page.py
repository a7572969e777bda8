"""The Chat tab in a browser, over a scripted server."""

import re
from typing import Any

import pytest

from serve.backends.protocol import QueueFullError
from tests.browser import Browser
from tests.serve.ui.conftest import LiveServer, Pace, delay_cancellation, wait_until

pytestmark = pytest.mark.browser

MARKUP = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"


@pytest.fixture
def page(live: LiveServer, browser: Browser) -> Any:
    browser.troubles.clear()
    page = browser.open(f"{live.url}/ui/")
    yield page
    page.context.close()
    assert browser.troubles == []


def ask(page: Any, text: str) -> None:
    page.fill("#chat-text textarea", text)
    page.press("#chat-text textarea", "Enter")


def answered(page: Any, text: str, *, number: int = 1) -> Any:
    """Wait for the whole of an answer and return its element."""
    message = page.locator("#chat-view .message.assistant").nth(number - 1)
    message.get_by_text(text).wait_for()
    page.locator("#chat-send").wait_for()
    return message


def kept(page: Any, title: str) -> None:
    """Wait until the browser has kept the chat, which it does after its answer is shown."""
    page.wait_for_function(f"document.querySelector('#chat-history input')?.value == '{title}'")


def choose(page: Any, control: str, option: str) -> None:
    page.click(f"{control} input")
    page.get_by_role("option", name=option, exact=True).click()


def test_answer_has_speed_and_model_below_it(page: Any, live: LiveServer) -> None:
    live.say("hello fox " * 5)
    live.backend.gate = Pace(0.05)  # type: ignore[assignment]
    ask(page, "hi there")
    note = answered(page, "hello fox").locator(".note").inner_text()
    assert re.search(r"tokens/s .* first after \d+\.\d\d s .* smollm2 .* fixed", note)
    assert page.locator("#chat-view .message.user").inner_text().startswith("hi there")


def test_pickers_offer_what_the_server_has(page: Any, live: LiveServer) -> None:
    page.wait_for_function("document.querySelector('#chat-model input').value == 'smollm2'")
    choose(page, "#chat-adapter", "poet")
    choose(page, "#chat-strategy", "dynatemp")
    ask(page, "hi")
    answered(page, "hello fox")
    (arm,) = live.backend.requests[-1].arms
    assert (arm.adapter, arm.params.strategy.name) == ("poet", "dynatemp")


def test_parameters_of_a_strategy_are_controls(page: Any, live: LiveServer) -> None:
    choose(page, "#chat-strategy", "adapt")
    page.get_by_label("number input for a", exact=True).fill("1.5")
    page.get_by_label("number input for a", exact=True).press("Tab")
    page.locator("#chat-fences_only input").check()
    choose(page, "#chat-policy", "block_initial")
    page.wait_for_timeout(500)
    ask(page, "hi")
    answered(page, "hello fox")
    strategy = live.backend.requests[-1].arms[0].params.strategy
    assert (strategy.a, strategy.fences_only, strategy.policy) == (1.5, True, "block_initial")


def test_stop_ends_the_work_on_the_server_and_keeps_the_text(page: Any, live: LiveServer) -> None:
    live.say("hello fox " * 2000)
    live.backend.gate = Pace(0.1)  # type: ignore[assignment]
    delay_cancellation(page)
    ask(page, "hi")
    page.get_by_text("hello fox hello").first.wait_for()
    page.click("#chat-stop")
    message = answered(page, "hello fox")
    wait_until(lambda: live.backend.num_open == 0)
    assert "stopped" in message.locator(".note").inner_text()


@pytest.mark.parametrize("button", ["#chat-new", "#chat-delete"])
def test_chat_left_in_mid_answer_is_empty_and_can_be_asked(
    button: str, page: Any, live: LiveServer
) -> None:
    live.say("hello fox " * 2000)
    live.backend.gate = Pace(0.1)  # type: ignore[assignment]
    delay_cancellation(page)
    ask(page, "hi")
    page.get_by_text("hello fox hello").first.wait_for()
    page.click(button)
    page.locator("#chat-send").wait_for()
    assert page.locator("#chat-view .message").count() == 0
    live.say("the quick brown fox")
    live.backend.gate = None
    ask(page, "hi")
    answered(page, "the quick brown fox")
    assert page.locator("#chat-view .message").count() == 2


def test_closed_page_ends_the_work_on_the_server(live: LiveServer, browser: Browser) -> None:
    live.say("hello fox " * 2000)
    live.backend.gate = Pace(0.1)  # type: ignore[assignment]
    page = browser.open(f"{live.url}/ui/")
    ask(page, "hi")
    page.get_by_text("hello fox hello").first.wait_for()
    page.context.close()
    wait_until(lambda: live.backend.num_open == 0)


def test_regenerate_asks_the_same_again(page: Any, live: LiveServer) -> None:
    ask(page, "hi")
    answered(page, "hello fox")
    live.say("the quick brown fox")
    page.get_by_role("button", name="Ask for another answer").click()
    answered(page, "the quick brown fox")
    assert page.locator("#chat-view .message.assistant").count() == 1
    first, second = (r.prompt_token_ids for r in live.backend.requests)
    assert first == second


def test_edit_puts_the_message_back_to_write_on(page: Any, live: LiveServer) -> None:
    ask(page, "first question")
    answered(page, "hello fox")
    page.get_by_role("button", name="Edit this message and ask again").click()
    page.wait_for_function("document.querySelector('#chat-text textarea').value != ''")
    assert page.input_value("#chat-text textarea") == "first question"
    ask(page, "second question")
    answered(page, "hello fox")
    assert page.locator("#chat-view .message.user").count() == 1
    page.get_by_text("second question", exact=True).wait_for()


def test_second_question_has_the_conversation_before_it(page: Any, live: LiveServer) -> None:
    page.fill("#chat-system textarea", "be brief")
    ask(page, "one")
    answered(page, "hello fox")
    ask(page, "two")
    answered(page, "hello fox", number=2)
    prompt = live._tokenizer.decode(live.backend.requests[-1].prompt_token_ids)
    places = [prompt.index(text) for text in ("be brief", "one", "hello fox", "two")]
    assert places == sorted(places)


def test_earlier_chats_are_there_after_a_reload(page: Any, live: LiveServer) -> None:
    ask(page, "remember me")
    answered(page, "hello fox")
    kept(page, "remember me")
    page.reload()
    answered(page, "hello fox")
    page.click("#chat-new")
    page.get_by_text("Ask something").wait_for()
    choose(page, "#chat-history", "remember me")
    answered(page, "hello fox")


def test_markup_of_a_model_is_shown_as_text(page: Any, live: LiveServer) -> None:
    live.say(MARKUP)
    ask(page, MARKUP)
    message = answered(page, "window.hacked = 1")
    assert "<script>window.hacked = 1</script><img src=x" in message.inner_text()
    assert page.locator("#chat-view img").count() == 0
    assert page.evaluate("window.hacked") is None


def test_code_is_highlighted_and_copied_as_it_is(page: Any, live: LiveServer) -> None:
    live.say("```python\ndef add(a, b):\n    return a < b\n```\n")
    ask(page, "code")
    message = answered(page, "return")
    assert message.locator("pre .k").first.inner_text() == "def"
    page.get_by_role("button", name="Copy the code").click()
    page.get_by_text("Copied").wait_for()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == "def add(a, b):\n    return a < b\n"


def test_message_is_copied_as_the_model_wrote_it(page: Any, live: LiveServer) -> None:
    live.say("**bold** <b>&amp;")
    ask(page, "hi")
    message = answered(page, "bold")
    message.get_by_role("button", name="Copy this message").click()
    page.get_by_text("Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "**bold** <b>&amp;"


def test_refusal_is_a_readable_message(page: Any, live: LiveServer) -> None:
    live.backend.error = QueueFullError("queue is full", retry_after_s=3)
    ask(page, "hi")
    error = page.locator("#chat-view .message.error")
    error.wait_for()
    assert error.get_attribute("role") == "alert"
    assert "full" in error.inner_text()
    live.backend.error = None
    page.get_by_role("button", name="Ask for another answer").click()
    answered(page, "hello fox")


def test_error_in_the_middle_keeps_what_had_come(page: Any, live: LiveServer) -> None:
    live.say("hello fox hello fox")
    live.backend.failure = 4
    ask(page, "hi")
    page.locator("#chat-view .message.error").wait_for()
    assert "hello" in page.locator("#chat-view .message.assistant").inner_text()


def test_page_goes_on_after_the_server_has_restarted(page: Any, live: LiveServer) -> None:
    ask(page, "before")
    answered(page, "hello fox")
    kept(page, "before")
    wait_until(live.is_idle)  # a stream cut off would make the page load itself anew
    live.stop()
    live.start()
    live.say("the quick brown fox")
    ask(page, "after")
    answered(page, "the quick brown fox", number=2)
    prompt = live._tokenizer.decode(live.backend.requests[-1].prompt_token_ids)
    assert "before" in prompt


def test_page_goes_on_after_a_restart_has_cut_an_answer_off(page: Any, live: LiveServer) -> None:
    ask(page, "before")
    answered(page, "hello fox")
    kept(page, "before")
    live.say("hello fox " * 200)
    live.backend.gate = Pace(0.05)  # type: ignore[assignment]
    ask(page, "long")
    page.locator("#chat-view .message.assistant").nth(1).get_by_text("hello").wait_for()
    with page.expect_event("load"):
        live.stop()
        live.start()
    live.backend.gate = None
    kept(page, "before")
    live.say("the quick brown fox")
    ask(page, "after")
    answered(page, "the quick brown fox", number=2)


def test_long_answer_is_shown_whole(page: Any, live: LiveServer) -> None:
    live.say("\n\n".join(f"hello {i} fox" for i in range(250)))
    page.get_by_label("number input for Most new tokens").fill("4096")
    page.get_by_label("number input for Most new tokens").press("Tab")
    ask(page, "much")
    message = answered(page, "hello 249 fox")
    assert message.locator("p").count() == 250


@pytest.mark.parametrize("tab", ["Chat", "Compare", "Inside", "Server"])
def test_every_control_has_a_name(tab: str, page: Any) -> None:
    page.get_by_role("tab", name=tab).click()
    page.wait_for_timeout(500)
    nameless = page.evaluate("""() => [...document.querySelectorAll(
      'button, input, textarea, select')].filter(e => e.offsetParent !== null).filter(e => !(
        e.getAttribute('aria-label') || e.innerText || (e.labels && e.labels.length)
        || e.getAttribute('aria-labelledby') || e.title)).map(e => e.outerHTML.slice(0, 200))""")
    assert nameless == []
