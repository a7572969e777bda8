"""The interface as an ASGI application: made at its first request, with the rest of Gradio shut."""

import asyncio
import json
import re
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.datastructures import MutableHeaders, QueryParams
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from client.api import ApiClient
from serve.ui.sessions import SessionError, Sessions
from serve.ui.streams import END_STREAM, EventStreams

if TYPE_CHECKING:
    from gradio.routes import App

PATH = "/ui"
# What the page needs. Gradio has more: uploads, files, proxies, an API of its own, editing.
_GET = frozenset({"", "/", "/config", "/theme.css", "/gradio_api/queue/data",
                  "/gradio_api/startup-events", "/gradio_api/app_id"})  # fmt: skip
_GET_BELOW = ("/assets/", "/static/", "/svelte/", "/gradio_api/heartbeat/")
_POST = frozenset({"/gradio_api/queue/join", "/gradio_api/run/predict", "/gradio_api/cancel",
                   "/gradio_api/reset"})  # fmt: skip
_HEARTBEAT = "/gradio_api/heartbeat/"
_RUNS = ("/gradio_api/queue/join", "/gradio_api/run/predict")
_SWEEP_EVERY_S = 30.0
_STREAM = "/gradio_api/queue/data"
_LOST = JSONResponse({"error": "Connection errored out. "}, status_code=500)
"""What the page's own client says of a run whose connection broke: the page then waits for the
server, and loads anew. Of any other answer it would show the text, and stay as it is.
"""
_NAME = re.compile(r"[\w-]{1,64}", re.ASCII)
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
        self._sessions: Sessions | None = None
        self._streams = EventStreams()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path = scope["path"].removeprefix(PATH)
        if not _is_needed(scope["method"], path):
            await PlainTextResponse("Not found\n", status_code=404)(scope, receive, send)
            return
        app: ASGIApp = await self._load()
        assert self._sessions is not None
        is_begun = is_whole = False
        name: str | None = None

        async def send_guarded(message: Message) -> None:
            nonlocal is_begun, is_whole
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                # Gradio tells the page of it as of a failed event, and the page then asks on a
                # stream that is gone. A stream cut off makes it load anew once the server is back.
                raise asyncio.CancelledError
            if message["type"] == "http.response.start":
                is_begun = True
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                if path == _STREAM or path.startswith(_HEARTBEAT):
                    headers["cache-control"] = "no-store"  # or Chromium asks for some of them twice
                if path == _RUNS[0] and name is not None:
                    await self._streams.wait_until_left(name)
            elif not message.get("more_body", False):
                is_whole = True
            await send(message)

        try:
            name, receive = await self._admit(path, scope, receive)
        except SessionError as error:
            answer = JSONResponse({"detail": str(error)}, status_code=error.status)
            await answer(scope, receive, send_guarded)
            return
        # The application below is mounted at the same path, from the root.
        inner = {**scope, "root_path": "", "app_root_path": ""}
        if name is None:
            await app(inner, receive, send_guarded)
            return
        if path == _STREAM:
            receive, send = self._streams.wrap(name, receive, send)
            if self._sessions.has_nothing_to_tell(name):
                # Another stream told it. Gradio would keep this one until the page's next event.
                app = END_STREAM
        with self._sessions.opened(name):
            try:
                await app(inner, receive, send_guarded)
            except asyncio.CancelledError:  # the server stops
                if path in _RUNS and not is_begun:
                    await _LOST(inner, receive, send)
                raise
        if is_whole and not path.startswith(_HEARTBEAT) and path != _RUNS[0]:
            self._sessions.settle(name)

    async def _admit(self, path: str, scope: Scope, receive: Receive) -> tuple[str | None, Receive]:
        """Return the session that a request belongs to, and how the request is read.

        Raises:
            SessionError: the page would never ask so, or there is no room for it.
        """
        assert self._sessions is not None
        if path.startswith(_HEARTBEAT):
            return _check_name(path.removeprefix(_HEARTBEAT)), receive
        if path == _STREAM:
            return _check_name(QueryParams(scope["query_string"]).get("session_hash")), receive
        if scope["method"] != "POST":
            return None, receive
        body = await Request(scope, receive).body()
        is_sent = False

        async def receive_again() -> Message:
            nonlocal is_sent
            if is_sent:
                return await receive()
            is_sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        fields = await asyncio.to_thread(_parse, body)
        for key in ("session_hash", "event_id"):
            if fields.get(key) is not None:
                _check_name(fields[key])
        if path not in _RUNS:
            return None, receive_again
        name = _check_name(fields.get("session_hash"))
        if not self._sessions.has_function(name, fields.get("fn_index")):
            raise SessionError("fn_index names no function of the page.", 400)
        await self._sessions.admit(name, body)
        return name, receive_again

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
                app, gradio = await asyncio.to_thread(_build, self._url())
                self._gradio, self._sessions = gradio, Sessions(gradio)
                ready = asyncio.Event()
                # A task of its own, because what enters a lifespan has to leave it.
                self._living = asyncio.create_task(self._live(app, ready))
                await ready.wait()
                self._app = app
        return self._app

    async def _live(self, app: FastAPI, ready: asyncio.Event) -> None:
        async with app.router.lifespan_context(app):
            ready.set()
            assert self._sessions is not None
            while not self._ended.is_set():
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._ended.wait(), _SWEEP_EVERY_S)
                await self._sessions.forget_expired()


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


def _parse(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise SessionError("The body is not JSON.", 400) from None
    if not isinstance(fields, dict):
        raise SessionError("The body must be a JSON object.", 400)
    return fields


def _check_name(name: object) -> str:
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise SessionError("session_hash and event_id are short names.", 400)
    return name
