"""The adapters that a backend serves, by name: side networks, in memory while there is room, and
variants of the base, which always are.

What is made of an adapter is the business of the backend's loader. Every method is called on the
event loop's thread; folders are read on worker threads.
"""

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from adapters.format import SHOWN_DIGITS, AdapterError, StoredAdapter, describe_chain, read_adapter
from adapters.methods import method_of
from serve.attachments.paths import find_folder
from serve.backends.protocol import (
    AdapterConflictError,
    AdapterInfo,
    AdapterLoadError,
    AdapterNotFoundError,
)
from serve.machine import lower_priority

logger = logging.getLogger(__name__)

NAME_PATTERN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", re.ASCII)
"""Names of adapters."""

# torch tells a lack of memory as a RuntimeError.
_FAILURES = (ValueError, OSError, MemoryError, RuntimeError)

Given = TypeVar("Given")
"""What a request gets of an adapter that it names."""
Below = TypeVar("Below")
"""What a loader needs of a variant to load what sits on it."""
Result = TypeVar("Result")


class SpeedTest(Protocol):
    """Finds out how fast a variant is, a little at a time.

    Attributes:
        speed: as in `AdapterInfo`; None until it is known.
    """

    speed: float | None

    def step(self) -> bool:
        """Go on with it, where the base may run; return whether there is more to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded(Generic[Given, Below]):
    """An adapter in memory.

    Attributes:
        given: to the requests that name it.
        below: of a variant, what the loader needs to load what sits on it.
        num_parameters, num_bytes, removed, labels: as in `AdapterInfo`.
        speed_test: of a variant, if its speed matters.
    """

    given: Given
    below: Below | None = None
    num_parameters: int
    num_bytes: int
    removed: float | None = None
    labels: tuple[str, ...] | None = None
    speed_test: SpeedTest | None = None


@dataclass(slots=True, eq=False)
class _Entry(Generic[Given, Below]):
    """An attached adapter.

    Attributes:
        folder, within: where it is read from; see `adapters.format.read_adapter`.
        chain: digests of what it sits on, then its own.
        on: the variant that it sits on, or None for the base.
        loaded: None while a side network is not in memory.
        loading: set while it comes back.
    """

    facts: AdapterInfo
    folder: Path
    within: Path | None
    chain: tuple[str, ...]
    on: "_Entry[Given, Below] | None"
    loaded: Loaded[Given, Below] | None
    loading: asyncio.Task[None] | None = None
    num_users: int = 0
    last_use: int = 0

    def info(self) -> AdapterInfo:
        test = None if self.loaded is None else self.loaded.speed_test
        return replace(
            self.facts, is_loaded=self.loaded is not None, num_running=self.num_users,
            speed=None if test is None else test.speed,
        )  # fmt: skip


class AdapterRegistry(Generic[Given, Below]):
    """Attached adapters of one base.

    The least recently used side networks that no request uses leave memory when all together take
    more than the limit, and come back with their next request. Those in use stay, even above it.
    """

    def __init__(
        self,
        load: Callable[[StoredAdapter, Below | None], Loaded[Given, Below]],
        *,
        roots: Sequence[Path] = (),
        max_bytes: int | None = None,
    ) -> None:
        """Start with nothing attached.

        Args:
            load: makes what a backend runs of an adapter and of what it sits on, None: the base.
                Called on worker threads while the base runs; raises `AdapterError` if the adapter
                does not fit, and other errors that have nothing to do with it.
            roots: folders below which `attach` may read.
            max_bytes: memory for side networks, >= 0; None: no limit.

        Raises:
            ValueError: the limit is negative.
        """
        if max_bytes is not None and max_bytes < 0:
            raise ValueError(f"adapter_memory_bytes must be at least 0, got {max_bytes}")
        self._load = load
        self._roots = [root.resolve() for root in roots]
        self._max_bytes = max_bytes
        self._entries: dict[str, _Entry[Given, Below]] = {}
        self._reserved: set[str] = set()
        self._num_uses = 0

    def infos(self) -> list[AdapterInfo]:
        """Return what is attached, in the order of names."""
        return [self._entries[name].info() for name in sorted(self._entries)]

    def speed_test(self, name: str) -> SpeedTest | None:
        """Return what measures an attached variant, if anything does."""
        loaded = self._entry(name).loaded
        return None if loaded is None else loaded.speed_test

    def attach_folder(self, name: str, folder: Path) -> AdapterInfo:
        """Attach an adapter that the operator names, wherever it lies; blocks while it loads.

        Raises:
            AdapterConflictError: the name is taken.
            AdapterLoadError: a bad name, or the folder does not hold a fitting adapter.
        """
        self._check_name(name)
        try:
            return self._insert(self._read(name, folder, None, self._variants()))
        except (ValueError, OSError) as error:
            raise AdapterLoadError(f"adapter {name!r}: {error}") from error

    async def attach(self, name: str, path: str) -> AdapterInfo:
        """Attach an adapter that a client names; nothing is attached unless all of it is right.

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
            folder, root = await asyncio.to_thread(find_folder, path, self._roots)
            try:
                work = partial(self._read, name, folder, root, self._variants())
                entry = await _in_background(work)
            except _FAILURES as error:
                raise _refusal(name, error, folder, root) from error
            return self._insert(entry)
        finally:
            self._reserved.discard(name)

    def detach(self, name: str) -> None:
        """Drop an adapter.

        Raises:
            AdapterNotFoundError: no adapter has this name.
            AdapterConflictError: requests use it, or other adapters sit on it.
        """
        entry = self._entry(name)
        on_it = [other.facts.name for other in self._entries.values() if other.on is entry]
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
    async def use(self, name: str) -> AsyncIterator[Given]:
        """Give an adapter to a request and keep it in memory until the request ends.

        Raises:
            AdapterNotFoundError: no adapter has this name.
            AdapterLoadError: it had left memory and cannot be read any more.
        """
        entry = self._entry(name)
        entry.num_users += 1
        self._touch(entry)
        try:
            if entry.loaded is None:
                if entry.loading is None:
                    entry.loading = asyncio.create_task(self._reload(entry))
                    entry.loading.add_done_callback(_take_exception)
                await asyncio.shield(entry.loading)
            assert entry.loaded is not None, "an adapter in use has left memory"
            yield entry.loaded.given
        finally:
            entry.num_users -= 1
            self._make_room()

    def _check_name(self, name: str) -> None:
        if not NAME_PATTERN.fullmatch(name):
            raise AdapterLoadError(
                f"adapter name must be 1 to 64 letters, digits, '.', '_' or '-', and not begin "
                f"with '.'; got {name[:80]!r}"
            )
        if name in self._entries or name in self._reserved:
            raise AdapterConflictError(f"an adapter is called {name!r} already; detach it first")

    def _entry(self, name: str) -> _Entry[Given, Below]:
        entry = self._entries.get(name)
        if entry is None:
            raise AdapterNotFoundError(f"no adapter is called {name!r}")
        return entry

    def _touch(self, entry: _Entry[Given, Below]) -> None:
        self._num_uses += 1
        entry.last_use = self._num_uses

    def _variants(self) -> dict[tuple[str, ...], _Entry[Given, Below]]:
        """Return the attached variants by chain, the older of two that are the same."""
        entries = reversed(self._entries.values())
        return {entry.chain: entry for entry in entries if entry.facts.kind == "variant"}

    def _read(
        self,
        name: str,
        folder: Path,
        within: Path | None,
        variants: Mapping[tuple[str, ...], _Entry[Given, Below]],
    ) -> _Entry[Given, Below]:
        """Load a folder onto what it is for; runs on any thread."""
        stored = read_adapter(folder, within=within)
        about = stored.config
        method = method_of(about)
        on = _find_below(about.chain, variants)
        loaded = self._load(stored, _below(on))
        facts = AdapterInfo(
            name=name, method=about.method, kind=method.kind, description=about.description,
            num_parameters=loaded.num_parameters, num_bytes=loaded.num_bytes, is_loaded=True,
            num_running=0, created=int(time.time()), removed=loaded.removed,
            on=None if on is None else on.facts.name, labels=loaded.labels,
        )  # fmt: skip
        return _Entry(facts, folder, within, (*about.chain, stored.digest), on, loaded)

    def _insert(self, entry: _Entry[Given, Below]) -> AdapterInfo:
        name, on = entry.facts.name, entry.on
        if on is not None and self._entries.get(on.facts.name) is not on:
            raise AdapterLoadError(f"adapter {name!r}: the variant {on.facts.name!r} is detached")
        self._entries[name] = entry
        self._touch(entry)
        self._make_room()
        return entry.info()

    async def _reload(self, entry: _Entry[Given, Below]) -> None:
        """Bring an adapter back into memory."""

        def load() -> Loaded[Given, Below]:
            stored = read_adapter(entry.folder, within=entry.within)
            if (*stored.config.chain, stored.digest) != entry.chain:
                raise AdapterError(
                    f"{entry.folder} has changed since it was attached; detach it and attach it "
                    "again"
                )
            return self._load(stored, _below(entry.on))

        try:
            entry.loaded = await asyncio.to_thread(load)
            self._make_room()
        except _FAILURES as error:
            raise _refusal(entry.facts.name, error, entry.folder, entry.within) from error
        finally:
            entry.loading = None

    def _make_room(self) -> None:
        """Drop side networks that nobody uses until the others fit, least recently used first."""
        if self._max_bytes is None:
            return
        entries = self._entries.values()
        loaded = [x for x in entries if x.loaded is not None and x.facts.kind == "side_network"]
        num_bytes = sum(entry.facts.num_bytes for entry in loaded)
        for entry in sorted(loaded, key=lambda entry: entry.last_use):
            if num_bytes > self._max_bytes and not entry.num_users:
                entry.loaded = None
                num_bytes -= entry.facts.num_bytes


def _find_below(
    chain: tuple[str, ...], variants: Mapping[tuple[str, ...], _Entry[Given, Below]]
) -> _Entry[Given, Below] | None:
    """Return the variant that an adapter with this chain sits on, None: the base.

    Raises:
        AdapterError: a variant of the chain is not attached; the message says which.
    """
    if chain and chain not in variants:
        missing = next(i for i in range(len(chain)) if chain[: i + 1] not in variants)
        digits = chain[missing][:SHOWN_DIGITS]
        place = f", which sits on {variants[chain[:missing]].facts.name!r}," if missing else ""
        raise AdapterError(
            f"it was made for {describe_chain(chain)}; attach the variant {digits}{place} first "
            "('proa adapters inspect' shows the digest of each)"
        )
    return variants[chain] if chain else None


async def _in_background(work: Callable[[], Result]) -> Result:
    """Call a function on a thread that yields to those that compute what was asked for.

    The threads of a step wait for one another: if one has to share its core, all do.
    """
    executor = ThreadPoolExecutor(1, initializer=lower_priority)
    try:
        return await asyncio.get_running_loop().run_in_executor(executor, work)
    finally:
        executor.shutdown(wait=False)


def _below(on: _Entry[Given, Below] | None) -> Below | None:
    """Return what the loader made of the variant that an adapter sits on, None: the base."""
    return None if on is None or on.loaded is None else on.loaded.below


def _refusal(name: str, error: BaseException, folder: Path, root: Path | None) -> AdapterLoadError:
    """Log why an adapter cannot be loaded, and return it as a client may see it.

    What is wrong with its folder is told in full; what the server lacks may name other paths.
    """
    # Names of files need not be text, but logs and answers must.
    told = (str(error) or type(error).__name__).encode(errors="replace").decode()
    logger.error("adapter %r cannot be loaded: %s", name, told)
    reason = "the server cannot load it; its log says why"
    if isinstance(error, AdapterError):
        reason = told.replace(f"{root or folder.parent}/", "")
    return AdapterLoadError(f"adapter {name!r}: {reason}")


def _take_exception(task: "asyncio.Task[None]") -> None:
    """Let a failed load be silent when all who waited for it have left."""
    if not task.cancelled():
        task.exception()
