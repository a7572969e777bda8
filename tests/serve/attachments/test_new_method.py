"""A method that is added with one file and one line is served like those that are there."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch

from adapters.format import digest
from adapters.methods import METHODS, VariantMethod, host_of
from models.checkpoints import load_checkpoint
from serve.base_model import load_base, load_variant
from serve.cli.adapter_folders import describe_folders, inspect_folder, verify_folder
from serve.config import ServeConfig
from tests.serve.attachments import louder
from tests.serve.attachments.server_client import attach, complete, detach
from tests.serve.whole_server import with_server

FACTORS = [30.0, -20.0]


@pytest.fixture(autouse=True)
def method(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = VariantMethod(
        title="variant with louder attention", describe=louder.describe, derive=louder.derive
    )
    monkeypatch.setitem(METHODS, louder.NAME, entry)


@pytest.fixture
def root(
    tiny_llama_folder: Path,
    tmp_path: Path,
    write_variant: Callable[..., Path],
    write_adapter: Callable[..., Path],
) -> Path:
    """A pruned variant, a louder one on it, and a side network on that."""
    base = host_of(load_checkpoint(str(tiny_llama_folder), quantization="none"))
    small = write_variant(tmp_path / "root" / "small", seed=1)
    loud = louder.save(tmp_path / "root" / "loud", FACTORS, base=base, chain=[digest(small)])
    write_adapter(tmp_path / "root" / "side", seed=2, on=small, chain=(digest(small), digest(loud)))
    louder.save(tmp_path / "root" / "wrong", [1.0], base=base)
    return tmp_path / "root"


@pytest.fixture
def config(tiny_llama_folder: Path, tmp_path: Path, root: Path) -> ServeConfig:
    return ServeConfig(
        model=str(tiny_llama_folder), quantization="none", max_context=512, adapter_root=str(root),
        admin_key=("sk-admin",), cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip


def test_it_is_listed_shown_and_verified(config: ServeConfig, root: Path) -> None:
    listed = describe_folders([root]).splitlines()
    assert listed[0].startswith(f"{root / 'loud'}  variant with louder attention, ")
    rows = dict(line.split("  ", 1) for line in inspect_folder(root / "loud").splitlines())
    rows = {name: text.strip() for name, text in rows.items()}
    assert rows["method"] == "louder: variant with louder attention"
    assert (rows["kind"], rows["layer 0"]) == ("variant", "times 30")
    assert rows["after"] == digest(root / "small")
    assert "fits" in verify_folder(root / "loud", config.model_options, on=[root / "small"])
    found = verify_folder(root / "side", config.model_options, on=[root / "loud", root / "small"])
    assert f"with the variant {root / 'small'} with the variant {root / 'loud'} " in found


def test_it_is_served_in_the_middle_of_a_chain(config: ServeConfig, root: Path) -> None:
    names = ("small", "loud", "side")

    async def work(client: httpx.AsyncClient) -> None:
        refused = await attach(client, "wrong")
        assert refused.status_code == 400
        assert "factors: shape (1,), expected (2,)" in refused.json()["error"]["message"]
        running = asyncio.create_task(complete(client, "tiny-llama", max_tokens=200))
        for name in names:
            response = await attach(client, name)
            assert response.status_code == 200, response.text
        listed = {e["name"]: e for e in (await client.get("/v1/adapters")).json()["data"]}
        assert [(listed[name]["kind"], listed[name]["on"]) for name in names] == [
            ("variant", None), ("variant", "small"), ("side_network", "loud")
        ]  # fmt: skip
        assert listed["loud"]["method"] == "louder"
        assert listed["loud"]["removed"] == listed["small"]["removed"]
        # It has matrices of its own, and shares all others with what it sits on.
        assert 0 < listed["loud"]["num_bytes"] < listed["small"]["num_bytes"] / 2
        models = {m["id"]: m for m in (await client.get("/v1/models")).json()["data"]}
        assert models["tiny-llama:side"]["parent"] == "tiny-llama:loud"
        assert models["tiny-llama:loud"]["x_kind"] == "variant"
        ids = ["tiny-llama", *(f"tiny-llama:{name}" for name in names)]
        alone = [await complete(client, model) for model in ids]
        assert len(set(alone)) == 4
        assert await asyncio.gather(*(complete(client, model) for model in ids)) == alone
        assert await complete(client, "tiny-llama:side", adapter_scale=0) == alone[2]
        for name in reversed(names):
            assert (await detach(client, name)).status_code == 200
        assert await running == await complete(client, "tiny-llama", max_tokens=200)

    with_server(config, work)


def test_chain_is_attached_at_the_start_whatever_the_order_of_the_options(
    config: ServeConfig, root: Path
) -> None:
    config = replace(
        config, variant=(f"loud={root}/loud", f"small={root}/small"), adapter=(f"side={root}/side",)
    )

    async def work(client: httpx.AsyncClient) -> None:
        entries = (await client.get("/v1/adapters")).json()["data"]
        assert {entry["name"]: entry["on"] for entry in entries} == {
            "loud": "small", "side": "loud", "small": None
        }  # fmt: skip
        assert all(entry["speed"] for entry in entries if entry["kind"] == "variant")

    with_server(config, work)


def test_weights_follow_from_the_original_ones_through_the_chain(
    config: ServeConfig, root: Path
) -> None:
    base = load_base(config.model_options, report=lambda _: None)
    on = [root / "loud", root / "small"]
    small = load_variant(config.model_options, base, on[1:], report=lambda _: None)
    loud = load_variant(config.model_options, base, on, report=lambda _: None)
    assert loud.chain == (digest(on[1]), digest(on[0]))
    assert loud.fingerprint == base.fingerprint
    for i, factor in enumerate(FACTORS):
        name = f"layers.{i}.o.weight"
        assert torch.equal(loud.weights[name], small.weights[name] * factor)  # type: ignore[operator]
