"""A whole server with pruned variants: loaded at the start, mixed, compared, healed."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from models.checkpoints import load_checkpoint, quantize_checkpoint
from serve.attachments.variants import describe_variant
from serve.backends.protocol import AdapterInfo
from serve.config import ServeConfig
from serve.options import ConfigError
from serve.server import build_service, close_service, describe_start

ADMIN = {"Authorization": "Bearer sk-admin"}
QUESTION = {"prompt": "abcdefgh" * 4, "max_tokens": 12, "seed": 3, "ignore_eos": True}
Work = Callable[[httpx.AsyncClient], Awaitable[None]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def folders(
    write_adapter: Callable[..., Path],
    write_variant: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Two variants and three adapters below one root."""
    root = tmp_path_factory.mktemp("folders")
    write_variant(root / "small", seed=1)
    write_variant(root / "smaller", seed=2, keep=0.25)
    write_adapter(root / "plain", seed=1)
    write_adapter(root / "healed", seed=2, on=root / "small")
    write_adapter(root / "again", seed=3, on=root / "small")
    return root


@pytest.fixture
def make_config(tiny_llama_folder: Path, cache: Path, folders: Path) -> Callable[..., ServeConfig]:
    def make(*variants: str, adapters: tuple[str, ...] = (), **fields: Any) -> ServeConfig:
        settings = {
            "model": str(tiny_llama_folder), "quantization": "none", "max_context": 512,
            "admin_key": ("sk-admin",), "cache_dir": str(cache), "adapter_root": str(folders),
            "variant": tuple(f"{name}={folders}/{name}" for name in variants),
            "adapter": tuple(f"{name}={folders}/{name}" for name in adapters),
        }  # fmt: skip
        return ServeConfig(**(settings | fields))

    return make


def with_server(config: ServeConfig, work: Work) -> list[str]:
    """Build a server in this process, give a client of it, and return what it said."""
    lines: list[str] = []

    async def run() -> None:
        service = build_service(config, report=lines.append)
        lines.extend(describe_start(service, "http://h"))
        transport = httpx.ASGITransport(app=service.app)
        try:
            async with httpx.AsyncClient(
                transport=transport, base_url="http://localhost", timeout=60
            ) as client:
                await work(client)
        finally:
            await close_service(service)

    asyncio.run(run())
    return lines


async def complete(client: httpx.AsyncClient, model: str, **fields: Any) -> str:
    body = {"model": model, **QUESTION, **fields}
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


async def nothing(_: httpx.AsyncClient) -> None:
    """Ask nothing of the server."""


MODELS = ["tiny-llama" + suffix for suffix in ("", ":plain", ":small", ":smaller", ":healed")]


def test_models_answer_as_if_alone(make_config: Callable[..., ServeConfig]) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        alone = [await complete(client, model) for model in MODELS]
        assert len(set(alone)) == 5
        assert list(await asyncio.gather(*(complete(client, model) for model in MODELS))) == alone
        assert await complete(client, "tiny-llama:healed", adapter_scale=0) == alone[2]
        arms: list[dict[str, Any]] = [{"model": model} for model in (*MODELS, MODELS[4])]
        arms[5]["adapter_scale"] = 0
        body = (await client.post("/v1/compare", json={**QUESTION, "arms": arms})).json()
        assert [arm["text"] for arm in body["arms"]] == [*alone, alone[2]]
        assert body["usage"]["completion_tokens"] == 6 * 12
        several = await client.post(
            "/v1/completions", json={"model": "tiny-llama:small", **QUESTION, "n": 3}
        )
        assert several.json()["choices"][0]["text"] == alone[2]

    config = make_config("small", "smaller", adapters=("plain", "healed"))
    lines = with_server(config, work)
    assert "with adapters: tiny-llama:small, tiny-llama:smaller, tiny-llama:plain" in lines[-3]
    for name, share in (("small", "67%"), ("smaller", "88%")):
        told = [line for line in lines if f"{share} of the linears removed" in line]
        assert [f"tiny-llama:{name}" in line for line in told] == [True]


def test_variants_are_listed_with_what_sits_on_them(
    make_config: Callable[..., ServeConfig],
) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        listed = (await client.get("/v1/adapters")).json()["data"]
        assert [(entry["name"], entry["method"], entry["on"]) for entry in listed] == [
            ("healed", "qst", "small"), ("plain", "qst", None), ("small", "disp", None)
        ]  # fmt: skip
        small = listed[2]
        # Per layer: q, k, v and o of 32 x 32 and 16 x 32, then three matrices of 64 x 32.
        total, kept = 2 * (3072 + 6144), 2 * (1024 + 512 + 3 * 512)
        assert small["num_parameters"] == kept
        assert small["removed"] == pytest.approx(1 - kept / total)
        assert small["num_bytes"] == pytest.approx(4 * kept, rel=0.25)
        assert small["speed"] > 0
        assert (small["description"], small["is_loaded"]) == ("variant 1", True)
        models = (await client.get("/v1/models")).json()["data"]
        found = {m["id"]: (m["parent"], m["x_kind"]) for m in models if "@" not in m["id"]}
        assert found == {
            "tiny-llama": (None, "base"),
            "tiny-llama:healed": ("tiny-llama:small", "adapter"),
            "tiny-llama:plain": ("tiny-llama", "adapter"),
            "tiny-llama:small": ("tiny-llama", "variant"),
        }
        metrics = (await client.get("/metrics")).text
        label = '{model_name="tiny-llama"}'
        assert f"proa_variant_memory_bytes{label} {small['num_bytes']:.1f}\n" in metrics

    with_server(make_config("small", adapters=("plain", "healed")), work)


def test_variant_comes_at_the_start_and_goes_last(make_config: Callable[..., ServeConfig]) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        async def post(name: str) -> httpx.Response:
            body = {"name": name, "path": name}
            return await client.post("/v1/adapters", json=body, headers=ADMIN)

        async def delete(name: str) -> httpx.Response:
            return await client.delete(f"/v1/adapters/{name}", headers=ADMIN)

        refused = await post("smaller")
        assert refused.status_code == 400
        message = refused.json()["error"]["message"]
        assert message == (
            "adapter 'smaller': it is a pruned variant; pruned variants are loaded at the start of "
            "the server: proa serve --variant name=DIR"
        )
        assert (await post("healed")).json()["on"] == "small"
        response = await delete("small")
        assert response.status_code == 409
        assert "carries healed" in response.json()["error"]["message"]
        assert (await delete("healed")).status_code == 200
        assert (await delete("small")).status_code == 200
        again = await post("again")
        assert again.status_code == 400
        assert "that is not loaded" in again.json()["error"]["message"]
        gone = await client.post("/v1/completions", json={"model": "tiny-llama:small", **QUESTION})
        assert gone.status_code == 404

    with_server(make_config("small"), work)


def test_variant_alone_has_nothing_to_scale(make_config: Callable[..., ServeConfig]) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        body = {**QUESTION, "model": "tiny-llama:small", "adapter_scale": 1}
        response = await client.post("/v1/completions", json=body)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "adapter_scale"

    with_server(make_config("small"), work)


def test_second_start_takes_the_sliced_weights_from_the_cache(
    make_config: Callable[..., ServeConfig], tmp_path: Path
) -> None:
    config = make_config("small", quantization="none", cache_dir=str(tmp_path))
    assert any("slicing" in line for line in with_server(config, nothing))
    assert not any("slicing" in line for line in with_server(config, nothing))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no-folder": ({"variant": ("a=/no/such",)}, "variant: a: /no/such is not a folder"),
    "empty": ({"variant": ("a={root}",)}, "variant 'a': .*adapter_config.json is missing"),
    "side-network": ({"variant": ("a={root}/plain",)}, "variant 'a': .*method must be 'disp'"),
    "other-base": ({"variant": ("a={root}/other",)}, "variant 'a': .*fingerprint 000000000000"),
    "damaged": ({"variant": ("a={root}/damaged",)}, "variant 'a': .*not a whole safetensors file"),
    "indices": ({"variant": ("a={root}/indices",)}, "variant 'a': .*layers.0.attn_in"),
    "name": ({"variant": ("a:b={root}/small",)}, "adapter name must be .*; got 'a:b'"),
    "as-adapter": ({"adapter": ("a={root}/small",)}, "adapter 'a': it is a pruned variant"),
    "no-variant": ({"adapter": ("a={root}/healed",)}, "adapter 'a': .*that is not loaded"),
    "other-variant": (
        {"adapter": ("a={root}/healed",), "variant": ("b={root}/smaller",)},
        "adapter 'a': it was trained on a pruned variant .*--variant name=DIR",
    ),
}


@pytest.mark.parametrize(("fields", "match"), BAD.values(), ids=BAD)
def test_bad_variant_ends_the_start_with_one_line(
    fields: dict[str, Any],
    match: str,
    make_config: Callable[..., ServeConfig],
    folders: Path,
    write_variant: Callable[..., Path],
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    write_variant(folders / "other", fingerprint="0" * 64)
    path = write_variant(folders / "damaged") / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    path = write_variant(folders / "indices") / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["layers.0.attn_in"] = torch.full_like(tensors["layers.0.attn_in"], 99)
    save_file(tensors, path)
    texts = {
        name: tuple(text.replace("{root}", str(folders)) for text in value)
        for name, value in fields.items()
    }
    with pytest.raises(ConfigError, match=match) as error:
        build_service(make_config(**texts), report=lambda _: None)
    assert "\n" not in str(error.value)


def test_name_given_twice_is_refused(make_config: Callable[..., ServeConfig]) -> None:
    with pytest.raises(ConfigError, match="two are called 'small'; a name is given once"):
        make_config("small", "small")
    with pytest.raises(ConfigError, match="two are called 'small'; a name is given once"):
        make_config("small", adapters=("small",))


def test_variant_of_a_model_with_4_bit_weights_only_needs_dequantize(
    tiny_llama_folder: Path,
    tmp_path: Path,
    make_config: Callable[..., ServeConfig],
    write_variant: Callable[..., Path],
) -> None:
    model = tmp_path / "tiny-nf4"
    quantize_checkpoint(str(tiny_llama_folder), model)
    fingerprint = load_checkpoint(str(model)).fingerprint
    folder = write_variant(tmp_path / "v", fingerprint=fingerprint, quantization="nf4")
    fields = {"model": str(model), "quantization": "nf4", "variant": (f"v={folder}",)}
    with pytest.raises(ConfigError, match="variant 'v': .*has 4-bit weights only.*dequantize"):
        build_service(make_config(**fields), report=lambda _: None)
    lines = with_server(make_config(**fields, dequantize=True), nothing)
    assert any(line.startswith("warning: tiny-nf4: 4-bit weights are") for line in lines)


def describe(speed: float) -> str:
    info = AdapterInfo(
        name="fast", method="disp", description="", num_parameters=1, num_bytes=38_200_000,
        is_loaded=True, num_running=0, created=0, removed=0.4, speed=speed,
    )  # fmt: skip
    return describe_variant(info, "smollm2")


def test_start_says_what_a_variant_is_worth() -> None:
    assert describe(1.274) == (
        "smollm2:fast: 40% of the linears removed, 1.27x the base at one stream, 38 MB of its own"
    )


def test_start_warns_of_a_variant_that_is_slower_than_its_base() -> None:
    assert describe(0.93) == (
        "warning: smollm2:fast decodes at 0.93x its base on this machine, with 40% of the linears "
        "removed"
    )
