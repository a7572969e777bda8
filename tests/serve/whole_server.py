"""A whole server in the test's process, and a client of it."""

import asyncio
from collections.abc import Awaitable, Callable

import httpx

from serve.config import ServeConfig
from serve.server import build_service, close_service, describe_start

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
