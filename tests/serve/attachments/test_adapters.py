"""A whole server with adapters: attached at the start and later, mixed, compared."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.config import ServeConfig
from serve.options import ConfigError
from serve.server import build_service
from tests.serve.attachments.server_client import (
    QUESTION,
    attach,
    complete,
    detach,
)
from tests.serve.whole_server import with_server


def make_config(model: Path, **fields: Any) -> ServeConfig:
    return ServeConfig(
        model=str(model), quantization="none", max_context=512, admin_key=("sk-admin",), **fields
    )


@pytest.fixture
def adapters(write_adapter: Callable[..., Path], tmp_path: Path) -> Path:
    """Three adapters below one root, of two shapes."""
    root = tmp_path / "adapters"
    write_adapter(root / "one", seed=1)
    write_adapter(root / "two", seed=2)
    write_adapter(root / "wide", seed=3, reduction=2)
    return root


def test_arms_of_a_comparison_answer_as_if_alone(tiny_llama_folder: Path, adapters: Path) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        models = ["tiny-llama", "tiny-llama:one", "tiny-llama:two@adapt", "tiny-llama:wide"]
        alone = [await complete(client, model) for model in models]
        assert len(set(alone)) == 4
        together = await asyncio.gather(*(complete(client, model) for model in models))
        assert together == alone
        assert await complete(client, models[1], adapter_scale=0) == alone[0]
        arms: list[dict[str, Any]] = [{"model": model} for model in models]
        arms.append({"model": models[1], "adapter_scale": 0})
        response = await client.post("/v1/compare", json={**QUESTION, "arms": arms})
        body = response.json()
        assert [arm["text"] for arm in body["arms"]] == [*alone, alone[0]]
        assert body["usage"]["completion_tokens"] == 5 * 12

    names = ("one", "two", "wide")
    config = make_config(
        tiny_llama_folder, adapter=tuple(f"{name}={adapters}/{name}" for name in names)
    )
    with_server(config, work)


def test_adapter_comes_and_goes_at_run_time(tiny_llama_folder: Path, adapters: Path) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        base = await complete(client, "tiny-llama")
        for path in ("one", str(adapters / "two")):
            for status in (200, 409):
                response = await attach(client, Path(path).name, path)
                assert response.status_code == status, response.text
        assert await complete(client, "tiny-llama:one") != base
        # Any adapter is over the limit: it leaves memory and comes back for its request.
        assert await complete(client, "tiny-llama:two") != await complete(client, "tiny-llama:one")
        listed = (await client.get("/v1/adapters")).json()["data"]
        assert [entry["is_loaded"] for entry in listed] == [False, False]
        for name, status in (("one", 200), ("one", 404), ("two", 200)):
            assert (await detach(client, name)).status_code == status
        refused = await client.post("/v1/completions", json={"model": "tiny-llama:one", **QUESTION})
        assert refused.status_code == 404
        assert await complete(client, "tiny-llama") == base

    config = make_config(tiny_llama_folder, adapter_root=str(adapters), adapter_memory_bytes=0)
    with_server(config, work)


def test_adapter_in_use_stays(tiny_llama_folder: Path, adapters: Path) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        answer = asyncio.create_task(complete(client, "tiny-llama:one", max_tokens=400))
        while not (await client.get("/v1/adapters/one")).json()["num_running"]:
            await asyncio.sleep(0)
        response = await detach(client, "one")
        assert response.status_code == 409, response.text
        assert "1 request uses" in response.json()["error"]["message"]
        await answer
        assert (await detach(client, "one")).status_code == 200

    with_server(make_config(tiny_llama_folder, adapter=(f"one={adapters}/one",)), work)


REFUSED: dict[str, tuple[str, str, str]] = {
    "slash": ("a/b", "one", "adapter name must be"),
    "colon": ("a:b", "one", "adapter name must be"),
    "at": ("a@b", "one", "adapter name must be"),
    "newline": ("a\n", "one", "adapter name must be"),
    "nul": ("a\0", "one", "adapter name must be"),
    "empty": ("", "one", "adapter name must be"),
    "dots": ("..", "one", "adapter name must be"),
    "long": ("a" * 10_000, "one", "adapter name must be"),
    "not-ascii": ("\u00e9", "one", "adapter name must be"),
    "above": ("a", "../outside", "below the adapter root"),
    "above-twice": ("a", "one/../../outside", "below the adapter root"),
    "absolute": ("a", "/etc", "below the adapter root"),
    "root-itself": ("a", ".", "below the adapter root"),
    "no-path": ("a", "", "below the adapter root"),
    "home": ("a", "~", "below the adapter root"),
    "missing": ("a", "none", "below the adapter root"),
    "file": ("a", "file", "below the adapter root"),
    "link": ("a", "link", "below the adapter root"),
    "linked-files": ("a", "linked", "link"),
    "url": ("a", "http://localhost/one", "must be a folder on the server"),
    "nul-path": ("a", "one\0", "must be a folder on the server"),
    "long-path": ("a", "x/" * 9000, "path"),
    "no-adapter": ("a", "empty", "adapter_config.json is missing"),
    "other-base": ("a", "other", "fingerprint 000000000000"),
}


def test_bad_names_and_paths_attach_nothing(
    tiny_llama_folder: Path, adapters: Path, write_adapter: Callable[..., Path]
) -> None:
    outside = write_adapter(adapters.parent / "outside")
    (adapters / "file").write_text("", encoding="utf-8")
    (adapters / "empty").mkdir()
    (adapters / "link").symlink_to(outside)
    (adapters / "linked").mkdir()
    for file in outside.iterdir():
        (adapters / "linked" / file.name).symlink_to(file)
    write_adapter(adapters / "other", fingerprint="0" * 64)

    async def work(client: httpx.AsyncClient) -> None:
        for case, (name, path, match) in REFUSED.items():
            response = await attach(client, name, path)
            assert response.status_code == 400, (case, response.text)
            message = response.json()["error"]["message"]
            assert match in message, case
            assert str(adapters.parent) not in message, case
            assert len(response.content) < 2048, case
        assert (await client.get("/v1/adapters")).json()["data"] == []

    with_server(make_config(tiny_llama_folder, adapter_root=str(adapters)), work)


@pytest.mark.parametrize(
    ("name", "folder", "match"),
    [
        ("a:b", "one", "adapter name must be .*; got 'a:b'"),
        ("a", "other", "adapter 'a': .* fingerprint 000000000000"),
        ("a", ".", "adapter 'a': .*adapter_config.json is missing"),
    ],
    ids=["name", "base", "no adapter"],
)
def test_bad_adapter_ends_the_start_with_one_line(
    tiny_llama_folder: Path,
    adapters: Path,
    write_adapter: Callable[..., Path],
    name: str,
    folder: str,
    match: str,
) -> None:
    write_adapter(adapters / "other", fingerprint="0" * 64)
    config = make_config(tiny_llama_folder, adapter=(f"{name}={adapters}/{folder}",))
    with pytest.raises(ConfigError, match=match) as error:
        build_service(config, report=lambda _: None)
    assert "\n" not in str(error.value)
