"""The interface as an application: what it serves, to whom, and what it does not."""

import asyncio
import json
from pathlib import Path
from typing import Any

import gradio
import httpx
import pytest
from fastapi import FastAPI
from starlette.types import Message

from serve.api import ApiSettings, create_app
from serve.ui import sessions, streams
from serve.ui.app import page_settings
from serve.ui.mount import PATH, UserInterface
from tests.serve.api.conftest import FakeBackend, make_client
from text.tokenizer import Tokenizer

SHUT = [
    ("GET", "/gradio_api/file=/etc/passwd"), ("GET", "/gradio_api/proxy=http://127.0.0.1"),
    ("POST", "/gradio_api/upload"), ("POST", "/gradio_api/call/x"), ("POST", "/gradio_api/run/x"),
    ("GET", "/gradio_api/info"), ("GET", "/gradio_api/runs"), ("POST", "/gradio_api/vibe-edit"),
    ("GET", "/monitoring"), ("GET", "/gradio_api/mcp/sse"), ("POST", "/login"), ("DELETE", "/"),
    ("GET", "/gradio_api/stream/a/b/c/playlist.m3u8"), ("GET", "/docs"), ("GET", "/openapi.json"),
]  # fmt: skip


def make_app(tokenizer: Tokenizer, **settings: Any) -> FastAPI:
    backend = FakeBackend(vocab_size=tokenizer.vocab_size, script=lambda request, index: [])
    app = create_app(backend, tokenizer, settings=ApiSettings(model_id="smollm2", **settings))
    app.mount(PATH, UserInterface(lambda: "http://127.0.0.1:1"))
    return app


def ask(
    app: FastAPI, method: str, path: str, body: object = None, **options: Any
) -> httpx.Response:
    async def send() -> httpx.Response:
        async with make_client(app, **options) as client:
            content = body if isinstance(body, bytes) else json.dumps(body)
            return await client.request(method, path, content=None if body is None else content)

    return asyncio.run(send())


def test_page_is_served_and_asks_nothing_of_others(tokenizer: Tokenizer) -> None:
    response = ask(make_app(tokenizer), "GET", f"{PATH}/")
    assert response.status_code == 200
    assert '"title":"Proa"' in response.text
    policy = response.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "connect-src 'self'" in policy


def test_stream_is_not_for_the_browsers_cache() -> None:
    """Chromium asked twice for a stream whose address it had cached, and lost what came on one."""
    interface = UserInterface(lambda: "http://127.0.0.1:1")
    scope = {
        "type": "http", "method": "GET", "path": f"{PATH}/gradio_api/heartbeat/page", "headers": [],
        "query_string": b"", "root_path": "", "http_version": "1.1", "scheme": "http",
    }  # fmt: skip

    async def run() -> dict[bytes, bytes]:
        started: asyncio.Future[dict[bytes, bytes]] = asyncio.get_running_loop().create_future()

        async def receive() -> Message:
            await started
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                started.set_result(dict(message["headers"]))

        await interface(scope, receive, send)
        await interface.close()
        return await started

    assert asyncio.run(run())[b"cache-control"] == b"no-store"


def test_page_that_lost_the_server_can_ask_whether_it_is_back(tokenizer: Tokenizer) -> None:
    """Gradio's page asks for this until it is answered, and then loads itself anew."""
    response = ask(make_app(tokenizer), "GET", f"{PATH}/gradio_api/app_id")
    assert "app_id" in response.json()


@pytest.mark.parametrize(("method", "path"), SHUT, ids=lambda value: value)
def test_rest_of_gradio_is_shut(method: str, path: str, tokenizer: Tokenizer) -> None:
    assert ask(make_app(tokenizer), method, PATH + path).status_code == 404


def test_page_needs_no_key_but_the_api_does(tokenizer: Tokenizer) -> None:
    app = make_app(tokenizer, api_keys=("secret",))
    remote = {"client": ("10.1.2.3", 5)}
    assert ask(app, "GET", f"{PATH}/", **remote).status_code == 200
    assert ask(app, "GET", "/v1/models", **remote).status_code == 401
    assert ask(app, "GET", f"{PATH}/../v1/models", **remote).status_code in (401, 404)


def test_without_keys_the_page_is_for_this_machine_only(tokenizer: Tokenizer) -> None:
    app = make_app(tokenizer)
    assert ask(app, "GET", f"{PATH}/", client=("10.1.2.3", 5)).status_code == 403
    assert ask(app, "GET", f"{PATH}/", headers={"host": "evil.example"}).status_code == 403


def test_settings_keep_gradio_to_itself() -> None:
    settings = page_settings()
    off = ("run_history", "ssr_mode", "mcp_server", "enable_monitoring", "pwa")
    assert [settings[name] for name in off] == [False] * len(off)
    assert (settings["allowed_paths"], settings["max_file_size"]) == ([], 0)
    fonts = [*settings["theme"]._font, *settings["theme"]._font_mono]
    assert [font for font in fonts if "Google" in type(font).__name__] == []


JOIN = f"{PATH}/gradio_api/queue/join"


def make_run(**fields: Any) -> dict[str, Any]:
    return {"data": [], "fn_index": 0, "session_hash": "abc", "trigger_id": None, **fields}


def test_interface_takes_no_longer_body_than_the_api(tokenizer: Tokenizer) -> None:
    app = make_app(tokenizer, api_keys=("secret",), max_body_bytes=2000)
    assert ask(app, "POST", JOIN, make_run(data=["a" * 3000])).status_code == 413
    assert ask(app, "POST", f"{PATH}/nothing", b"a" * 3000).status_code == 413


@pytest.mark.parametrize("origin", ["http://localhost:3000", "https://evil.example", "null"])
@pytest.mark.parametrize("keys", [(), ("secret",)], ids=["open", "locked"])
def test_interface_takes_nothing_from_other_pages(
    tokenizer: Tokenizer, keys: tuple[str, ...], origin: str
) -> None:
    app = make_app(tokenizer, api_keys=keys)
    headers = {"Origin": origin}
    assert ask(app, "POST", JOIN, make_run(), headers=headers).status_code == 403


def test_interface_serves_its_own_page_and_that_of_its_proxy(tokenizer: Tokenizer) -> None:
    app = make_app(tokenizer, api_keys=("secret",), allowed_origins=("https://proa.example",))
    for origin in ("http://localhost", "https://proa.example"):
        reply = ask(app, "POST", JOIN, make_run(fn_index=-1), headers={"Origin": origin})
        assert reply.status_code == 400, origin


BAD_RUNS = {
    "function-beyond": (make_run(fn_index=10_000), 400),
    "function-negative": (make_run(fn_index=-1), 400),
    "function-text": (make_run(fn_index="0"), 400),
    "function-missing": (make_run(fn_index=None), 400),
    "session-long": (make_run(session_hash="a" * 65), 400),
    "session-missing": (make_run(session_hash=None), 400),
    "event-long": (make_run(event_id="a" * 65), 400),
    "list": ([], 400),
    "broken": (b"{", 400),
    "deep": (b"[" * 100_000, 400),
    "heavy": (make_run(data=[[]] * 300_000), 413),
}


@pytest.mark.parametrize("path", [JOIN, f"{PATH}/gradio_api/run/predict"])
def test_what_no_page_sends_is_refused(tokenizer: Tokenizer, path: str) -> None:
    async def send_all() -> dict[str, httpx.Response]:
        async with make_client(make_app(tokenizer)) as client:
            return {
                name: await client.post(
                    path, content=body if isinstance(body, bytes) else json.dumps(body)
                )
                for name, (body, _) in BAD_RUNS.items()
            }

    responses = asyncio.run(send_all())
    statuses = {name: status for name, (_, status) in BAD_RUNS.items()}
    assert {name: response.status_code for name, response in responses.items()} == statuses
    assert all(list(response.json()) == ["detail"] for response in responses.values())


def test_stream_of_a_page_that_was_told_everything_ends(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradio kept it, and after a restart the page waited for its next answer on it."""
    monkeypatch.setattr(streams, "_LEAVE_S", 0.1)
    address = f"{PATH}/gradio_api/queue/data?session_hash=page"
    app = make_app(tokenizer)

    async def read() -> list[str]:
        async with make_client(app) as client:
            joined = await client.post(JOIN, json=make_run(session_hash="page"))
            assert joined.status_code == 200
            return [(await asyncio.wait_for(client.get(address), 20)).text for _ in range(2)]

    first, second = asyncio.run(read())
    assert "process_completed" in first
    assert first.endswith(second)
    assert json.loads(second.removeprefix("data: ")) == {"msg": "close_stream", "event_id": None}


def test_run_that_the_end_of_the_server_cuts_off_has_the_page_wait_for_it() -> None:
    """Uvicorn answered with a text, which the page could not read and showed as an error."""
    interface = UserInterface(lambda: "http://127.0.0.1:1")
    scope = {
        "type": "http", "method": "POST", "path": JOIN, "headers": [], "query_string": b"",
        "root_path": "", "http_version": "1.1", "scheme": "http",
    }  # fmt: skip
    sent: list[Message] = []

    async def run() -> None:
        await interface._load()
        is_running = asyncio.Event()

        async def hang(scope: object, receive: object, send: object) -> None:
            is_running.set()
            await asyncio.Event().wait()

        interface._app = hang  # type: ignore[assignment]

        async def receive() -> Message:
            body = json.dumps(make_run(session_hash="page")).encode()
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Message) -> None:
            sent.append(message)

        asked = asyncio.create_task(interface(scope, receive, send))
        await is_running.wait()
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        await interface.close()

    asyncio.run(run())
    told = json.loads(sent[1]["body"])["error"]
    scripts = Path(gradio.__file__).parent.glob("templates/frontend/assets/index-*.js")
    assert any(f"=`{told}`" in path.read_text(encoding="utf-8") for path in scripts)


def test_gradio_forgets_the_sessions_that_are_too_many(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "MAX_SESSIONS", 3)
    app = make_app(tokenizer)
    (interface,) = [r.app for r in app.routes if isinstance(getattr(r, "app", None), UserInterface)]

    async def join_all() -> list[int]:
        async with make_client(app) as client:
            names = [f"session-{i}" for i in range(6)]
            runs = [await client.post(JOIN, json=make_run(session_hash=name)) for name in names]
        return [run.status_code for run in runs]

    assert asyncio.run(join_all()) == [200] * 6
    gradio = interface._gradio
    queue = gradio.get_blocks()._queue
    kept = {"session-3", "session-4", "session-5"}
    assert set(gradio.state_holder.session_data) <= kept
    assert set(queue.pending_messages_per_session) <= kept
    assert set(queue.pending_event_ids_session) <= kept
