"""An installed Chromium, driven by Playwright, that notes what a page does wrong."""

import shutil
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
DESKTOP, PHONE = (1280, 860), (390, 844)
TIMEOUT_MS = 60_000


def find_chromium() -> str | None:
    """Return the path of an installed browser."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """A running browser.

    Attributes:
        troubles: requests to other machines, uncaught errors and refusals by the page's policy.
    """

    def __init__(self, path: str) -> None:
        from playwright.sync_api import sync_playwright  # only where a browser is installed

        self.troubles: list[str] = []
        self._playwright = sync_playwright().start()
        self._chromium = self._playwright.chromium.launch(
            executable_path=path, args=list(ARGUMENTS)
        )

    def __enter__(self) -> "Browser":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._chromium.close()
        self._playwright.stop()

    def open(
        self,
        url: str,
        *,
        size: tuple[int, int] = DESKTOP,
        color_scheme: str = "light",
        is_filled: bool = True,
    ) -> Any:
        """Open a page in a profile of its own; wait until it is there, and its pickers filled."""
        context = self._chromium.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=color_scheme,
            permissions=["clipboard-read", "clipboard-write"],
        )  # fmt: skip
        context.set_default_timeout(TIMEOUT_MS)
        page = context.new_page()
        page.on("request", self._check_request)
        page.on("pageerror", lambda error: self.troubles.append(f"uncaught: {error}"))
        page.on("console", self._check_message)
        page.goto(url)
        page.wait_for_selector("#chat-text textarea")
        if is_filled:
            page.wait_for_function("document.querySelector('#chat-model input')?.value")
        return page

    def _check_request(self, request: Any) -> None:
        if not request.url.startswith(("http://127.0.0.1:", "data:", "blob:")):
            self.troubles.append(f"asks for {request.url}")

    def _check_message(self, message: Any) -> None:
        if "Content Security Policy" in message.text:
            self.troubles.append(message.text)
