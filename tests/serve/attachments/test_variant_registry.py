"""Variants in the registry, and what sits on them."""

import asyncio
import gc
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest

from adapters.format import digest
from serve.backends.protocol import (
    AdapterConflictError,
    AdapterInfo,
    AdapterLoadError,
    AdapterNotFoundError,
)
from serve.engine.cache_blocks import variant_root_key
from tests.serve.backends.backend_client import run, until
from tests.serve.engine.scripted_adapters import NUM_BYTES, Folders, ScriptedRegistry


@pytest.fixture
def small(folders: Folders) -> Path:
    return folders.write_variant("small")


@pytest.fixture
def registry(folders: Folders, small: Path) -> ScriptedRegistry:
    """One variant, "small"."""
    registry = folders.registry()
    registry.attach_folder("small", small)
    return registry


def attach(registry: ScriptedRegistry, name: str, path: str) -> AdapterInfo:
    return asyncio.run(registry.attach(name, path))


def write_on(folders: Folders, name: str, *on: Path) -> Path:
    """Write a side network on variants."""
    return folders.write(name, chain=tuple(digest(path) for path in on))


def test_variant_is_listed_with_what_it_is_worth(
    registry: ScriptedRegistry, folders: Folders
) -> None:
    (info,) = registry.infos()
    assert (info.name, info.method, info.kind) == ("small", "disp", "variant")
    assert (info.description, info.has_side) == ("small", False)
    assert (info.num_parameters, info.num_bytes) == (5, 10 * NUM_BYTES)
    assert (info.removed, info.speed, info.on) == (0.4, None, None)
    assert info.is_loaded
    assert info.created > 1.7e9
    test = registry.speed_test("small")
    assert test is not None
    while test.step():
        pass
    assert registry.infos()[0].speed == 1.25
    plain = registry.attach_folder("plain", folders.write("x"))
    assert (plain.removed, plain.speed, plain.on) == (None, None, None)
    assert registry.speed_test("plain") is None


def test_variant_is_given_to_requests(registry: ScriptedRegistry, small: Path) -> None:
    async def main() -> None:
        async with registry.use("small") as (found, side, _):
            assert side is None
            assert found is not None
            assert found.model.name == "small"  # type: ignore[attr-defined]
            assert found.root_key == variant_root_key(digest(small))
            assert registry.infos()[0].num_running == 1
        assert registry.infos()[0].num_running == 0

    run(main())


def test_variant_is_attached_at_run_time_and_freed_when_it_is_detached(folders: Folders) -> None:
    registry = folders.registry()
    folders.write_variant("small")
    assert attach(registry, "a", "small").kind == "variant"

    async def use() -> Any:
        async with registry.use("a") as (found, _, _):
            assert found is not None
            return weakref.ref(found.model)

    model = asyncio.run(use())
    assert model() is not None
    registry.detach("a")
    # The thread that loaded it has a low priority: it may still be about to let go of its result.
    end_s = time.monotonic() + 60
    while model() is not None and time.monotonic() < end_s:
        time.sleep(0.01)
        gc.collect()
    assert model() is None


def test_chain_of_any_depth_is_attached_link_by_link(folders: Folders) -> None:
    registry, on = folders.registry(), []
    for i in range(3):
        on.append(folders.write_variant(f"v{i}", None, *on))
    write_on(folders, "side", *on)
    for i in range(3):
        assert attach(registry, f"a{i}", f"v{i}").on == (f"a{i - 1}" if i else None)
    assert attach(registry, "side", "side").on == "a2"
    for i in range(3):
        with pytest.raises(
            AdapterConflictError, match=f"'a{i}' carries {f'a{i + 1}' if i < 2 else 'side'};"
        ):
            registry.detach(f"a{i}")
    for name in ("side", "a2", "a1", "a0"):
        registry.detach(name)


def test_first_missing_link_of_a_chain_is_named(folders: Folders) -> None:
    registry = folders.registry()
    on = [folders.write_variant("v0")]
    on.append(folders.write_variant("v1", None, *on))
    write_on(folders, "side", *on)
    first, second = (digest(path)[:12] for path in on)
    chain = f"it was made for the base with {first}, then {second}; attach the variant "
    with pytest.raises(AdapterLoadError, match=f"adapter 'side': {chain}{first} first"):
        attach(registry, "side", "side")
    registry.attach_folder("low", on[0])
    with pytest.raises(AdapterLoadError, match=f"{chain}{second}, which sits on 'low', first"):
        attach(registry, "side", "side")
    assert folders.loaded == ["v0"]


def test_variant_keeps_its_place_in_a_chain_in_the_order_of_the_chain(folders: Folders) -> None:
    registry = folders.registry()
    on = [folders.write_variant("v0")]
    on.append(folders.write_variant("v1", None, *on))
    for i, path in enumerate(on):
        registry.attach_folder(f"a{i}", path)
    write_on(folders, "side", on[1], on[0])
    with pytest.raises(AdapterLoadError, match="it was made for the base with"):
        attach(registry, "side", "side")


def test_side_network_is_attached_to_the_variant_that_it_was_trained_on(
    registry: ScriptedRegistry, folders: Folders
) -> None:
    other = folders.write_variant("other")
    registry.attach_folder("other", other)
    write_on(folders, "healed", other)
    assert attach(registry, "healed", "healed").on == "other"
    assert registry.attach_folder("plain", folders.write("plain")).on is None

    async def main() -> None:
        async with registry.use("healed") as healed, registry.use("other") as other:
            found, side, _ = healed
            alone, none, _ = other
            assert found is alone
            assert none is None
            assert side is not None
            network: Any = side.side
            assert network.name == "healed on other"
        async with registry.use("plain") as (found, side, _):
            assert found is None
            assert side is not None

    run(main())


def test_names_are_shared_by_variants_and_adapters(
    registry: ScriptedRegistry, folders: Folders, small: Path
) -> None:
    registry.attach_folder("x", folders.write("x"))
    for name in ("x", "small"):
        with pytest.raises(AdapterConflictError, match=f"an adapter is called '{name}' already"):
            registry.attach_folder(name, small)
        with pytest.raises(AdapterConflictError, match=f"an adapter is called '{name}' already"):
            attach(registry, name, "x")
    for bad in ("", "a/b", "a:b", ".a"):
        with pytest.raises(AdapterLoadError, match="adapter name must be"):
            registry.attach_folder(bad, small)


def test_variants_stay_in_memory_and_do_not_count(folders: Folders, small: Path) -> None:
    registry = folders.registry(max_bytes=2 * NUM_BYTES)
    registry.attach_folder("small", small)
    for name in ("a", "b"):
        registry.attach_folder(name, folders.write(name))
    assert all(info.is_loaded for info in registry.infos())
    registry.attach_folder("c", write_on(folders, "c", small))
    assert [info.name for info in registry.infos() if info.is_loaded] == ["b", "c", "small"]


def test_side_network_comes_back_on_its_variant(folders: Folders, small: Path) -> None:
    registry = folders.registry(max_bytes=0)
    registry.attach_folder("small", small)
    registry.attach_folder("healed", write_on(folders, "healed", small))

    async def main() -> None:
        for _ in range(2):
            async with registry.use("healed") as (found, side, _):
                assert found is not None
                assert found.model.name == "small"  # type: ignore[attr-defined]
                network: Any = side and side.side
                assert network.name == "healed on small"
            assert [info.is_loaded for info in registry.infos()] == [False, True]

    run(main())
    assert folders.loaded == ["small", *["healed"] * 3]


def test_side_network_that_moved_to_another_variant_does_not_come_back(
    folders: Folders, small: Path
) -> None:
    registry = folders.registry(max_bytes=0)
    registry.attach_folder("small", small)
    registry.attach_folder("healed", write_on(folders, "healed", small))
    folders.write("healed", "y")

    async def use() -> None:
        with pytest.raises(AdapterLoadError, match="has changed since it was attached"):
            async with registry.use("healed"):
                raise AssertionError("it came back")

    run(use())


def test_variant_in_use_is_not_detached(registry: ScriptedRegistry) -> None:
    async def main() -> None:
        async with registry.use("small"):
            with pytest.raises(AdapterConflictError, match="1 request uses the adapter 'small'"):
                registry.detach("small")

    run(main())
    registry.detach("small")
    with pytest.raises(AdapterNotFoundError, match="no adapter is called 'small'"):
        registry.detach("small")


def test_variant_that_carries_side_networks_is_not_detached(
    registry: ScriptedRegistry, folders: Folders, small: Path
) -> None:
    for name in ("b", "a"):
        registry.attach_folder(name, write_on(folders, name, small))
    registry.attach_folder("plain", folders.write("plain"))
    with pytest.raises(AdapterConflictError, match=r"the variant 'small' carries a, b; detach"):
        registry.detach("small")
    registry.detach("a")
    with pytest.raises(AdapterConflictError, match=r"the variant 'small' carries b; detach"):
        registry.detach("small")
    registry.detach("b")
    registry.detach("small")
    assert [info.name for info in registry.infos()] == ["plain"]
    with pytest.raises(AdapterLoadError, match="attach the variant"):
        attach(registry, "a", "a")


def test_side_network_whose_variant_is_detached_meanwhile_is_refused(
    registry: ScriptedRegistry, folders: Folders, small: Path
) -> None:
    write_on(folders, "healed", small)
    folders.gate = threading.Semaphore(0)

    async def main() -> None:
        task = asyncio.create_task(registry.attach("healed", "healed"))
        await until(lambda: "healed" in folders.loaded)
        registry.detach("small")
        assert folders.gate is not None
        folders.gate.release()
        with pytest.raises(AdapterLoadError, match="the variant 'small' is detached"):
            await task
        assert registry.infos() == []

    run(main())
