"""The whole server: in this process, and as a process that is asked to stop."""

import asyncio
import json
import os
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from client.api import ApiClient
from client.errors import RequestError
from client.in_process import ADDRESS, AsgiTransport
from models.kernels.native.executor import is_native_available
from serve import server as server_module
from serve.config import ServeConfig
from serve.options import ConfigError
from serve.server import (
    ServerError,
    Service,
    bind,
    build_service,
    close_service,
    describe_start,
    run_server,
)

ROOT = Path(__file__).parents[2]


def ignore(message: str) -> None:
    """Report to nobody."""


def complete(config: ServeConfig, body: dict[str, Any]) -> tuple[Service, list[dict[str, Any]]]:
    """Build a service, send one completion, close it."""

    async def run() -> tuple[Service, list[dict[str, Any]]]:
        service = build_service(config, report=ignore)
        try:
            client = ApiClient(ADDRESS, transport=AsgiTransport(service.app))
            chunks = client.stream("/v1/completions", {**body, "stream": True})
            return service, [chunk async for chunk in chunks]
        finally:
            await close_service(service)

    return asyncio.run(run())


@pytest.fixture(params=["native", "reference"])
def kernels(request: pytest.FixtureRequest) -> str:
    if request.param == "native" and not is_native_available("auto"):
        pytest.skip("no native kernels for this processor")
    return str(request.param)


def test_start_warns_of_what_the_model_lacks(tiny_llama_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama_folder, tmp_path / "endless")
    for name in ("config.json", "tokenizer_config.json"):
        fields = json.loads((folder / name).read_text())
        fields = {key: value for key, value in fields.items() if not key.startswith("eos_token")}
        (folder / name).write_text(json.dumps(fields))
    lines: list[str] = []
    service = build_service(
        ServeConfig(model=str(folder), quantization="none"), report=lines.append
    )
    asyncio.run(close_service(service))
    assert "warning: the model names no end token: answers run until max_tokens" in lines


def test_service_answers(tiny_llama_folder: Path, kernels: str) -> None:
    config = ServeConfig(model=str(tiny_llama_folder), quantization="none", kernels=kernels)
    body = {"prompt": "ab", "max_tokens": 5, "seed": 1, "ignore_eos": True}
    service, chunks = complete(config, body)
    assert service.model_id == "tiny-llama"
    assert service.has_chat_template
    assert (service.config.kv_cache_tokens, service.config.max_context) == (16384, 16384)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_service_answers_over_an_int8_cache(tiny_llama_folder: Path, kernels: str) -> None:
    lines: list[str] = []
    config = ServeConfig(
        model=str(tiny_llama_folder), quantization="none", kernels=kernels, kv="int8",
        kv_cache_tokens=160_000,
    )  # fmt: skip
    asyncio.run(close_service(build_service(config, report=lines.append)))
    # 2 layers of 2 heads of 8 channels, each a key and a value with a scale in 2 bytes.
    assert 160_000 * 2 * 2 * 2 * (8 + 2) == 12_800_000
    assert any("160000 tokens (at most 13 MB)" in line for line in lines)
    body = {"prompt": "ab" * 200, "max_tokens": 5, "seed": 1, "ignore_eos": True}
    chunks = complete(config, body)[1]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks)


def test_service_quantises_once_into_the_cache(tiny_llama_folder: Path, tmp_path: Path) -> None:
    config = ServeConfig(model=str(tiny_llama_folder), cache_dir=str(tmp_path), max_context=64)
    body = {"prompt": "ab", "max_tokens": 5, "temperature": 0, "ignore_eos": True}

    def text() -> str:
        return "".join(chunk["choices"][0]["text"] for chunk in complete(config, body)[1])

    first = text()
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(files) == 1
    assert text() == first
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_max_context_is_the_longest_sequence(tiny_llama_folder: Path) -> None:
    config = ServeConfig(model=str(tiny_llama_folder), quantization="none", max_context=8)
    with pytest.raises(RequestError, match="context is 8 tokens"):
        complete(config, {"prompt": "abcdef", "max_tokens": 5})


def test_served_model_name_is_the_id(tiny_llama_folder: Path) -> None:
    config = ServeConfig(
        model=str(tiny_llama_folder), quantization="none", served_model_name="mine"
    )
    body = {"model": "mine@adapt", "prompt": "ab", "max_tokens": 1}
    assert complete(config, body)[1][0]["model"] == "mine@adapt"
    with pytest.raises(RequestError, match="no such model"):
        complete(config, {**body, "model": "tiny-llama"})


def test_missing_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        build_service(ServeConfig(model=str(tmp_path / "nowhere")), report=ignore)


@pytest.mark.skipif(not is_native_available("auto"), reason="no native kernels here")
def test_block_size_the_kernels_cannot_use_is_refused(tiny_llama_folder: Path) -> None:
    config = ServeConfig(
        model=str(tiny_llama_folder), quantization="none", kernels="native", block_size=7
    )
    with pytest.raises(ConfigError, match="block_size must be 16"):
        build_service(config, report=ignore)


@pytest.mark.parametrize(
    ("has_template", "keys", "wanted"),
    [
        (True, (), "http://h:1/v1/chat/completions -H 'Content-Type: application/json' -d '{"),
        (False, (), "http://h:1/v1/completions"),
        (True, ("k",), '-H "Authorization: Bearer $PROA_API_KEY"'),
    ],
    ids=["chat", "no template", "key"],
)
def test_start_message_has_address_and_command(
    has_template: bool, keys: tuple[str, ...], wanted: str
) -> None:
    service = Service(
        config=ServeConfig(api_key=keys),
        model_id="tiny",
        kernels="reference",
        backend=None,  # type: ignore[arg-type]
        app=FastAPI(),
        has_chat_template=has_template,
    )
    first, command = describe_start(service, "http://h:1")
    assert first.startswith("tiny is ready on http://h:1")
    assert wanted in command
    body = json.loads(command.split(" -d '")[1].removesuffix("'"))
    assert body["model"] == "tiny@adapt"


def test_start_message_names_the_adapters() -> None:
    names = tuple(f"tiny:a{i}" for i in range(10))
    service = Service(
        config=ServeConfig(),
        model_id="tiny",
        kernels="reference",
        backend=None,  # type: ignore[arg-type]
        app=FastAPI(),
        has_chat_template=True,
        adapters=names,
    )
    first, *_ = describe_start(service, "http://h:1")
    assert first == f"with adapters: {', '.join(names[:8])} and 2 more"


@pytest.mark.parametrize(
    ("host", "match"),
    [("192.0.2.1", "cannot listen on 192.0.2.1:0"), ("no.such.invalid", "cannot resolve")],
)
def test_impossible_address_is_refused(host: str, match: str) -> None:
    with pytest.raises(ServerError, match=match):
        bind(host, 0)


def test_port_in_use_is_refused_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = ServeConfig(port=port, model="/nowhere")
        with pytest.raises(ServerError, match=f"127.0.0.1:{port}: Address already in use"):
            run_server(config, report=ignore)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "is not a file"),
        (b"no database", "cannot use .*: file is not a database"),
    ],
    ids=["folder", "other file"],
)
def test_useless_file_of_votes_is_refused_before_the_model_is_loaded(
    content: bytes | None, match: str, tmp_path: Path
) -> None:
    path = tmp_path / "votes"
    path.mkdir() if content is None else path.write_bytes(content)
    config = ServeConfig(port=0, model="/nowhere", votes=str(path))
    with pytest.raises(ConfigError, match=f"votes: .*{match}; name another file with --votes"):
        run_server(config, report=ignore)


def test_service_without_a_store_leaves_the_file_of_votes_alone(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "votes"
    config = ServeConfig(model=str(tiny_llama_folder), quantization="none", votes=str(path))
    complete(config, {"prompt": "ab", "max_tokens": 1})
    assert not path.exists()


def test_broken_engine_ends_the_server_with_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = SimpleNamespace(stats=lambda: SimpleNamespace(error="out of order"))
    app = FastAPI()
    service = Service(
        config=ServeConfig(),
        model_id="tiny",
        kernels="reference",
        backend=backend,
        app=app,
        has_chat_template=False,
    )  # type: ignore[arg-type]
    lines: list[str] = []
    with bind("127.0.0.1", 0) as listener:
        settings = uvicorn.Config(app, log_config=None)
        status = asyncio.run(server_module._serve(service, settings, listener, lines.append))
    assert status == 1
    assert "error: the engine broke: out of order" in lines


def test_engine_thread_that_ends_takes_the_server_down(
    tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(scheduler: Any) -> None:
        raise SystemExit

    monkeypatch.setattr("serve.engine.scheduler.Scheduler.schedule", fail)
    monkeypatch.setattr("serve.server.HEALTH_CHECK_S", 0.01)
    config = ServeConfig(model=str(tiny_llama_folder), quantization="none")
    lines: list[str] = []

    async def main() -> tuple[int, list[int]]:
        with bind("127.0.0.1", 0) as listener:
            service = build_service(config, report=ignore)
            settings = uvicorn.Config(service.app, log_config=None)
            serving = asyncio.create_task(
                server_module._serve(service, settings, listener, lines.append)
            )
            transport = httpx.ASGITransport(app=service.app)
            url = "http://localhost"
            async with httpx.AsyncClient(transport=transport, base_url=url) as client:
                ready = (await client.get("/readyz")).status_code
                failed = (await client.post("/v1/completions", json={"prompt": "a"})).status_code
                broken = (await client.get("/readyz")).status_code
            return await serving, [ready, failed, broken]

    assert asyncio.run(main()) == (1, [200, 500, 503])
    assert "error: the engine broke: the engine failed: SystemExit" in lines


# Slow enough that the server is still busy when it is looked at.
BUSY = ("--quantization", "none", "--kernels", "reference")


def wait_until_draining(url: str) -> None:
    while httpx.get(url + "/readyz").status_code != 503:
        pass


def open_stream(client: httpx.Client, max_tokens: int) -> Any:
    body = {"prompt": "a", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    return client.stream("POST", "/v1/completions", json=body)


def test_sigterm_lets_running_requests_finish(
    start_server: Callable[..., Any], tiny_llama_folder: Path
) -> None:
    server = start_server(str(tiny_llama_folder), *BUSY)
    with (
        httpx.Client(base_url=server.url, timeout=60) as client,
        open_stream(client, 800) as response,
    ):
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        os.kill(server.process.pid, signal.SIGTERM)
        wait_until_draining(server.url)
        assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 503
        *events, done = [line for line in lines if line]
        assert done == "data: [DONE]"
        choice = json.loads(events[-1].removeprefix("data: "))["choices"][0]
        assert choice["finish_reason"] == "length"
    assert server.process.wait(60) == 0
    server.reader.join(60)
    assert "proa: stopped\n" in server.lines
    assert not any("Traceback" in line for line in server.lines)


def test_drain_timeout_ends_requests_with_an_error(
    start_server: Callable[..., Any], tiny_llama_folder: Path
) -> None:
    server = start_server(str(tiny_llama_folder), *BUSY, "--drain-timeout-s", "0.1")
    with (
        httpx.Client(base_url=server.url, timeout=60) as client,
        open_stream(client, 16000) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        os.kill(server.process.pid, signal.SIGTERM)
        rest = [line for line in lines if line]
        assert "error" in json.loads(rest[-1].removeprefix("data: "))
    assert server.process.wait(60) == 0


def test_second_interrupt_does_not_wait(
    start_server: Callable[..., Any], tiny_llama_folder: Path
) -> None:
    server = start_server(str(tiny_llama_folder), *BUSY)
    with (
        httpx.Client(base_url=server.url, timeout=60) as client,
        open_stream(client, 16000) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        os.kill(server.process.pid, signal.SIGINT)
        wait_until_draining(server.url)
        assert server.stop(signal.SIGINT) == 130


def test_comparison_can_be_voted_on_after_the_server_was_killed(
    start_server: Callable[..., Any], tiny_llama_folder: Path, tmp_path: Path
) -> None:
    words = (str(tiny_llama_folder), "--quantization", "none", "--votes", str(tmp_path / "v/votes"))
    arms = [{"model": "tiny-llama", "label": label} for label in "ab"]
    body = {"prompt": "a", "max_tokens": 2, "arms": arms}
    server = start_server(*words)
    ids = [httpx.post(server.url + "/v1/compare", json=body).json()["id"] for _ in range(2)]
    vote = httpx.post(f"{server.url}/v1/compare/{ids[0]}/vote", json={"vote": 0})
    assert vote.status_code == 200
    assert server.stop(signal.SIGKILL) == -signal.SIGKILL
    server = start_server(*words)
    answer = httpx.post(f"{server.url}/v1/compare/{ids[1]}/vote", json={"vote": 1}).json()
    assert answer["tally"][0]["wins"] == [1, 1]
    assert server.stop(signal.SIGTERM) == 0
    assert not any("Traceback" in line for line in server.lines)


def test_key_from_the_environment_guards_the_server(
    start_server: Callable[..., Any], tiny_llama_folder: Path
) -> None:
    words = ("--quantization", "none", "--host", "0.0.0.0")
    server = start_server(str(tiny_llama_folder), *words, PROA_API_KEY="one,two")
    url = server.url.replace("0.0.0.0", "127.0.0.1") + "/v1/models"
    assert httpx.get(url).status_code == 401
    assert httpx.get(url, headers={"Authorization": "Bearer two"}).status_code == 200
    assert server.stop(signal.SIGTERM) == 0
