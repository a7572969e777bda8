"""A backend is one file and one line: a scripted one is added, and serves a chat over HTTP."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.backends import BACKENDS
from serve.config import ServeConfig
from serve.options import ConfigError
from serve.server import build_service, close_service


def test_backend_added_by_one_line_serves_a_chat(
    tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKENDS, "naive", "tests.serve.backends.naive_backend")
    config = ServeConfig(backend="naive", model=str(tiny_llama_folder))
    lines: list[str] = []
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "seed": 1}

    async def main() -> dict[str, Any]:
        service = build_service(config, report=lines.append)
        transport = httpx.ASGITransport(app=service.app)
        try:
            assert (service.model_id, service.kernels) == ("tiny-llama", "scripted")
            async with httpx.AsyncClient(
                transport=transport, base_url="http://localhost"
            ) as client:
                answer = await client.post("/v1/chat/completions", json=body)
                assert answer.status_code == 200, answer.text
                return dict(answer.json())
        finally:
            await close_service(service)

    answer = asyncio.run(main())
    assert answer["usage"]["completion_tokens"] == 5
    assert answer["choices"][0]["finish_reason"] == "length"
    assert lines == ["scripted logits; 64 at once"]


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ConfigError, match="backend: 'vlm' is not one of native"):
        ServeConfig(backend="vlm")
