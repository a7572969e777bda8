"""A whole server with pruned variants: loaded at the start, mixed, compared, healed."""

import asyncio
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

import serve.backends.native_builder
from models.checkpoints import load_checkpoint, quantize_checkpoint
from models.decoder import Decoder
from serve.attachments.start import describe_variant
from serve.backends.protocol import AdapterInfo
from serve.base_model import build_decoder
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
        assert [(entry["name"], entry["kind"], entry["on"]) for entry in listed] == [
            ("healed", "side_network", "small"),
            ("plain", "side_network", None),
            ("small", "variant", None),
        ]
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
            "tiny-llama:healed": ("tiny-llama:small", "side_network"),
            "tiny-llama:plain": ("tiny-llama", "side_network"),
            "tiny-llama:small": ("tiny-llama", "variant"),
        }
        metrics = (await client.get("/metrics")).text
        label = '{model_name="tiny-llama"}'
        assert f"proa_variant_memory_bytes{label} {small['num_bytes']:.1f}\n" in metrics

    with_server(make_config("small", adapters=("plain", "healed")), work)


def test_variant_comes_and_goes_at_run_time(make_config: Callable[..., ServeConfig]) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        refused = await attach(client, "healed")
        assert refused.status_code == 400
        assert "attach the variant" in refused.json()["error"]["message"]
        base = await complete(client, "tiny-llama")
        entry = (await attach(client, "small")).json()
        assert (entry["kind"], entry["on"], entry["is_loaded"]) == ("variant", None, True)
        while entry["speed"] is None:  # measured while the engine has nothing else to do
            entry = (await client.get("/v1/adapters/small")).json()
        assert entry["speed"] > 0
        assert (await attach(client, "healed")).json()["on"] == "small"
        answers = {
            name: await complete(client, f"tiny-llama:{name}") for name in ("small", "healed")
        }
        assert len({base, *answers.values()}) == 3
        response = await detach(client, "small")
        assert response.status_code == 409
        assert "carries healed" in response.json()["error"]["message"]
        assert (await detach(client, "healed")).status_code == 200
        assert (await detach(client, "small")).status_code == 200
        gone = await client.post("/v1/completions", json={"model": "tiny-llama:small", **QUESTION})
        assert gone.status_code == 404
        for name in ("small", "healed"):
            assert (await attach(client, name)).status_code == 200
        again = {name: await complete(client, f"tiny-llama:{name}") for name in ("small", "healed")}
        assert again == answers
        started.update(answers)

    started: dict[str, str] = {}
    with_server(make_config(), work)

    async def compare(client: httpx.AsyncClient) -> None:
        for name, answer in started.items():
            assert await complete(client, f"tiny-llama:{name}") == answer

    with_server(make_config("small", adapters=("healed",)), compare)


def test_variant_that_comes_and_goes_does_not_disturb_what_runs(
    make_config: Callable[..., ServeConfig],
) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        models = ("tiny-llama", "tiny-llama:smaller", "tiny-llama:plain")
        alone = [await complete(client, model, max_tokens=300) for model in models]
        running = [asyncio.create_task(complete(client, model, max_tokens=300)) for model in models]
        for _ in range(3):
            assert (await attach(client, "small")).status_code == 200
            assert (await attach(client, "healed")).status_code == 200
            await asyncio.gather(
                *(complete(client, f"tiny-llama:{n}") for n in ("small", "healed"))
            )
            assert (await detach(client, "healed")).status_code == 200
            assert (await detach(client, "small")).status_code == 200
        assert await asyncio.gather(*running) == alone

    with_server(make_config("smaller", adapters=("plain",)), work)


def test_variant_that_is_detached_leaves_nothing_in_memory(
    make_config: Callable[..., ServeConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[weakref.ref[Decoder]] = []

    def build(*given: Any) -> Decoder:
        decoder = build_decoder(*given)
        built.append(weakref.ref(decoder))
        return decoder

    monkeypatch.setattr(serve.backends.native_builder, "build_decoder", build)

    async def work(client: httpx.AsyncClient) -> None:
        for name in ("small", "healed"):
            assert (await attach(client, name)).status_code == 200
        answers = [complete(client, model) for model in (MODELS[0], MODELS[2], MODELS[4])]
        await asyncio.gather(*answers)
        base, variant = built
        assert variant() is not None
        for name in ("healed", "small"):
            assert (await detach(client, name)).status_code == 200
        async with asyncio.timeout(30):
            while variant() is not None:  # the engine holds what it ran last until it has rested
                await asyncio.sleep(0.01)
        assert base() is not None
        assert await complete(client, MODELS[0])

    with_server(make_config(), work)


def test_variant_that_does_not_fit_attaches_nothing(
    make_config: Callable[..., ServeConfig], folders: Path, write_variant: Callable[..., Path]
) -> None:
    write_variant(folders / "other", fingerprint="0" * 64)

    async def work(client: httpx.AsyncClient) -> None:
        response = await attach(client, "other")
        assert response.status_code == 400
        assert "adapter 'other': the adapter was trained on" in response.json()["error"]["message"]
        assert (await client.get("/v1/adapters")).json()["data"] == []

    with_server(make_config(), work)


def test_variant_alone_has_nothing_to_scale(make_config: Callable[..., ServeConfig]) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        body = {**QUESTION, "model": "tiny-llama:small", "adapter_scale": 1}
        response = await client.post("/v1/completions", json=body)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "adapter_scale"

    with_server(make_config("small"), work)


def test_second_start_takes_the_derived_weights_from_the_cache(
    make_config: Callable[..., ServeConfig], tmp_path: Path
) -> None:
    config = make_config("small", quantization="none", cache_dir=str(tmp_path))
    assert any("deriving a variant" in line for line in with_server(config, nothing))
    assert not any("deriving a variant" in line for line in with_server(config, nothing))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no-folder": ({"variant": ("a=/no/such",)}, "variant: a: /no/such is not a folder"),
    "empty": ({"variant": ("a={root}",)}, "adapter 'a': .*adapter_config.json is missing"),
    "side-network": (
        {"variant": ("a={root}/plain",)},
        "adapter 'a': .*/plain is a side network; give it with --adapter a=.*/plain",
    ),
    "other-base": ({"variant": ("a={root}/other",)}, "adapter 'a': .*fingerprint 000000000000"),
    "damaged": ({"variant": ("a={root}/damaged",)}, "adapter 'a': .*not a whole safetensors file"),
    "indices": ({"variant": ("a={root}/indices",)}, "adapter 'a': .*layers.0.attn_in"),
    "name": ({"variant": ("a:b={root}/small",)}, "adapter name must be .*; got 'a:b'"),
    "as-adapter": (
        {"adapter": ("a={root}/small",)},
        "adapter 'a': .*/small is a variant; give it with --variant a=.*/small",
    ),
    "no-variant": ({"adapter": ("a={root}/healed",)}, "adapter 'a': .*; attach the variant"),
    "other-variant": (
        {"adapter": ("a={root}/healed",), "variant": ("b={root}/smaller",)},
        "adapter 'a': it was made for the base with .*; attach the variant",
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
    with pytest.raises(ConfigError, match="adapter 'v': .*has 4-bit weights only.*dequantize"):
        build_service(make_config(**fields), report=lambda _: None)
    lines = with_server(make_config(**fields, dequantize=True), nothing)
    assert any(line.startswith("warning: tiny-nf4: 4-bit weights are") for line in lines)


def describe(speed: float) -> str:
    info = AdapterInfo(
        name="fast", method="disp", kind="variant", description="", num_parameters=1,
        num_bytes=38_200_000, is_loaded=True, num_running=0, created=0, removed=0.4, speed=speed,
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
