"""The adapters that a backend serves: by name, in memory while there is room.

Every method is called on the event loop's thread; folders are read on worker threads.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from adapters.format import CONFIG_FILE, TENSOR_FILE
from adapters.qst.adapter import QstAdapter, load_qst
from models.side import AttachedSide, SideNetwork
from models.spec import DecoderSpec
from serve.backends.protocol import (
    AdapterConflictError,
    AdapterInfo,
    AdapterLoadError,
    AdapterNotFoundError,
)
from serve.engine.sequence import SideAdapter

NAME_PATTERN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", re.ASCII)
"""Names of adapters."""


class Decoder(Protocol):
    """The part of `models.decoder.Decoder` that a registry uses."""

    spec: DecoderSpec

    def attach(self, network: SideNetwork) -> AttachedSide: ...


@dataclass(slots=True, eq=False)
class _Entry:
    """An attached adapter.

    `running` is None while it is not in memory; `loading` is set while it comes back.
    """

    name: str
    folder: Path
    method: str
    digest: str
    description: str
    num_parameters: int
    num_bytes: int
    created: int
    running: SideAdapter | None
    loading: asyncio.Task[None] | None = None
    num_users: int = 0
    last_use: int = 0

    def info(self) -> AdapterInfo:
        return AdapterInfo(
            name=self.name,
            method=self.method,
            description=self.description,
            num_parameters=self.num_parameters,
            num_bytes=self.num_bytes,
            is_loaded=self.running is not None,
            num_running=self.num_users,
            created=self.created,
        )


class AdapterRegistry:
    """Attached adapters of one decoder.

    The least recently used ones that no request uses leave memory when all together take more than
    the limit, and come back with their next request. Those in use stay, even above the limit.
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
            max_bytes: memory for adapters, >= 0; None: no limit.
            load: reads a folder.

        Raises:
            ValueError: the limit is negative.
        """
        if max_bytes is not None and max_bytes < 0:
            raise ValueError(f"adapter_memory_bytes must be at least 0, got {max_bytes}")
        self._decoder = decoder
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

    def attach_folder(self, name: str, folder: Path) -> AdapterInfo:
        """Attach an adapter that the operator names, wherever it lies; blocks while it loads.

        Raises:
            AdapterConflictError: the name is taken.
            AdapterLoadError: a bad name, or the folder does not hold a fitting adapter.
        """
        self._check_name(name)
        return self._insert(name, folder, *self._read(name, folder))

    async def attach(self, name: str, path: str) -> AdapterInfo:
        """Attach an adapter that a client names.

        Args:
            name: 1 to 64 of A-Z, a-z, 0-9, ".", "_", "-", without a leading ".".
            path: a folder below one of the roots, absolute or relative to it.

        Raises:
            AdapterConflictError: the name is taken.
            AdapterLoadError: a bad name or path, or the folder does not hold a fitting adapter.
        """
        self._check_name(name)
        self._reserved.add(name)
        try:
            folder = await asyncio.to_thread(find_folder, path, self._roots)
            adapter, side = await asyncio.to_thread(self._read, name, folder)
            return self._insert(name, folder, adapter, side)
        finally:
            self._reserved.discard(name)

    def detach(self, name: str) -> None:
        """Drop an adapter.

        Raises:
            AdapterNotFoundError: no adapter has this name.
            AdapterConflictError: requests use it.
        """
        entry = self._entry(name)
        if entry.num_users:
            requests = (
                "1 request uses" if entry.num_users == 1 else f"{entry.num_users} requests use"
            )
            raise AdapterConflictError(
                f"{requests} the adapter {name!r}; detach it when they have ended"
            )
        del self._entries[name]

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[SideAdapter]:
        """Give an adapter to a request and keep it in memory until the request ends.

        Raises:
            AdapterNotFoundError: no adapter has this name.
            AdapterLoadError: it had left memory and cannot be read any more.
        """
        entry = self._entry(name)
        entry.num_users += 1
        self._touch(entry)
        try:
            if entry.running is None:
                if entry.loading is None:
                    entry.loading = asyncio.create_task(self._reload(entry))
                    entry.loading.add_done_callback(_take_exception)
                await asyncio.shield(entry.loading)
            assert entry.running is not None, "an adapter in use has left memory"
            yield entry.running
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

    def _check_name(self, name: str) -> None:
        if not NAME_PATTERN.fullmatch(name):
            raise AdapterLoadError(
                f"adapter name must be 1 to 64 letters, digits, '.', '_' or '-', and not begin "
                f"with '.'; got {name[:80]!r}"
            )
        if name in self._entries or name in self._reserved:
            raise AdapterConflictError(f"an adapter is called {name!r} already; detach it first")

    def _read(self, name: str, folder: Path) -> tuple[QstAdapter, AttachedSide]:
        """Load a folder and hand it to the decoder; runs on any thread."""
        try:
            adapter = self._load(
                folder, self._decoder.spec, fingerprint=self._fingerprint, model_id=self._model_id
            )
            if adapter.qst.task != "causal_lm":
                raise ValueError(f"it is for {adapter.qst.task}, which cannot be served")
            return adapter, self._decoder.attach(adapter.network)
        except (ValueError, OSError) as error:
            raise AdapterLoadError(f"adapter {name!r}: {error}") from error

    def _insert(
        self, name: str, folder: Path, adapter: QstAdapter, side: AttachedSide
    ) -> AdapterInfo:
        entry = self._entries[name] = _Entry(
            name=name,
            folder=folder,
            method="qst",
            digest=adapter.digest,
            description=adapter.description,
            num_parameters=adapter.num_parameters,
            num_bytes=side.num_bytes,
            created=int(time.time()),
            running=SideAdapter(side, adapter.digest),
        )
        self._touch(entry)
        self._make_room()
        return entry.info()

    async def _reload(self, entry: _Entry) -> None:
        """Bring an adapter back into memory."""
        try:
            adapter, side = await asyncio.to_thread(self._read, entry.name, entry.folder)
            if adapter.digest != entry.digest:
                raise AdapterLoadError(
                    f"adapter {entry.name!r}: {entry.folder} has changed since it was attached; "
                    "detach it and attach it again"
                )
            entry.running = SideAdapter(side, adapter.digest)
            self._make_room()
        finally:
            entry.loading = None

    def _make_room(self) -> None:
        """Drop adapters that nobody uses until the others fit, the least recently used first."""
        if self._max_bytes is None:
            return
        loaded = [entry for entry in self._entries.values() if entry.running is not None]
        num_bytes = sum(entry.num_bytes for entry in loaded)
        for entry in sorted(loaded, key=lambda entry: entry.last_use):
            if num_bytes > self._max_bytes and not entry.num_users:
                entry.running = None
                num_bytes -= entry.num_bytes


def _take_exception(task: "asyncio.Task[None]") -> None:
    """Let a failed load be silent when all who waited for it have left."""
    if not task.cancelled():
        task.exception()


def find_folder(path: str, roots: Sequence[Path]) -> Path:
    """Find a folder below one of some roots, the files of an adapter in it too.

    Args:
        path: absolute, or relative to a root.
        roots: resolved.

    Returns:
        The folder, resolved.

    Raises:
        AdapterLoadError: it is not below a root, by way of a symlink or otherwise, or is no folder.
    """
    if not roots:
        raise AdapterLoadError("adapters cannot be attached: no adapter_root is set")
    shown = repr(path[:200])
    if "://" in path or "\0" in path:
        raise AdapterLoadError(f"path must be a folder on the server, got {shown}")
    try:
        for root in roots:
            folder = (root / path).resolve()
            if root not in folder.parents:
                continue
            for file in (folder / CONFIG_FILE, folder / TENSOR_FILE):
                if root not in file.resolve().parents:
                    raise AdapterLoadError(
                        f"path {shown}: {file.name} is a link to outside of the adapter root"
                    )
            if folder.is_dir():
                return folder
    except (OSError, RuntimeError) as error:  # too long a name, a circle of links
        raise AdapterLoadError(f"path {shown} cannot be followed") from error
    raise AdapterLoadError(f"path must be a folder below the adapter root, got {shown}")
