"""Put the parts of a server together: checkpoint, decoder, sampler, engine, API, HTTP."""

import asyncio
import gc
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import uvicorn
from fastapi import FastAPI
from starlette.responses import RedirectResponse

from decoding import Sampler, TokenTables
from models.checkpoints import Checkpoint, CheckpointError
from models.decoder import Decoder
from serve.api import ApiSettings, create_app
from serve.api.settings import UnknownFields
from serve.attachments.registry import AdapterRegistry
from serve.attachments.variants import add_variants
from serve.backends.native import NativeBackend
from serve.backends.protocol import AdapterConflictError, AdapterLoadError
from serve.base_model import build_decoder, load_base, load_tokenizer, settle_memory
from serve.config import ServeConfig
from serve.environment import data_folder, let_gradio_stay_silent
from serve.event_loop import run_on_loop
from serve.experiments.store import VoteStore, VoteStoreError
from serve.machine import (
    count_processors,
    free_memory_bytes,
)
from serve.model_options import resolve_model_options
from serve.options import ConfigError
from serve.resolve import (
    resolve_access,
    resolve_adapters,
    resolve_capacity,
    resolve_votes,
)
from serve.ui.mount import PATH, UserInterface
from text.chat_template import ChatTemplateError
from text.token_bytes import TokenizerError

CACHE_DTYPES = {"auto": None, "float16": torch.float16, "float32": torch.float32}
HEALTH_CHECK_S = 1.0
CLOSE_TIMEOUT_S = 5
MAX_SHOWN_ADAPTERS = 8

Report = Callable[[str], None]


class ServerError(RuntimeError):
    """The server cannot start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """A model behind the API, not yet on the network.

    Attributes:
        config: with every size and limit resolved.
        model_id: id of the base model.
        kernels: what the decoder computes with, such as "native-avx2".
        backend: runs the requests.
        app: the ASGI application.
        has_chat_template: whether the model can chat.
        adapters: model ids of the variants and adapters attached at start.
    """

    config: ServeConfig
    model_id: str
    kernels: str
    backend: NativeBackend
    app: FastAPI
    has_chat_template: bool
    adapters: tuple[str, ...] = ()


def build_service(
    config: ServeConfig, *, report: Report, votes: VoteStore | None = None
) -> Service:
    """Load the model and build everything that serves it.

    Args:
        config: what was asked for.
        report: told what happens.
        votes: keeps the votes on comparisons; None: they cannot be voted on.

    Raises:
        ConfigError: an option does not suit the model or the machine, or the model, a variant or an
            adapter cannot be loaded.
    """
    config = resolve_adapters(resolve_access(config))
    options = resolve_model_options(
        config.model_options,
        has_cuda=torch.cuda.is_available(),
        num_processors=count_processors(),
    )
    config = replace(config, **asdict(options))
    try:
        checkpoint = load_base(options, report=report)
        # The tokenizer loads while the decoder packs its weights: both leave Python's lock alone.
        with ThreadPoolExecutor(1) as pool:
            loading = pool.submit(load_tokenizer, checkpoint)
            decoder = build_decoder(options, checkpoint)
            # The native kernels have their own threads; torch's would only get in their way.
            is_torch = decoder.kernels == "reference"
            torch.set_num_threads(int(config.threads) if is_torch else 1)
            tokenizer, tables = loading.result()
        # Nothing else computes while the speed of variants is measured.
        registry = _build_registry(config, decoder, checkpoint, report)
    except (CheckpointError, TokenizerError, ChatTemplateError) as error:
        raise ConfigError(str(error)) from error
    model_id = config.served_model_name or checkpoint.name
    folder, eos_token_ids = checkpoint.folder, checkpoint.eos_token_ids
    # Its weights are mapped from disk; what the decoder needs of them, it has.
    del checkpoint
    settle_memory(folder.resolve())
    config = _size_cache(config, decoder, report)
    backend = _build_backend(config, decoder, tables, eos_token_ids, registry)
    app = create_app(backend, tokenizer, settings=_api_settings(config, model_id), votes=votes)
    gc.collect()
    gc.freeze()
    return Service(
        config=config,
        model_id=model_id,
        kernels=decoder.kernels,
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
    except VoteStoreError as error:
        raise ConfigError(f"votes: {error}; name another file with --votes") from None


def _build_registry(
    config: ServeConfig, decoder: Decoder, checkpoint: Checkpoint, report: Report
) -> AdapterRegistry | None:
    """Attach the variants and adapters of the start; None where there can be none.

    The fingerprint that they are held against may take a pass over all weights.
    """
    if not config.adapter and not config.variant and config.adapter_root is None:
        return None
    registry = AdapterRegistry(
        decoder,
        fingerprint=checkpoint.fingerprint,
        model_id=checkpoint.name,
        roots=() if config.adapter_root is None else (Path(config.adapter_root),),
        max_bytes=config.adapter_memory_bytes,
    )
    add_variants(registry, config, checkpoint, decoder, report=report)
    for name, folder in config.adapters:
        try:
            registry.attach_folder(name, Path(folder))
        except (AdapterLoadError, AdapterConflictError) as error:
            raise ConfigError(str(error)) from error
    return registry


def _size_cache(config: ServeConfig, decoder: Decoder, report: Report) -> ServeConfig:
    block_bytes = decoder.cache_bytes_per_block(
        block_size=config.block_size, dtype=CACHE_DTYPES[config.kv_cache_dtype]
    )
    if config.device == "cuda":
        free_bytes = torch.cuda.mem_get_info()[0]
    else:
        free_bytes = free_memory_bytes()
    model_context = decoder.spec.max_position_embeddings
    config = resolve_capacity(
        config, model_context=model_context, bytes_per_block=block_bytes, free_bytes=free_bytes
    )
    size_mb = int(config.kv_cache_tokens) // config.block_size * block_bytes / 1e6
    report(
        f"{decoder.kernels} kernels, {config.threads} threads; KV cache for "
        f"{config.kv_cache_tokens} tokens (at most {size_mb:.0f} MB), context {config.max_context}"
    )
    return config


def _build_backend(
    config: ServeConfig,
    decoder: Decoder,
    tables: TokenTables,
    eos_token_ids: tuple[int, ...],
    registry: AdapterRegistry | None,
) -> NativeBackend:
    sampler = Sampler(tables, eos_token_ids=eos_token_ids, device=config.device)
    try:
        return NativeBackend(
            decoder,
            sampler,
            eos_token_ids=eos_token_ids,
            num_cache_blocks=int(config.kv_cache_tokens) // config.block_size,
            block_size=config.block_size,
            max_batch_tokens=config.max_batch_tokens,
            max_running_sequences=config.max_running_sequences,
            max_waiting_requests=config.max_waiting_requests,
            max_waiting_tokens=config.max_waiting_tokens,
            prefix_caching=config.prefix_caching,
            cache_dtype=CACHE_DTYPES[config.kv_cache_dtype],
            max_context_tokens=int(config.max_context),
            adapters=registry,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _api_settings(config: ServeConfig, model_id: str) -> ApiSettings:
    return ApiSettings(
        model_id=model_id,
        api_keys=config.api_key,
        admin_keys=config.admin_key,
        adapter_root=config.adapter_root,
        allowed_hosts=config.allowed_host,
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
    config = resolve_adapters(resolve_access(config))
    config = resolve_votes(config, data_folder=data_folder(os.environ))
    # Bound before the model is loaded: an address in use is told at once.
    listener = bind(config.host, config.port)
    with listener, closing(open_votes(config)) as votes:
        service = build_service(config, report=report, votes=votes)
        interface = _add_interface(service, listener) if config.ui else None
        settings = uvicorn.Config(
            service.app,
            http="httptools",
            ws="none",
            log_config=None,
            log_level="debug" if config.log_level == "debug" else "warning",
            access_log=config.log_level == "debug",
            server_header=False,
            timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
        )
        return run_on_loop(_serve(service, settings, listener, report, interface))


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


async def _wait_until_broken(backend: NativeBackend) -> str:
    while (error := backend.stats().error) is None:
        await asyncio.sleep(HEALTH_CHECK_S)
    return error
