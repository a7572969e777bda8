"""The backends that the suite holds for.

The suite knows a backend by the protocol alone. To add one, add its name in `BACKENDS` to
`BACKENDS_HELD`; what is built is what the server builds.
"""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.backends import BACKENDS
from serve.backends.building import build_backend
from serve.backends.protocol import Backend
from serve.config import ServeConfig
from tests.serve.backends.backend_client import TIMEOUT_S, all_blocks_are_back

BACKENDS_HELD = ("native", "naive", pytest.param("vllm", marks=pytest.mark.vllm))
MakeBackend = Callable[..., Backend]


@pytest.fixture(scope="module", params=BACKENDS_HELD)
def make_backend(
    request: pytest.FixtureRequest,
    tiny_llama_folder: Path,
    adapter_folders: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[MakeBackend]:
    """Give a function that builds a backend, closed at the end; its arguments are options."""
    built: list[Backend] = []

    def make(**options: Any) -> Backend:
        defaults: dict[str, Any] = {
            "backend": request.param, "model": str(tiny_llama_folder), "quantization": "none",
            "max_context": 2048, "threads": 1, "adapter_root": str(adapter_folders),
            "cache_dir": str(tmp_path_factory.mktemp("cache")),
            "adapter": tuple(f"{name}={adapter_folders}/{name}" for name in ("one", "two")),
        }  # fmt: skip
        found = build_backend(ServeConfig(**(defaults | options)), report=lambda _: None)
        built.append(found.backend)
        return found.backend

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKENDS, "naive", "tests.serve.backends.naive_backend")
        yield make
    for backend in built:
        asyncio.run(backend.drain(0.0))


@pytest.fixture(scope="module")
def adapter_folders(
    write_adapter: Callable[..., Path],
    write_variant: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Three side networks and a variant below one root."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("one", "two", "three")):
        write_adapter(root / name, seed=seed)
    write_variant(root / "small")
    return root


@pytest.fixture
def takes_variants(make_backend: MakeBackend, request: pytest.FixtureRequest) -> bool:
    """Tell whether variants can be attached to the backend while it runs."""
    return request.node.callspec.params["make_backend"] != "vllm"


@pytest.fixture(scope="module")
def shared_backend(make_backend: MakeBackend) -> Backend:
    return make_backend()


@pytest.fixture
def backend(shared_backend: Backend) -> Iterator[Backend]:
    """Give a backend that the tests of a file share; each must leave it as it was."""
    attached = shared_backend.adapters()
    yield shared_backend
    asyncio.run(wait_for_blocks(shared_backend))
    assert shared_backend.adapters() == attached


async def wait_for_blocks(backend: Backend) -> None:
    """Return when nothing waits, runs or holds a block; fails if that does not come."""
    async with asyncio.timeout(TIMEOUT_S):
        while not all_blocks_are_back(backend):
            await asyncio.sleep(0.001)
