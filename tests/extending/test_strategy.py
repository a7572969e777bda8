"""A strategy is one file and one line: then it is validated, published, selectable and traced."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from decoding import STRATEGIES
from serve.config import ServeConfig
from tests.extending.fading import Fading
from tests.serve.whole_server import Work, with_server

QUESTION = {"model": "tiny-llama@fading", "prompt": "abc", "max_tokens": 4, "seed": 1,
            "temperature": 0.8, "ignore_eos": True, "return_decoding_trace": True}  # fmt: skip


@pytest.fixture
def served(tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Work], object]:
    """Serve the tiny model with the strategy registered, and do some work with a client."""
    monkeypatch.setitem(STRATEGIES, Fading.name, Fading)
    config = ServeConfig(model=str(tiny_llama_folder), quantization="none", max_context=128)
    return partial(with_server, config)


def test_strategy_of_one_file_and_one_line_decides_temperatures(
    served: Callable[[Work], object],
) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        for fields, cool in (({}, 0.4), ({"decoding": {"share": 0.25}}, 0.2)):
            answer = (await client.post("/v1/completions", json=QUESTION | fields)).json()
            trace = answer["choices"][0]["decoding_trace"]
            assert [entry["temperature"] for entry in trace] == pytest.approx([0.8] + [cool] * 3)

    served(work)


def test_strategy_of_one_file_and_one_line_is_published_and_checked(
    served: Callable[[Work], object],
) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        models: dict[str, Any] = (await client.get("/v1/models")).json()
        assert "tiny-llama@fading" in [entry["id"] for entry in models["data"]]
        published: dict[str, Any] = (await client.get("/v1/decoding_strategies")).json()
        schema = next(e["schema"] for e in published["data"] if e["id"] == "fading")
        assert schema["properties"]["share"]["default"] == 0.5
        refused = await client.post("/v1/completions", json=QUESTION | {"decoding": {"share": 2}})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "decoding.share"

    served(work)
