"""Pruned variants in the registry, and side networks on them."""

import asyncio
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from serve.attachments.registry import AdapterRegistry, LoadedVariant
from serve.backends.protocol import (
    AdapterConflictError,
    AdapterInfo,
    AdapterLoadError,
    AdapterNotFoundError,
)
from serve.engine.cache_blocks import variant_root_key
from tests.serve.backends.backend_client import run, until
from tests.serve.engine.scripted_adapters import NUM_BYTES, Folders

DIGEST = "d" * 64
HERE = Path("variant")


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path / "root")


@pytest.fixture
def variant(folders: Folders) -> LoadedVariant:
    return folders.variant(DIGEST)


@pytest.fixture
def registry(folders: Folders, variant: LoadedVariant) -> AdapterRegistry:
    """One variant, "small"."""
    registry = folders.registry()
    registry.add_variant("small", HERE, variant)
    return registry


def attach(registry: AdapterRegistry, name: str, path: str) -> AdapterInfo:
    return asyncio.run(registry.attach(name, path))


def test_variant_is_listed_with_what_it_is_worth(
    registry: AdapterRegistry, folders: Folders
) -> None:
    (info,) = registry.infos()
    assert (info.name, info.method, info.description) == ("small", "disp", "a variant")
    assert (info.num_parameters, info.num_bytes) == (5, 10 * NUM_BYTES)
    assert (info.removed, info.speed, info.on) == (0.4, 1.25, None)
    assert info.is_loaded
    assert info.created > 1.7e9
    plain = registry.attach_folder("plain", folders.write("x"))
    assert (plain.removed, plain.speed, plain.on) == (None, None, None)


def test_variant_is_given_to_requests(registry: AdapterRegistry, variant: LoadedVariant) -> None:
    async def main() -> None:
        async with registry.use("small") as (found, side):
            assert side is None
            assert found is not None
            assert found.model is variant.decoder
            assert found.root_key == variant_root_key(DIGEST)
            assert registry.infos()[0].num_running == 1
        assert registry.infos()[0].num_running == 0

    run(main())


def test_side_network_is_attached_to_the_variant_that_it_was_trained_on(
    registry: AdapterRegistry, folders: Folders
) -> None:
    other = folders.variant("e" * 64)
    registry.add_variant("other", HERE, other)
    folders.write("healed", chain=("e" * 64,))
    assert attach(registry, "healed", "healed").on == "other"
    assert registry.attach_folder("plain", folders.write("plain")).on is None

    async def main() -> None:
        async with registry.use("healed") as (found, side), registry.use("other") as (alone, none):
            assert found is alone
            assert none is None
            assert found is not None
            assert found.model is other.decoder
            assert side is not None
            network: Any = side.side
            assert network.name == "healed on ee"
        async with registry.use("plain") as (found, side):
            assert found is None
            assert side is not None

    run(main())


@pytest.mark.parametrize("chain", [("e" * 64,), (DIGEST, "e" * 64), ("e" * 64, DIGEST)])
def test_side_network_of_a_variant_that_is_not_there_is_refused(
    chain: tuple[str, ...], registry: AdapterRegistry, folders: Folders
) -> None:
    path = folders.write("healed", chain=chain)
    digits = ", ".join(digest[:12] for digest in chain)
    message = (
        re.escape(f"trained on a pruned variant ({digits}) that is not loaded") + ".*--variant"
    )
    with pytest.raises(AdapterLoadError, match=message):
        attach(registry, "healed", "healed")
    with pytest.raises(AdapterLoadError, match="adapter 'healed': .*--variant name=DIR"):
        registry.attach_folder("healed", path)
    assert folders.loaded == []


def test_variant_is_not_attached_as_an_adapter(registry: AdapterRegistry, folders: Folders) -> None:
    path = folders.write("x", method="disp")
    message = "loaded at the start of the server: proa serve --variant name=DIR"
    with pytest.raises(AdapterLoadError, match=message):
        attach(registry, "x", "x")
    with pytest.raises(AdapterLoadError, match=message):
        registry.attach_folder("x", path)


def test_names_are_shared_by_variants_and_adapters(
    registry: AdapterRegistry, folders: Folders, variant: LoadedVariant
) -> None:
    registry.attach_folder("x", folders.write("x"))
    for name in ("x", "small"):
        with pytest.raises(AdapterConflictError, match=f"an adapter is called '{name}' already"):
            registry.add_variant(name, HERE, variant)
        with pytest.raises(AdapterConflictError, match=f"an adapter is called '{name}' already"):
            attach(registry, name, "x")
    for bad in ("", "a/b", "a:b", ".a"):
        with pytest.raises(AdapterLoadError, match="adapter name must be"):
            registry.add_variant(bad, HERE, variant)


def test_variants_stay_in_memory_and_do_not_count(folders: Folders, variant: LoadedVariant) -> None:
    registry = folders.registry(max_bytes=2 * NUM_BYTES)
    registry.add_variant("small", HERE, variant)
    for name in ("a", "b"):
        registry.attach_folder(name, folders.write(name))
    assert all(info.is_loaded for info in registry.infos())
    registry.attach_folder("c", folders.write("c", chain=(DIGEST,)))
    assert [info.name for info in registry.infos() if info.is_loaded] == ["b", "c", "small"]


def test_side_network_comes_back_on_its_variant(folders: Folders, variant: LoadedVariant) -> None:
    registry = folders.registry(max_bytes=0)
    registry.add_variant("small", HERE, variant)
    registry.attach_folder("healed", folders.write("healed", chain=(DIGEST,)))

    async def main() -> None:
        for _ in range(2):
            async with registry.use("healed") as (found, side):
                assert found is not None
                assert found.model is variant.decoder
                network: Any = side and side.side
                assert network.name == "healed on dd"
            assert [info.is_loaded for info in registry.infos()] == [False, True]

    run(main())
    assert len(folders.loaded) == 3


def test_side_network_that_moved_to_another_variant_does_not_come_back(
    folders: Folders, variant: LoadedVariant
) -> None:
    registry = folders.registry(max_bytes=0)
    registry.add_variant("small", HERE, variant)
    registry.attach_folder("healed", folders.write("healed", chain=(DIGEST,)))
    folders.write("healed", "y")

    async def use() -> None:
        with pytest.raises(AdapterLoadError, match="has changed since it was attached"):
            async with registry.use("healed"):
                raise AssertionError("it came back")

    run(use())


def test_variant_in_use_is_not_detached(registry: AdapterRegistry) -> None:
    async def main() -> None:
        async with registry.use("small"):
            with pytest.raises(AdapterConflictError, match="1 request uses the adapter 'small'"):
                registry.detach("small")

    run(main())
    registry.detach("small")
    with pytest.raises(AdapterNotFoundError, match="no adapter is called 'small'"):
        registry.detach("small")


def test_variant_that_carries_side_networks_is_not_detached(
    registry: AdapterRegistry, folders: Folders
) -> None:
    for name in ("b", "a"):
        registry.attach_folder(name, folders.write(name, chain=(DIGEST,)))
    registry.attach_folder("plain", folders.write("plain"))
    with pytest.raises(AdapterConflictError, match=r"the variant 'small' carries a, b; detach"):
        registry.detach("small")
    registry.detach("a")
    with pytest.raises(AdapterConflictError, match=r"the variant 'small' carries b; detach"):
        registry.detach("small")
    registry.detach("b")
    registry.detach("small")
    assert [info.name for info in registry.infos()] == ["plain"]
    with pytest.raises(AdapterLoadError, match="that is not loaded"):
        attach(registry, "a", "a")


def test_side_network_whose_variant_is_detached_meanwhile_is_refused(
    registry: AdapterRegistry, folders: Folders
) -> None:
    folders.write("healed", chain=(DIGEST,))
    folders.gate = threading.Semaphore(0)

    async def main() -> None:
        task = asyncio.create_task(registry.attach("healed", "healed"))
        await until(lambda: bool(folders.loaded))
        registry.detach("small")
        assert folders.gate is not None
        folders.gate.release()
        with pytest.raises(AdapterLoadError, match="the variant 'small' is detached"):
            await task
        assert registry.infos() == []

    run(main())
