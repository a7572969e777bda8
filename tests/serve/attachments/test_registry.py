import asyncio
import os
import threading
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

import serve.attachments.registry
from adapters.format import CONFIG_FILE, TENSOR_FILE
from models.checkpoints import CheckpointError
from serve.attachments.paths import find_folder
from serve.backends.protocol import (
    AdapterConflictError,
    AdapterInfo,
    AdapterLoadError,
    AdapterNotFoundError,
)
from tests.serve.backends.backend_client import run, until
from tests.serve.engine.scripted_adapters import NUM_BYTES, Folders, ScriptedRegistry


def attach(registry: ScriptedRegistry, name: str, path: str) -> AdapterInfo:
    return asyncio.run(registry.attach(name, path))


def loaded(registry: ScriptedRegistry) -> set[str]:
    return {info.name for info in registry.infos() if info.is_loaded}


def test_attached_adapters_are_listed_by_name(folders: Folders) -> None:
    registry = folders.registry()
    registry.attach_folder("poet", folders.write("x"))
    info = attach(registry, "ant", str(folders.write("y")))
    assert (info.method, info.kind, info.description) == ("qst", "side_network", "y")
    assert (info.num_parameters, info.has_side) == (7, True)
    assert (info.num_bytes, info.is_loaded, info.num_running) == (NUM_BYTES, True, 0)
    assert info.created > 1.7e9
    assert [info.name for info in registry.infos()] == ["ant", "poet"]


def test_attaching_yields_to_what_computes_and_coming_back_does_not(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    yielding: set[int] = set()
    monkeypatch.setattr(
        serve.attachments.registry, "lower_priority", lambda: yielding.add(threading.get_ident())
    )
    loaded: list[bool] = []

    def load(*given: Any) -> Any:
        loaded.append(threading.get_ident() in yielding)
        return folders.load(*given)

    registry = ScriptedRegistry(load, roots=[folders.root], max_bytes=0)
    folders.write("x")

    async def main() -> None:
        await registry.attach("x", "x")
        async with registry.use("x"):
            assert loaded == [True, False]

    run(main())


def test_path_may_be_relative_to_the_root(folders: Folders) -> None:
    folders.write("deep/x")
    assert attach(folders.registry(), "x", "deep/x").description == "deep/x"


@pytest.mark.parametrize(
    "name",
    ["", "a/b", "a:b", "a@b", ".a", "a\n", "a b", "a" * 65, "\u00e4", ".."],
    ids=["empty", "slash", "colon", "at", "dot", "newline", "space", "long", "umlaut", "dots"],
)
def test_bad_name_is_refused(name: str, folders: Folders) -> None:
    folders.write("x")
    with pytest.raises(AdapterLoadError, match="adapter name must be 1 to 64 letters"):
        attach(folders.registry(), name, "x")


@pytest.mark.parametrize("name", ["a", "_", "-x", "A.b_c-1", "a" * 64])
def test_good_name_is_taken(name: str, folders: Folders) -> None:
    folders.write("x")
    assert attach(folders.registry(), name, "x").name == name


@pytest.mark.parametrize(
    "path",
    ["", ".", "..", "/", "/etc", "../root2/x", "x/../../root2/x", "no", "x/adapter_config.json"],
)
def test_path_that_is_no_folder_below_the_root_is_refused(path: str, folders: Folders) -> None:
    folders.write("x")
    folders.write("../root2/x")
    with pytest.raises(AdapterLoadError, match="path must be a folder below the adapter root"):
        attach(folders.registry(), "x", path)


def test_path_of_the_root_itself_is_refused(folders: Folders) -> None:
    root = folders.write(".")
    with pytest.raises(AdapterLoadError, match="path must be a folder below the adapter root"):
        attach(folders.registry(), "x", str(root))


@pytest.mark.parametrize("path", ["https://x/y", "file:///etc", "a\0b"])
def test_path_that_is_a_url_or_has_a_nul_is_refused(path: str, folders: Folders) -> None:
    with pytest.raises(AdapterLoadError, match="path must be a folder on the server"):
        attach(folders.registry(), "x", path)


def test_path_that_cannot_be_followed_is_refused(folders: Folders) -> None:
    folders.write("x")
    (folders.root / "circle").symlink_to(folders.root / "circle")
    for path in ("circle", "x" * 5000):
        with pytest.raises(AdapterLoadError, match=r"cannot be followed|must be a folder below"):
            attach(folders.registry(), "x", path)


def test_symlink_is_followed_below_the_root_only(folders: Folders) -> None:
    outside = folders.write("../outside")
    inside = folders.write("inside")
    (folders.root / "in").symlink_to(inside)
    (folders.root / "out").symlink_to(outside)
    registry = folders.registry()
    assert attach(registry, "in", "in").description == "inside"
    with pytest.raises(AdapterLoadError, match="path must be a folder below the adapter root"):
        attach(registry, "out", "out")


@pytest.mark.parametrize("file", [CONFIG_FILE, TENSOR_FILE])
def test_file_that_is_a_link_to_outside_is_refused(file: str, folders: Folders) -> None:
    folder = folders.write("x")
    outside = folders.root.parent / "secret"
    outside.write_text("secret", encoding="utf-8")
    (folder / file).unlink(missing_ok=True)
    (folder / file).symlink_to(outside)
    with pytest.raises(
        AdapterLoadError, match=f"adapter 'x': x/{file}: is a link; an adapter is a"
    ):
        attach(folders.registry(), "x", "x")


def test_nothing_is_attached_at_run_time_without_a_root(folders: Folders) -> None:
    path = folders.write("x")
    registry = folders.registry(roots=())
    with pytest.raises(AdapterLoadError, match="no adapter_root is set"):
        attach(registry, "x", str(path))
    assert registry.attach_folder("x", path).is_loaded


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("qst", "adapter 'x': not for base"),
        ("lora", "adapter 'x': method must be one of .*; got 'lora'"),
    ],
    ids=["damaged", "method"],
)
def test_folder_that_does_not_fit_is_refused(method: str, message: str, folders: Folders) -> None:
    path = folders.write("x", "damaged", method=method)
    registry = folders.registry()
    with pytest.raises(AdapterLoadError, match=message):
        attach(registry, "x", "x")
    with pytest.raises(AdapterLoadError, match=message):
        registry.attach_folder("x", path)
    folders.write("x")
    assert attach(registry, "x", "x").is_loaded


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "/srv/cache/x"),
        CheckpointError("/srv/model: has 4-bit weights only"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_the_server_lacks_is_logged_and_not_told(
    error: Exception, folders: Folders, caplog: pytest.LogCaptureFixture
) -> None:
    def load(*_: Any) -> Any:
        raise error

    folders.write("x")
    with pytest.raises(
        AdapterLoadError, match="^adapter 'x': the server cannot load it; its log says why$"
    ):
        attach(ScriptedRegistry(load, roots=[folders.root]), "x", "x")
    reason = str(error) or "MemoryError"
    assert caplog.messages == [f"adapter 'x' cannot be loaded: {reason}"]


def test_name_that_is_taken_is_refused(folders: Folders) -> None:
    folders.write("x")
    registry = folders.registry()
    folders.gate = threading.Semaphore(0)

    async def main() -> None:
        first = asyncio.create_task(registry.attach("a", "x"))
        await until(lambda: bool(folders.loaded))
        with pytest.raises(AdapterConflictError, match="an adapter is called 'a' already"):
            await registry.attach("a", "x")
        assert registry.infos() == []
        assert folders.gate is not None
        folders.gate.release()
        await first
        with pytest.raises(AdapterConflictError, match="an adapter is called 'a' already"):
            await registry.attach("a", "x")

    run(main())


def test_cancelled_attach_attaches_nothing(folders: Folders) -> None:
    folders.write("x")
    registry = folders.registry()
    folders.gate = threading.Semaphore(0)

    async def main() -> None:
        task = asyncio.create_task(registry.attach("a", "x"))
        await until(lambda: bool(folders.loaded))
        task.cancel()
        assert folders.gate is not None
        folders.gate.release(2)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert registry.infos() == []
        assert (await registry.attach("a", "x")).name == "a"

    run(main())


def test_adapter_in_use_is_not_detached(folders: Folders) -> None:
    registry = folders.registry()
    registry.attach_folder("a", folders.write("x"))

    async def main() -> None:
        async with registry.use("a"), registry.use("a"):
            with pytest.raises(AdapterConflictError, match="2 requests use the adapter 'a'"):
                registry.detach("a")
            assert registry.infos()[0].num_running == 2

    run(main())
    registry.detach("a")
    with pytest.raises(AdapterNotFoundError, match="no adapter is called 'a'"):
        registry.detach("a")


def test_least_recently_used_adapters_leave_memory_and_come_back(folders: Folders) -> None:
    registry = folders.registry(max_bytes=2 * NUM_BYTES)

    async def use(*names: str) -> None:
        async with AsyncExitStack() as stack:
            for name in names:
                variant, adapter, _ = await stack.enter_async_context(registry.use(name))
                assert variant is None
                assert adapter is not None
                side: Any = adapter.side
                assert side.name == name

    for name in "abc":
        registry.attach_folder(name, folders.write(name))
    assert loaded(registry) == {"b", "c"}
    run(use("b"))
    run(use("a"))
    assert loaded(registry) == {"a", "b"}
    assert folders.loaded == ["a", "b", "c", "a"]
    run(use("c"))
    assert loaded(registry) == {"a", "c"}
    assert len(registry.infos()) == 3


def test_adapters_in_use_stay_above_the_limit(folders: Folders) -> None:
    registry = folders.registry(max_bytes=0)
    for name in "ab":
        registry.attach_folder(name, folders.write(name))
    assert loaded(registry) == set()

    async def main() -> None:
        async with registry.use("a"):
            async with registry.use("b"):
                assert loaded(registry) == {"a", "b"}
            assert loaded(registry) == {"a"}

    run(main())
    assert loaded(registry) == set()


def test_adapter_comes_back_under_the_same_key(folders: Folders) -> None:
    registry = folders.registry(max_bytes=0)
    registry.attach_folder("a", folders.write("x"))

    async def main() -> None:
        keys = set()
        for _ in range(2):
            async with registry.use("a") as (_, adapter, _):
                assert adapter is not None
                keys.add(adapter.root_key)
        assert len(keys) == 1

    run(main())
    assert len(folders.loaded) == 3


def test_requests_that_want_one_adapter_back_load_it_once(folders: Folders) -> None:
    registry = folders.registry(max_bytes=0)
    registry.attach_folder("a", folders.write("x"))
    folders.gate = threading.Semaphore(0)
    given = []

    async def use() -> None:
        async with registry.use("a") as (_, adapter, _):
            given.append(adapter)

    async def main() -> None:
        tasks = [asyncio.create_task(use()) for _ in range(5)]
        await until(lambda: len(folders.loaded) == 2)
        tasks[0].cancel()
        with pytest.raises(AdapterConflictError, match="5 requests use"):
            registry.detach("a")
        assert folders.gate is not None
        folders.gate.release(9)
        await asyncio.wait(tasks)

    run(main())
    assert len(folders.loaded) == 2
    assert len(given) == 4
    assert len(set(given)) == 1
    assert registry.infos()[0].num_running == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("y", "x has changed since it was attached; detach it and attach it again"),
        (None, f"x: no adapter; {TENSOR_FILE} is missing"),
    ],
    ids=["changed", "gone"],
)
@pytest.mark.parametrize("by", ["operator", "client"])
def test_folder_that_has_changed_does_not_come_back(
    by: str, text: str | None, message: str, folders: Folders, caplog: pytest.LogCaptureFixture
) -> None:
    registry = folders.registry(max_bytes=0)
    path = folders.write("x")
    if by == "operator":
        registry.attach_folder("a", path)
    else:
        attach(registry, "a", "x")

    async def use() -> None:
        with pytest.raises(AdapterLoadError, match=f"^adapter 'a': {message}$"):
            async with registry.use("a"):
                raise AssertionError("it came back")

    if text is None:
        os.remove(path / TENSOR_FILE)
    else:
        folders.write("x", text)
    run(use())
    run(use())
    assert registry.infos()[0].num_running == 0
    said = f"adapter 'a' cannot be loaded: {folders.root}/{message}"
    assert caplog.messages == [said, said]
    registry.detach("a")


def test_negative_limit_is_refused(folders: Folders) -> None:
    with pytest.raises(ValueError, match="adapter_memory_bytes must be at least 0, got -1"):
        folders.registry(max_bytes=-1)


@pytest.mark.parametrize("swapped", ["x", "deep"])
def test_folder_that_becomes_a_link_to_outside_is_not_read(
    swapped: str, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders.write("deep/x")
    folders.write("../outside/x", "secret")

    def find_then_swap(path: str, roots: list[Path]) -> tuple[Path, Path]:
        found = find_folder(path, roots)
        folder = folders.root / "deep" / ("x" if swapped == "x" else "")
        folder.rename(folders.root / "old")
        folder.symlink_to(folders.root.parent / "outside" / ("x" if swapped == "x" else ""))
        return found

    monkeypatch.setattr(serve.attachments.registry, "find_folder", find_then_swap)
    with pytest.raises(AdapterLoadError, match="adapter 'a': deep/x: .*it is no folder, or a link"):
        attach(folders.registry(), "a", "deep/x")
    assert folders.loaded == []


def test_description_that_no_answer_could_carry_is_refused(folders: Folders) -> None:
    path = folders.write("x") / CONFIG_FILE
    path.write_text(path.read_text(encoding="utf-8").replace('"x"', '"\\ud800"'), encoding="utf-8")
    registry = folders.registry()
    with pytest.raises(AdapterLoadError, match="'description'.*: text with half a surrogate pair"):
        attach(registry, "a", "x")
    assert registry.infos() == []


def test_name_of_a_folder_that_is_no_text_is_told_all_the_same(
    folders: Folders, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folders.root / os.fsdecode(b"\xff")
    folder.mkdir(parents=True)
    (folders.root / "x").symlink_to(folder)
    with pytest.raises(AdapterLoadError, match=f"{CONFIG_FILE} is missing") as error:
        attach(folders.registry(), "a", "x")
    assert (str(error.value) + caplog.text).encode()
