"""The adapters that a backend serves, by name: side networks, in memory while there is room, and
pruned variants of the base, which always are.

Every method is called on the event loop's thread; folders are read on worker threads.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from adapters.format import AdapterConfig, read_config
from adapters.qst.adapter import QstAdapter, load_qst
from models.side import AttachedSide, SideNetwork
from models.spec import DecoderSpec
from serve.attachments.paths import find_folder
from serve.backends.protocol import (
    AdapterConflictError,
    AdapterInfo,
    AdapterLoadError,
    AdapterNotFoundError,
)
from serve.engine.model import Model
from serve.engine.sequence import Attachment, ModelVariant, SideAdapter

NAME_PATTERN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", re.ASCII)
"""Names of adapters."""
_SHOWN_DIGITS = 12


class Decoder(Protocol):
    """The part of `models.decoder.Decoder` that a registry uses."""

    spec: DecoderSpec

    def attach(self, network: SideNetwork) -> AttachedSide: ...


class VariantDecoder(Decoder, Model, Protocol):
    """The same of a variant's decoder, which sequences run on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedVariant:
    """A pruned variant in memory.

    Attributes:
        decoder: built over the base's.
        digest: of the files that it came from.
        description, num_parameters, num_bytes, removed, speed: as in `AdapterInfo`.
    """

    decoder: VariantDecoder
    digest: str
    description: str
    num_parameters: int
    num_bytes: int
    removed: float
    speed: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Host:
    """What a side network can sit on: the base, or the variant of a name."""

    name: str | None
    decoder: Decoder
    variant: ModelVariant | None
    chain: tuple[str, ...]


@dataclass(slots=True, eq=False)
class _Entry:
    """An attached side network and what it sits on, or a variant, which is its own host.

    `side` is None while a side network is not in memory; `loading` is set while it comes back.
    """

    facts: AdapterInfo
    folder: Path
    digest: str
    host: _Host
    side: SideAdapter | None
    loading: asyncio.Task[None] | None = None
    num_users: int = 0
    last_use: int = 0

    @property
    def is_variant(self) -> bool:
        return self.facts.method == "disp"

    @property
    def is_loaded(self) -> bool:
        return self.is_variant or self.side is not None

    def info(self) -> AdapterInfo:
        return replace(self.facts, is_loaded=self.is_loaded, num_running=self.num_users)


class AdapterRegistry:
    """Attached adapters of one decoder.

    The least recently used side networks that no request uses leave memory when all together take
    more than the limit, and come back with their next request. Those in use stay, even above it.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        fingerprint: str,
        model_id: str,
        roots: Sequence[Path] = (),
        max_bytes: int | None = None,
        load: Callable[..., QstAdapter] = load_qst,
    ) -> None:
        """Start with nothing attached.

        Args:
            decoder: the base.
            fingerprint: of the base.
            model_id: of the base, for messages.
            roots: folders below which `attach` may read.
            max_bytes: memory for side networks, >= 0; None: no limit.
            load: reads the folder of one.

        Raises:
            ValueError: the limit is negative.
        """
        if max_bytes is not None and max_bytes < 0:
            raise ValueError(f"adapter_memory_bytes must be at least 0, got {max_bytes}")
        self._base = _Host(name=None, decoder=decoder, variant=None, chain=())
        self._fingerprint = fingerprint
        self._model_id = model_id
        self._roots = [root.resolve() for root in roots]
        self._max_bytes = max_bytes
        self._load = load
        self._entries: dict[str, _Entry] = {}
        self._reserved: set[str] = set()
        self._num_uses = 0

    def infos(self) -> list[AdapterInfo]:
        """Return what is attached, in the order of names."""
        return [self._entries[name].info() for name in sorted(self._entries)]

    def check_name(self, name: str) -> None:
        """Refuse a name that is taken or not allowed; raises as `attach_folder` does."""
        if not NAME_PATTERN.fullmatch(name):
            raise AdapterLoadError(
                f"adapter name must be 1 to 64 letters, digits, '.', '_' or '-', and not begin "
                f"with '.'; got {name[:80]!r}"
            )
        if name in self._entries or name in self._reserved:
            raise AdapterConflictError(f"an adapter is called {name!r} already; detach it first")

    def add_variant(self, name: str, folder: Path, variant: LoadedVariant) -> AdapterInfo:
        """Attach a pruned variant that the operator names.

        Raises:
            AdapterConflictError: the name is taken.
            AdapterLoadError: a bad name.
        """
        self.check_name(name)
        facts = AdapterInfo(
            name=name, method="disp", description=variant.description,
            num_parameters=variant.num_parameters, num_bytes=variant.num_bytes, is_loaded=True,
            num_running=0, created=int(time.time()), removed=variant.removed, speed=variant.speed,
        )  # fmt: skip
        host = _Host(
            name=name,
            decoder=variant.decoder,
            variant=ModelVariant(variant.decoder, variant.digest),
            chain=(variant.digest,),
        )
        self._entries[name] = _Entry(facts, folder, variant.digest, host, None)
        return facts

    def attach_folder(self, name: str, folder: Path) -> AdapterInfo:
        """Attach a side network that the operator names, wherever it lies; blocks while it loads.

        Raises:
            AdapterConflictError: the name is taken.
            AdapterLoadError: a bad name, or the folder does not hold a fitting adapter.
        """
        self.check_name(name)
        return self._insert(name, folder, *self._read(name, folder, self._hosts()))

    async def attach(self, name: str, path: str) -> AdapterInfo:
        """Attach a side network that a client names.

        Args:
            name: 1 to 64 of A-Z, a-z, 0-9, ".", "_", "-", without a leading ".".
            path: a folder below one of the roots, absolute or relative to it.

        Raises:
            AdapterConflictError: the name is taken.
            AdapterLoadError: a bad name or path, or the folder does not hold a fitting adapter.
        """
        self.check_name(name)
        self._reserved.add(name)
        try:
            folder = await asyncio.to_thread(find_folder, path, self._roots)
            read = await asyncio.to_thread(self._read, name, folder, self._hosts())
            return self._insert(name, folder, *read)
        finally:
            self._reserved.discard(name)

    def detach(self, name: str) -> None:
        """Drop an adapter.

        Raises:
            AdapterNotFoundError: no adapter has this name.
            AdapterConflictError: requests use it, or side networks sit on it.
        """
        entry = self._entry(name)
        on_it = [
            other.facts.name
            for other in self._entries.values()
            if other is not entry and other.host is entry.host and entry.is_variant
        ]
        if on_it:
            raise AdapterConflictError(
                f"the variant {name!r} carries {', '.join(sorted(on_it))}; detach what sits on it "
                "first"
            )
        if entry.num_users:
            requests = (
                "1 request uses" if entry.num_users == 1 else f"{entry.num_users} requests use"
            )
            raise AdapterConflictError(
                f"{requests} the adapter {name!r}; detach it when they have ended"
            )
        del self._entries[name]

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[Attachment]:
        """Give an adapter to a request and keep it in memory until the request ends.

        Raises:
            AdapterNotFoundError: no adapter has this name.
            AdapterLoadError: it had left memory and cannot be read any more.
        """
        entry = self._entry(name)
        entry.num_users += 1
        self._touch(entry)
        try:
            if not entry.is_loaded:
                if entry.loading is None:
                    entry.loading = asyncio.create_task(self._reload(entry))
                    entry.loading.add_done_callback(_take_exception)
                await asyncio.shield(entry.loading)
            assert entry.is_loaded, "an adapter in use has left memory"
            yield Attachment(entry.host.variant, entry.side)
        finally:
            entry.num_users -= 1
            self._make_room()

    def _entry(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            raise AdapterNotFoundError(f"no adapter is called {name!r}")
        return entry

    def _touch(self, entry: _Entry) -> None:
        self._num_uses += 1
        entry.last_use = self._num_uses

    def _hosts(self) -> list[_Host]:
        return [self._base, *(entry.host for entry in self._entries.values() if entry.is_variant)]

    def _read(
        self, name: str, folder: Path, hosts: Sequence[_Host]
    ) -> tuple[QstAdapter, AttachedSide, _Host]:
        """Load a folder and hand it to the decoder that it is for; runs on any thread."""
        try:
            host = _find_host(read_config(folder), hosts)
            adapter = self._load(
                folder, host.decoder.spec, fingerprint=self._fingerprint, model_id=self._model_id,
                chain=host.chain,
            )  # fmt: skip
            if adapter.qst.task != "causal_lm":
                raise ValueError(f"it is for {adapter.qst.task}, which cannot be served")
            return adapter, host.decoder.attach(adapter.network), host
        except (ValueError, OSError) as error:
            raise AdapterLoadError(f"adapter {name!r}: {error}") from error

    def _insert(
        self, name: str, folder: Path, adapter: QstAdapter, side: AttachedSide, host: _Host
    ) -> AdapterInfo:
        if host not in self._hosts():
            raise AdapterLoadError(f"adapter {name!r}: the variant {host.name!r} is detached")
        facts = AdapterInfo(
            name=name, method="qst", description=adapter.description,
            num_parameters=adapter.num_parameters, num_bytes=side.num_bytes, is_loaded=True,
            num_running=0, created=int(time.time()), on=host.name,
        )  # fmt: skip
        running = SideAdapter(side, adapter.digest)
        entry = self._entries[name] = _Entry(facts, folder, adapter.digest, host, running)
        self._touch(entry)
        self._make_room()
        return entry.info()

    async def _reload(self, entry: _Entry) -> None:
        """Bring an adapter back into memory."""
        try:
            name, folder = entry.facts.name, entry.folder
            adapter, side, _ = await asyncio.to_thread(self._read, name, folder, self._hosts())
            if adapter.digest != entry.digest:
                raise AdapterLoadError(
                    f"adapter {name!r}: {folder} has changed since it was attached; "
                    "detach it and attach it again"
                )
            entry.side = SideAdapter(side, adapter.digest)
            self._make_room()
        finally:
            entry.loading = None

    def _make_room(self) -> None:
        """Drop side networks that nobody uses until the others fit, least recently used first."""
        if self._max_bytes is None:
            return
        loaded = [entry for entry in self._entries.values() if entry.side is not None]
        num_bytes = sum(entry.facts.num_bytes for entry in loaded)
        for entry in sorted(loaded, key=lambda entry: entry.last_use):
            if num_bytes > self._max_bytes and not entry.num_users:
                entry.side = None
                num_bytes -= entry.facts.num_bytes


def _find_host(config: AdapterConfig, hosts: Sequence[_Host]) -> _Host:
    """Return what an adapter sits on.

    Raises:
        ValueError: it is a variant itself, or what it was trained on is not there.
    """
    if config.method != "qst":
        raise ValueError(
            "it is a pruned variant; pruned variants are loaded at the start of the server: "
            "proa serve --variant name=DIR"
        )
    for host in hosts:
        if host.chain == config.chain:
            return host
    digits = ", ".join(digest[:_SHOWN_DIGITS] for digest in config.chain)
    raise ValueError(
        f"it was trained on a pruned variant ({digits}) that is not loaded; the server must be "
        "started with it: proa serve --variant name=DIR"
    )


def _take_exception(task: "asyncio.Task[None]") -> None:
    """Let a failed load be silent when all who waited for it have left."""
    if not task.cancelled():
        task.exception()
