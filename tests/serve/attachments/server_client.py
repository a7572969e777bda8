"""A whole server in this process, and what the tests of attachments ask of it."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

from serve.config import ServeConfig
from serve.server import build_service, close_service, describe_start

ADMIN = {"Authorization": "Bearer sk-admin"}
QUESTION = {"prompt": "abcdefgh" * 4, "max_tokens": 12, "seed": 3, "ignore_eos": True}
Work = Callable[[httpx.AsyncClient], Awaitable[None]]


def with_server(config: ServeConfig, work: Work) -> list[str]:
    """Build a server, give a client of it, and return what it said."""
    lines: list[str] = []

    async def run() -> None:
        service = build_service(config, report=lines.append)
        lines.extend(describe_start(service, "http://h"))
        transport = httpx.ASGITransport(app=service.app)
        try:
            async with httpx.AsyncClient(
                transport=transport, base_url="http://localhost", timeout=60
            ) as client:
                await work(client)
        finally:
            await close_service(service)

    asyncio.run(run())
    return lines


async def complete(client: httpx.AsyncClient, model: str, **fields: Any) -> str:
    """Return the answer of a model."""
    body = {"model": model, **QUESTION, **fields}
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


async def attach(client: httpx.AsyncClient, name: str, path: str | None = None) -> httpx.Response:
    """Attach an adapter, from the folder of its name unless another is given."""
    body = {"name": name, "path": name if path is None else path}
    return await client.post("/v1/adapters", json=body, headers=ADMIN)


async def detach(client: httpx.AsyncClient, name: str) -> httpx.Response:
    """Detach an adapter."""
    return await client.delete(f"/v1/adapters/{name}", headers=ADMIN)
