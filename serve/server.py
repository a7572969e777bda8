"""Put the parts of a server together: backend, API, web interface, HTTP."""

import asyncio
import gc
import json
import logging
import os
import resource
import signal
import socket
import sys
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import uvicorn
import yaml
from fastapi import FastAPI
from starlette.responses import RedirectResponse

from serve.api import ApiSettings, create_app
from serve.api.context import Experiments
from serve.api.settings import UnknownFields
from serve.backends.building import Report, build_backend
from serve.backends.protocol import Backend
from serve.config import ServeConfig
from serve.connections import ConnectionLimits, LimitedProtocol
from serve.environment import data_folder, let_gradio_stay_silent
from serve.event_loop import run_on_loop
from serve.experiments.database import DatabaseError
from serve.experiments.exposures import ExposureStore
from serve.experiments.plan import PlanError, parse_experiments
from serve.experiments.store import VoteStore
from serve.options import ConfigError
from serve.resolve import resolve_access, resolve_adapters, resolve_connections, resolve_votes
from serve.ui.mount import PATH, UserInterface

HEALTH_CHECK_S = 1.0
CLOSE_TIMEOUT_S = 5
# Longer than clients keep theirs, so that none is closed as it is used again.
KEEP_ALIVE_S = 15
MAX_SHOWN_ADAPTERS = 8


class ServerError(RuntimeError):
    """The server cannot start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """A model behind the API, not yet on the network.

    Attributes:
        config: with every size and limit resolved.
        model_id: id of the base model.
        kernels: what the backend computes with, such as "native-avx2".
        backend: runs the requests.
        app: the ASGI application.
        has_chat_template: whether the model can chat.
        adapters: model ids of the variants and adapters attached at start.
    """

    config: ServeConfig
    model_id: str
    kernels: str
    backend: Backend
    app: FastAPI
    has_chat_template: bool
    adapters: tuple[str, ...] = ()


def build_service(
    config: ServeConfig,
    *,
    report: Report,
    votes: VoteStore | None = None,
    experiments: Experiments | None = None,
) -> Service:
    """Load the model and build everything that serves it.

    Args:
        config: what was asked for.
        report: told what happens.
        votes: keeps the votes on comparisons; None: they cannot be voted on.
        experiments: that run; None: none.

    Raises:
        ConfigError: an option does not suit the model or the machine, the model, a variant or an
            adapter cannot be loaded, or an experiment wants what there is not.
    """
    config = resolve_adapters(resolve_access(config))
    built = build_backend(config, report=report)
    config, backend, tokenizer = built.config, built.backend, built.tokenizer
    model_id = config.served_model_name or built.model_name
    try:
        app = create_app(
            backend, tokenizer, settings=_api_settings(config, model_id), votes=votes,
            experiments=experiments,
        )  # fmt: skip
    except PlanError as error:
        raise ConfigError(f"experiments: {error}") from None
    gc.collect()
    gc.freeze()
    return Service(
        config=config,
        model_id=model_id,
        kernels=built.kernels,
        backend=backend,
        app=app,
        has_chat_template=tokenizer.chat_template is not None,
        adapters=tuple(f"{model_id}:{name}" for name, _ in (*config.variants, *config.adapters)),
    )


def open_votes(config: ServeConfig) -> VoteStore:
    """Open the file that keeps the votes on comparisons.

    Args:
        config: with the path resolved.

    Raises:
        ConfigError: the file cannot be used.
    """
    assert config.votes is not None
    try:
        return VoteStore(Path(config.votes))
    except DatabaseError as error:
        raise ConfigError(f"votes: {error}; name another file with --votes") from None


def open_experiments(config: ServeConfig) -> Experiments | None:
    """Read the experiments and open the file that keeps what comes of them; None: there are none.

    Args:
        config: with the paths resolved.

    Raises:
        ConfigError: a file cannot be used.
    """
    if config.experiments is None:
        return None
    assert config.experiment_data is not None
    try:
        content = yaml.safe_load(Path(config.experiments).read_text(encoding="utf-8"))
        entries = content.get("experiments") if isinstance(content, dict) else None
        plan = {experiment.name: experiment for experiment in parse_experiments(entries)}
        return Experiments(plan=plan, store=ExposureStore(Path(config.experiment_data)))
    except OSError as error:
        raise ConfigError(f"experiments: {config.experiments}: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError):
        raise ConfigError(f"experiments: {config.experiments} is no YAML") from None
    except PlanError as error:
        raise ConfigError(f"experiments: {config.experiments}: {error}") from None
    except DatabaseError as error:
        raise ConfigError(
            f"experiment_data: {error}; name another file with --experiment-data"
        ) from None


def _api_settings(config: ServeConfig, model_id: str) -> ApiSettings:
    return ApiSettings(
        model_id=model_id,
        api_keys=config.api_key,
        admin_keys=config.admin_key,
        adapter_root=config.adapter_root,
        allowed_hosts=config.allowed_host,
        allowed_origins=config.allowed_origin,
        unknown_fields=cast(UnknownFields, config.unknown_fields),
        max_body_bytes=config.max_body_bytes,
        max_sequences_per_prompt=config.max_sequences_per_prompt,
        max_sequences_per_request=config.max_sequences_per_request,
    )


async def close_service(service: Service) -> None:
    """Stop the engine without waiting for requests."""
    await service.backend.drain(0.0)


def run_server(config: ServeConfig, *, report: Report) -> int:
    """Serve until SIGTERM or SIGINT, then let running requests finish.

    Returns:
        0 after a clean stop, 1 if the engine broke.

    Raises:
        ConfigError: an option does not suit the model or the machine.
        ServerError: the address cannot be listened on.
    """
    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    # The web interface asks a line's worth of requests every second.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    config = resolve_votes(config, data_folder=data_folder(os.environ))
    config = resolve_connections(config, max_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    # Bound before the model is loaded: an address in use is told at once.
    listener = bind(config.host, config.port)
    with listener, closing(open_votes(config)) as votes, ExitStack() as stack:
        experiments = open_experiments(config)
        if experiments is not None:
            stack.callback(experiments.store.close)
        service = build_service(config, report=report, votes=votes, experiments=experiments)
        interface = _add_interface(service, listener) if config.ui else None
        settings = uvicorn.Config(
            service.app,
            http=cast(Any, partial(LimitedProtocol, limits=_connection_limits(service.config))),
            timeout_keep_alive=KEEP_ALIVE_S,
            ws="none",
            log_config=None,
            log_level="debug" if config.log_level == "debug" else "warning",
            access_log=config.log_level == "debug",
            server_header=False,
            timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
        )
        return run_on_loop(_serve(service, settings, listener, report, interface))


def _connection_limits(config: ServeConfig) -> ConnectionLimits:
    return ConnectionLimits(
        max_connections=int(config.max_connections),
        max_head_bytes=config.max_header_bytes,
        write_timeout_s=config.write_timeout_s,
    )


def _add_interface(service: Service, listener: socket.socket) -> UserInterface:
    """Serve the web interface beside the API, of which it is a client like any other."""
    let_gradio_stay_silent(os.environ)
    interface = UserInterface(lambda: local_url(listener))
    for path in ("/", PATH):
        service.app.add_route(path, lambda _: RedirectResponse(f"{PATH}/"))
    service.app.mount(PATH, interface)
    return interface


def local_url(listener: socket.socket) -> str:
    """Return the address at which this machine itself reaches a listening socket."""
    host, port = listener.getsockname()[:2]
    return make_url({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port)


def make_url(host: str, port: int) -> str:
    """Return the address of a server."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address, not listening yet.

    Raises:
        ServerError: the address is in use, not this machine's, or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ServerError(f"cannot resolve the address {host}: {error.strerror}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ServerError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another with --port"
        ) from error
    return listener


def describe_start(service: Service, url: str) -> list[str]:
    """Return the lines that say where the server is and how to try it."""
    key = ' -H "Authorization: Bearer $PROA_API_KEY"' if service.config.api_key else ""
    fields: dict[str, object] = {
        "model": f"{service.model_id}@adapt",
        "stream": True,
        "max_tokens": 200,
    }
    if service.has_chat_template:
        path = "/v1/chat/completions"
        question = "Write a Python function that adds two numbers."
        fields["messages"] = [{"role": "user", "content": question}]
    else:
        path = "/v1/completions"
        fields["prompt"] = "def add(a, b):"
    body = json.dumps(fields)
    shown = ", ".join(service.adapters[:MAX_SHOWN_ADAPTERS])
    more = len(service.adapters) - MAX_SHOWN_ADAPTERS
    adapters = [f"with adapters: {shown}" + (f" and {more} more" if more > 0 else "")]
    return [
        *(adapters if shown else []),
        f"{service.model_id} is ready on {url} (Ctrl-C stops it); try:",
        f"  curl -N {url}{path} -H 'Content-Type: application/json'{key} -d '{body}'",
    ]


async def _serve(
    service: Service,
    settings: uvicorn.Config,
    listener: socket.socket,
    report: Report,
    interface: UserInterface | None = None,
) -> int:
    server = uvicorn.Server(settings)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if serving.done():
        await serving
        raise ServerError("the HTTP server did not start")
    stop = _StopSignals(report)
    url = make_url(*listener.getsockname()[:2])
    for line in describe_start(service, url):
        report(line)
    if interface is not None:
        report(f"chat, compare and look inside: {url}{PATH}/")
    broken = asyncio.create_task(_wait_until_broken(service.backend))
    waited: list[asyncio.Future[Any]] = [broken, stop.requested]
    await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
    if broken.done():
        report(f"error: the engine broke: {broken.result()}")
    else:
        broken.cancel()
        timeout_s = service.config.drain_timeout_s
        report(f"stopping; running requests have {timeout_s:g} s (Ctrl-C again: at once)")
        end_s = time.monotonic() + timeout_s
        await service.backend.drain(timeout_s)
        # What was generated in time may still be on its way to a slow client.
        settings.timeout_graceful_shutdown = max(CLOSE_TIMEOUT_S, int(end_s - time.monotonic()))
    if interface is not None:
        await interface.close()
    server.should_exit = True
    await serving
    report("stopped")
    return 1 if broken.done() and not broken.cancelled() else 0


class _StopSignals:
    """Turns the first SIGTERM or SIGINT into a finished future and ends the process at the second.

    Installed once uvicorn has started, in place of its own handlers, which stop listening at once.
    """

    def __init__(self, report: Report) -> None:
        loop = asyncio.get_running_loop()
        self.requested: asyncio.Future[None] = loop.create_future()
        self._report = report
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: signal.Signals) -> None:
        if not self.requested.done():
            self.requested.set_result(None)
        elif number == signal.SIGINT:
            self._report("stopped without waiting")
            sys.stderr.flush()
            os._exit(130)


async def _wait_until_broken(backend: Backend) -> str:
    while (error := backend.stats().error) is None:
        await asyncio.sleep(HEALTH_CHECK_S)
    return error
