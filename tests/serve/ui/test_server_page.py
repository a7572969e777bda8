"""The Server tab in a browser, a key that is asked for, and the interface by itself."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.browser import DESKTOP, PHONE, Browser
from tests.serve.ui.conftest import READY_S, LiveServer

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parents[3]


@pytest.fixture
def live_settings() -> dict[str, object]:
    return {"admin_keys": ("admin-secret",), "adapter_root": "/adapters"}


@pytest.fixture
def page(live: LiveServer, browser: Browser) -> Any:
    browser.troubles.clear()
    page = browser.open(f"{live.url}/ui/")
    page.get_by_role("tab", name="Server").click()
    page.locator("#server-table").get_by_text("poet").first.wait_for()
    yield page
    page.context.close()
    assert browser.troubles == []


def attach(page: Any, name: str, path: str, key: str) -> None:
    page.fill("#server-admin-key input", key)
    page.fill("#server-attach-name textarea, #server-attach-name input", name)
    page.fill("#server-attach-path textarea, #server-attach-path input", path)
    page.click("#server-attach")


def test_adapter_is_attached_and_offered(page: Any, live: LiveServer) -> None:
    attach(page, "bard", "good", "admin-secret")
    page.locator("#server-table").get_by_text("bard").first.wait_for()
    assert "bard" in live.backend.attached
    page.get_by_role("tab", name="Chat").click()
    page.click("#chat-adapter input")
    page.get_by_role("option", name="bard", exact=True).wait_for()


@pytest.mark.parametrize(
    ("path", "key", "told"),
    [("bad", "admin-secret", "outside the root"), ("good", "wrong", "admin key")],
    ids=["folder", "key"],
)
def test_refused_adapter_is_told_in_words(
    path: str, key: str, told: str, page: Any, live: LiveServer
) -> None:
    attach(page, "bard", path, key)
    message = page.locator("#server-message .problem")
    message.wait_for()
    assert told in message.inner_text()
    assert "bard" not in live.backend.attached


def test_adapter_is_detached(page: Any, live: LiveServer) -> None:
    page.fill("#server-admin-key input", "admin-secret")
    page.click("#server-detach-name input")
    page.get_by_role("option", name="poet", exact=True).click()
    page.click("#server-detach")
    page.get_by_text("Detached poet.").wait_for()
    assert live.backend.attached == {}


def test_live_figures_come_and_come_back_after_a_restart(page: Any, live: LiveServer) -> None:
    figures = page.locator("#server-live")
    figures.locator("svg").first.wait_for()
    assert "40" in figures.inner_text()  # per cent: 4 of 10 blocks of the script's cache
    live.stop()
    live.backend.num_free_blocks = 3
    live.start()
    # A page that has noticed loads anew, some time, and then shows the tab that it begins with.
    again = page.get_by_role("tab", name="Server")
    again.click()
    for _ in range(READY_S):
        if figures.get_by_text("70").count():
            break
        page.wait_for_timeout(1000)
        if again.get_attribute("aria-selected") != "true":
            again.click(force=True)
    else:
        pytest.fail("the figures did not come back")


class TestKey:
    """A server that wants a key."""

    @pytest.fixture
    def live_settings(self) -> dict[str, object]:
        return {"api_keys": ("api-secret",)}

    def test_key_is_asked_for_and_opens_the_server(
        self, live: LiveServer, browser: Browser
    ) -> None:
        page = browser.open(f"{live.url}/ui/", is_filled=False)
        page.locator("#api-key input").wait_for()
        page.get_by_text("API key is needed").first.wait_for()
        page.fill("#api-key input", "api-secret")
        page.press("#api-key input", "Enter")
        page.wait_for_function("document.querySelector('#chat-model input').value == 'smollm2'")
        page.context.close()


def test_interface_alone_shows_a_server_elsewhere(live: LiveServer, browser: Browser) -> None:
    command = [sys.executable, "-m", "serve.cli.main", "ui", "--url", live.url, "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        address = process.stderr.readline().rpartition(" ")[2].strip()
        page = browser.open(address)
        assert page.input_value("#chat-model input") == "smollm2"
        page.context.close()
        process.terminate()
        assert process.wait(30) == 0


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_no_tab_is_wider_than_the_screen(
    size: tuple[int, int], live: LiveServer, browser: Browser
) -> None:
    page = browser.open(f"{live.url}/ui/", size=size)
    for name in ("Compare", "Inside", "Experiments", "Server", "Chat"):
        page.get_by_role("tab", name=name).click()
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    page.context.close()
