"""A whole server with what classifies, and with what gives temperatures."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from adapters.format import Host, read_adapter
from adapters.qst.adapter import build_qst
from adapters.temperature_head.head import HeadConfig, TemperatureHead, save_head
from models.checkpoints import load_checkpoint
from models.decoder import Decoder
from serve.config import ServeConfig
from serve.server import build_service
from tests.adapters.side_decoders import BLOCK, Stream, pack_streams
from tests.serve.attachments.server_client import QUESTION, attach, complete
from tests.serve.whole_server import with_server
from text.tokenizer import Tokenizer

TEXTS = ["abcdefgh", "the quick brown fox " * 3, "a"]


def make_config(model: Path, **fields: Any) -> ServeConfig:
    return ServeConfig(
        model=str(model), quantization="none", admin_key=("sk-admin",),
        **{"max_context": 512, **fields},
    )  # fmt: skip


@pytest.fixture
def classifiers(write_adapter: Callable[..., Path], tmp_path: Path) -> Path:
    """Three classifiers below one root, one of them a regression, and a side network."""
    root = tmp_path / "adapters"
    task = {"task": "sequence_classification"}
    write_adapter(root / "two", seed=1, num_labels=2, labels=("no", "yes"), **task)
    write_adapter(root / "three", seed=2, num_labels=3, **task)
    write_adapter(root / "score", seed=3, num_labels=1, **task)
    write_adapter(root / "poet", seed=4)
    for name in ("two", "three", "score"):
        _give_head_weights(root / name)
    return root


def _give_head_weights(folder: Path) -> None:
    """A fresh head is all zeros."""
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(len(folder.name))
    head = tensors["classifier.weight"]
    tensors["classifier.weight"] = torch.randn(head.shape, generator=generator)
    save_file(tensors, path)


def expected_scores(model: Path, folder: Path, text: str) -> list[float]:
    """Return the scores of a text by the definition: the head on the blended last state."""
    base = load_checkpoint(str(model), quantization="none", report=lambda _: None)
    host = Host(
        spec=base.spec, fingerprint=base.fingerprint, quantization="none", model_id=base.name
    )
    adapter = build_qst(read_adapter(folder), host)
    decoder = Decoder(base.spec, base.weights, kernels="reference", head="dense")
    side = decoder.attach(adapter.network)
    tokens = Tokenizer.from_folder(model, num_embeddings=base.spec.vocab_size).encode(
        text, add_special_tokens=True
    )
    assert adapter.classifier is not None
    blocks = -(-len(tokens) // BLOCK)
    caches = {side.cache_shape: decoder.make_side_cache(side, num_blocks=blocks)}
    stream = Stream(tokens=tokens, side=side)
    batch = pack_streams([stream], {0: (0, len(tokens))}, blocks, caches)
    states = torch.empty(len(tokens), base.spec.hidden_size)
    decoder.forward(batch, decoder.make_cache(num_blocks=blocks), states=states)
    return [float(score) for score in adapter.classifier @ states[-1]]


async def classify(client: httpx.AsyncClient, model: str, given: Any) -> dict[str, Any]:
    response = await client.post("/v1/classify", json={"model": model, "input": given})
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def test_classes_are_those_of_the_definition(tiny_llama_folder: Path, classifiers: Path) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        # Two adapters and a generation in one batch.
        two, three, score, _ = await asyncio.gather(
            classify(client, "tiny-llama:two", TEXTS),
            classify(client, "tiny-llama:three", TEXTS),
            classify(client, "tiny-llama:score", TEXTS[0]),
            complete(client, "tiny-llama"),
        )
        assert (two["object"], two["labels"]) == ("list", ["no", "yes"])
        assert three["labels"] == ["LABEL_0", "LABEL_1", "LABEL_2"]
        assert two["usage"]["completion_tokens"] == 0
        for found, name in ((two, "two"), (three, "three")):
            assert [entry["index"] for entry in found["data"]] == [0, 1, 2]
            for entry, text in zip(found["data"], TEXTS, strict=True):
                scores = expected_scores(tiny_llama_folder, classifiers / name, text)
                probs = torch.tensor(scores).softmax(0).tolist()
                assert entry["probs"] == pytest.approx(probs, abs=2e-2)
                assert entry["label"] == found["labels"][probs.index(max(probs))]
                assert (entry["score"], entry["num_classes"]) == (None, len(probs))
        (entry,) = score["data"]
        assert (entry["label"], entry["probs"], entry["num_classes"]) == (None, [], 1)
        (expected,) = expected_scores(tiny_llama_folder, classifiers / "score", TEXTS[0])
        assert entry["score"] == pytest.approx(expected, abs=5e-2)
        # Alone, and with everything cached: the same bits.
        assert (await classify(client, "tiny-llama:two", TEXTS))["data"] == two["data"]
        alone = await classify(client, "tiny-llama:two", TEXTS[1])
        assert alone["data"][0]["probs"] == two["data"][1]["probs"]
        listed = (await client.get("/v1/models")).json()["data"]
        kinds = {entry["id"]: entry["x_kind"] for entry in listed}
        assert kinds["tiny-llama:two"] == "classifier"
        assert "tiny-llama:two@fixed" not in kinds

    names = ("two", "three", "score")
    config = make_config(
        tiny_llama_folder, adapter=tuple(f"{name}={classifiers}/{name}" for name in names)
    )
    with_server(config, work)


def test_what_does_not_go_together_is_refused(tiny_llama_folder: Path, classifiers: Path) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        for name in ("two", "poet"):
            assert (await attach(client, name)).status_code == 200
        info = (await client.get("/v1/adapters/two")).json()
        assert (info["kind"], info["labels"]) == ("side_network", ["no", "yes"])
        cases = [
            ("/v1/completions", {"model": "tiny-llama:two", **QUESTION}, "model", "classifies"),
            ("/v1/classify", {"model": "tiny-llama:poet", "input": "x"}, "model", "attached: two"),
            ("/v1/classify", {"model": "tiny-llama", "input": "x"}, "model", "attached: two"),
            ("/v1/classify", {"model": "tiny-llama:two@adapt", "input": "x"}, "model", "no strat"),
            ("/v1/classify", {"model": "tiny-llama:two", "input": []}, "input", "not be empty"),
            ("/v1/classify", {"model": "tiny-llama:two", "input": ["x", ""]}, "input", "empty"),
            ("/v1/classify", {"model": "tiny-llama:two", "input": [[99999]]}, "input", "token ids"),
            ("/v1/classify", {"model": "tiny-llama:two", "input": "x " * 900}, "input", "context"),
            ("/v1/classify", {"model": "tiny-llama:two"}, "input", "required"),
        ]  # fmt: skip
        for path, body, param, words in cases:
            response = await client.post(path, json=body)
            assert response.status_code == 400, (body, response.text)
            error = response.json()["error"]
            assert error["param"] == param, error
            assert words in error["message"], error
        missing = await client.post("/v1/classify", json={"model": "tiny-llama:no", "input": "x"})
        assert missing.status_code == 404

    with_server(make_config(tiny_llama_folder, adapter_root=str(classifiers)), work)


@pytest.fixture
def head(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    base = load_checkpoint(str(tiny_llama_folder), quantization="none", report=lambda _: None)
    host = Host(
        spec=base.spec, fingerprint=base.fingerprint, quantization="none", model_id=base.name
    )
    generator = torch.Generator().manual_seed(5)
    made = TemperatureHead(
        config=HeadConfig(width=6, least=0.2, most=1.4),
        first=torch.randn(6, base.spec.hidden_size, generator=generator),
        bias=torch.zeros(6),
        second=torch.randn(6, generator=generator),
        offset=torch.tensor(0.0),
    )
    folder = tmp_path / "adapters" / "warm"
    save_head(folder, made, host, description="", training={})
    return folder


def test_learned_temperatures_are_those_of_the_head(tiny_llama_folder: Path, head: Path) -> None:
    async def trace(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
        body = {**QUESTION, "return_decoding_trace": True, **fields}
        response = await client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        found: list[dict[str, Any]] = response.json()["choices"][0]["decoding_trace"]
        return found

    async def work(client: httpx.AsyncClient) -> None:
        found = await trace(client, model="tiny-llama:warm")
        temperatures = [entry["temperature"] for entry in found]
        assert all(0.2 <= value <= 1.4 for value in temperatures)
        assert len(set(temperatures)) > 6
        named = {"strategy": "learned"}
        assert await trace(client, model="tiny-llama:warm", decoding=named) == found
        assert await trace(client, model="tiny-llama:warm@learned") == found
        half = await trace(client, model="tiny-llama:warm", decoding={"scale": 0.5})
        assert half[0]["temperature"] == pytest.approx(temperatures[0] / 2, rel=1e-5)
        plain = await trace(client, model="tiny-llama:warm", decoding={"strategy": "fixed"})
        assert plain == await trace(client, model="tiny-llama")
        cold = await trace(client, model="tiny-llama:warm", temperature=0)
        assert {entry["temperature"] for entry in cold} == {0.0}
        # Beside others the bits are the same.
        together = await asyncio.gather(
            trace(client, model="tiny-llama:warm"),
            complete(client, "tiny-llama", max_tokens=30),
            trace(client, model="tiny-llama:warm"),
        )
        assert together[0] == together[2] == found
        refused = await client.post(
            "/v1/completions", json={"model": "tiny-llama", **QUESTION, "decoding": named}
        )
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "decoding.strategy"
        assert "needs a model id with a temperature head" in refused.json()["error"]["message"]
        ids = {entry["id"] for entry in (await client.get("/v1/models")).json()["data"]}
        assert "tiny-llama:warm@learned" in ids
        assert "tiny-llama@learned" not in ids

    with_server(make_config(tiny_llama_folder, adapter=(f"warm={head}",)), work)


def test_strategies_with_stages_show_them_in_the_trace(tiny_llama_folder: Path) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        body = {
            **QUESTION, "return_decoding_trace": True, "max_tokens": 40,
            "decoding": {
                "strategy": "plan_first", "tokens": 4, "opening": ["ab"], "closing": ["cd"],
            },
        }  # fmt: skip
        choice = (await client.post("/v1/completions", json=body)).json()["choices"][0]
        assert choice["text"].startswith("ab")
        stages = [entry["stage"] for entry in choice["decoding_trace"]]
        assert stages == sorted(stages, reverse=True)
        assert set(stages) == {"plan", "code"}
        body["decoding"] = {"strategy": "look_ahead", "threshold": 0.0, "tokens": 2}
        body["temperature"] = 0
        choice = (await client.post("/v1/completions", json=body)).json()["choices"][0]
        for entry in choice["decoding_trace"][:-1]:
            best = max(entry["candidates"], key=lambda tried: tried["score"])
            assert (best["token_id"], best["token"]) == (entry["token_id"], entry["token"])
        refused = await client.post("/v1/completions", json={**body, "max_tokens": 470})
        assert refused.status_code == 200  # there is room

    with_server(make_config(tiny_llama_folder), work)


def test_look_ahead_that_finds_no_room_is_refused_at_once(tiny_llama_folder: Path) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        body = {**QUESTION, "max_tokens": 50, "decoding": {"strategy": "look_ahead"}}
        response = await client.post("/v1/completions", json=body)
        assert response.status_code == 400
        assert "takes 16 blocks of the cache" in response.json()["error"]["message"]

    config = make_config(tiny_llama_folder, max_context=128, kv_cache_tokens=160)
    with_server(config, work)


def test_head_of_another_base_ends_the_start(tiny_llama_folder: Path, head: Path) -> None:
    config = head / "adapter_config.json"
    config.write_text(
        config.read_text().replace(read_adapter(head).config.base_fingerprint, "0" * 64)
    )
    with pytest.raises(ValueError, match="fingerprint 000000000000"):
        build_service(make_config(tiny_llama_folder, adapter=(f"warm={head}",)), report=print)
