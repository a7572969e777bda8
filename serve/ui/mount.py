"""The interface as an ASGI application: made at its first request, with the rest of Gradio shut."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from client.api import ApiClient

if TYPE_CHECKING:
    from gradio.routes import App

PATH = "/ui"
# What the page needs. Gradio has more: uploads, files, proxies, an API of its own, editing.
_GET = frozenset({"", "/", "/config", "/theme.css", "/gradio_api/queue/data",
                  "/gradio_api/startup-events"})  # fmt: skip
_GET_BELOW = ("/assets/", "/static/", "/svelte/", "/gradio_api/heartbeat/")
_POST = frozenset({"/gradio_api/queue/join", "/gradio_api/run/predict", "/gradio_api/cancel",
                   "/gradio_api/reset"})  # fmt: skip
# Templates of gr.HTML are compiled in the page, hence eval. Nothing comes from, or goes, elsewhere.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self'; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'self'"
)
_HEADERS = {
    "content-security-policy": _POLICY, "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}  # fmt: skip


class UserInterface:
    """Serves the interface below `PATH`.

    Gradio takes seconds and some 100 MB to load, so it is loaded when somebody comes to look.

    Args:
        url: called at the first request; returns the address of the server that the page shows.
    """

    def __init__(self, url: Callable[[], str]) -> None:
        self._url = url
        self._lock = asyncio.Lock()
        self._ended = asyncio.Event()
        self._living: asyncio.Task[None] | None = None
        self._app: FastAPI | None = None
        self._gradio: App | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if not _is_needed(scope["method"], scope["path"].removeprefix(PATH)):
            await PlainTextResponse("Not found\n", status_code=404)(scope, receive, send)
            return
        app = await self._load()

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        # The application below is mounted at the same path, from the root.
        await app({**scope, "root_path": "", "app_root_path": ""}, receive, send_guarded)

    def end_streams(self) -> None:
        """End the streams of open pages, which would go on for ever."""
        if self._gradio is not None:
            self._gradio.stop_event.set()

    async def close(self) -> None:
        """End open pages' streams and what runs behind them."""
        self.end_streams()
        self._ended.set()
        if self._living is not None:
            await self._living

    async def _load(self) -> ASGIApp:
        async with self._lock:
            if self._app is None:
                app, self._gradio = await asyncio.to_thread(_build, self._url())
                ready = asyncio.Event()
                # A task of its own, because what enters a lifespan has to leave it.
                self._living = asyncio.create_task(self._live(app, ready))
                await ready.wait()
                self._app = app
        return self._app

    async def _live(self, app: FastAPI, ready: asyncio.Event) -> None:
        async with app.router.lifespan_context(app):
            ready.set()
            await self._ended.wait()


def _build(url: str) -> tuple[FastAPI, "App"]:
    """Load Gradio and build the page and what serves it."""
    import gradio as gr
    from gradio.routes import App

    from serve.ui.app import build_ui, page_settings

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gr.mount_gradio_app(app, build_ui(ApiClient(url)), PATH, **page_settings())
    gradio_app = next(
        found for r in app.routes if isinstance(found := getattr(r, "app", None), App)
    )
    return app, gradio_app


def _is_needed(method: str, path: str) -> bool:
    if method in ("GET", "HEAD"):
        return path in _GET or path.startswith(_GET_BELOW)
    return method == "POST" and path in _POST
