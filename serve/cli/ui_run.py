"""Run the interface as a server of its own."""

import asyncio
import signal
import socket
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import RedirectResponse
from starlette.routing import Mount, Route

from client.api import ApiClient
from serve.api import ApiSettings
from serve.api.access import AccessMiddleware
from serve.api.middleware import BodyMiddleware
from serve.cli.arguments import CommandError, UserError
from serve.connections import ConnectionLimits, LimitedProtocol
from serve.server import ServerError, bind, local_url
from serve.ui.mount import PATH, UserInterface

CLOSE_TIMEOUT_S = 3


def run_ui(url: str, host: str, port: int, *, report: Callable[[str], None]) -> int:
    """Serve the page until SIGTERM or SIGINT.

    Args:
        url: of the server that it shows.
        host, port: to listen on.
        report: told where the page is.

    Returns:
        0.

    Raises:
        UserError: `url` is not an address.
        CommandError: the address cannot be listened on.
    """
    try:
        client = ApiClient(url)
    except ValueError as error:
        raise UserError(f"--url: {error}") from None
    interface = UserInterface(lambda: client.url)
    # Without keys: for this machine only, and for no page but its own.
    settings = ApiSettings(model_id="interface")
    app = Starlette(
        routes=[
            Route("/", lambda _: RedirectResponse(f"{PATH}/")), Mount(PATH, interface),
        ],
        middleware=[
            Middleware(AccessMiddleware, settings=settings),
            Middleware(BodyMiddleware, settings=settings),
        ],
    )  # fmt: skip
    try:
        listener = bind(host, port)
    except ServerError as error:
        raise CommandError(str(error)) from None
    with listener:
        http = cast(Any, partial(LimitedProtocol, limits=ConnectionLimits()))
        config = uvicorn.Config(
            app, http=http, ws="none", log_level="warning", server_header=False,
            timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
        )  # fmt: skip
        report(f"the interface of {client.url} is on {local_url(listener)}/")
        asyncio.run(_serve(uvicorn.Server(config), listener, interface))
    return 0


async def _serve(server: uvicorn.Server, listener: socket.socket, interface: UserInterface) -> None:
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    stop = asyncio.Event()
    # In place of uvicorn's own, which end the process with the signal.
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    await interface.close()
    server.should_exit = True
    await serving
