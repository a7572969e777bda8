"""Model ids with adapters, and how much of one is asked for."""

from typing import Any

import openai
import pytest

from decoding import STRATEGIES
from serve.api import ApiSettings, create_app
from text.tokenizer import Tokenizer

from .conftest import Client, FakeBackend, check_error, make_adapter


@pytest.fixture(autouse=True)
def adapters(backend: FakeBackend) -> None:
    for name in ("poet", "code"):
        backend.attached[name] = make_adapter(name)


def test_models_are_base_adapters_and_strategies_of_each(client: Client) -> None:
    data = client.get("/v1/models").json()["data"]
    plain = ["smollm2", "smollm2:code", "smollm2:poet"]
    # The base and side networks have no temperature head.
    suffixes = ["", *(f"@{name}" for name in STRATEGIES if name != "learned")]
    ids = [name + suffix for name in plain for suffix in suffixes]
    assert [model["id"] for model in data] == ids
    found = {m["id"]: (m["parent"], m["root"], m["x_kind"]) for m in data}
    assert found["smollm2"] == (None, "smollm2", "base")
    assert found["smollm2:poet"] == ("smollm2", "smollm2", "side_network")
    assert found["smollm2:poet@adapt"] == ("smollm2:poet", "smollm2", "strategy")
    created = {m["id"]: m["created"] for m in data}
    assert created["smollm2:poet"] == created["smollm2:poet@adapt"] == 1_700_000_000
    assert created["smollm2"] > 1_700_000_000
    for model in data:
        assert client.get(f"/v1/models/{model['id']}").json() == model


def test_models_name_variants_and_what_sits_on_them(client: Client, backend: FakeBackend) -> None:
    backend.attached["small"] = make_adapter("small", kind="variant", created=5)
    backend.attached["healed"] = make_adapter("healed", on="small")
    data = client.get("/v1/models").json()["data"]
    found = {m["id"]: (m["parent"], m["root"], m["x_kind"]) for m in data}
    assert found["smollm2:small"] == ("smollm2", "smollm2", "variant")
    assert found["smollm2:small@adapt"] == ("smollm2:small", "smollm2", "strategy")
    assert found["smollm2:healed"] == ("smollm2:small", "smollm2", "side_network")
    assert found["smollm2:poet"] == ("smollm2", "smollm2", "side_network")
    for model in data:
        assert client.get(f"/v1/models/{model['id']}").json() == model


@pytest.mark.parametrize("suffix", ["", "@adapt"])
@pytest.mark.parametrize("scale", [0, 1, 2])
def test_scale_of_a_variant_alone_is_refused(
    client: Client, backend: FakeBackend, suffix: str, scale: float
) -> None:
    backend.attached["small"] = make_adapter("small", kind="variant")
    backend.attached["healed"] = make_adapter("healed", on="small")
    for send in (client.chat, client.complete):
        response = send(model="smollm2:small" + suffix, adapter_scale=scale)
        message = check_error(response, 400, param="adapter_scale", code="invalid_value")
        assert "needs a model id with a side network" in message
        assert send(model="smollm2:small" + suffix).status_code == 200
        assert send(model="smollm2:healed" + suffix, adapter_scale=0).status_code == 200
    assert [request.arms[0].adapter_scale for request in backend.requests] == [1.0, 0.0] * 2


@pytest.mark.parametrize(
    ("model", "adapter", "strategy"),
    [
        ("smollm2", None, "fixed"),
        ("smollm2:poet", "poet", "fixed"),
        ("smollm2:poet@adapt", "poet", "adapt"),
        ("smollm2@adapt", None, "adapt"),
    ],
)
def test_model_id_chooses_adapter_and_strategy(
    client: Client, backend: FakeBackend, model: str, adapter: str | None, strategy: str
) -> None:
    for response in (client.chat(model=model), client.complete(model=model)):
        assert response.json()["model"] == model
    for request in backend.requests:
        (arm,) = request.arms
        assert (arm.adapter, arm.adapter_scale) == (adapter, 1.0)
        assert arm.params.strategy == STRATEGIES[strategy]()
    assert client.post("/tokenize", {"model": model, "content": "a"}).status_code == 200


@pytest.mark.parametrize("model_id", ["org/name:tag", "a:b@c", "m+(x)"])
def test_id_of_the_base_may_look_like_one_with_an_adapter(
    backend: FakeBackend, tokenizer: Tokenizer, model_id: str
) -> None:
    client = Client(create_app(backend, tokenizer, settings=ApiSettings(model_id=model_id)))
    assert client.chat(model=f"{model_id}:poet@adapt").status_code == 200
    assert backend.requests[0].arms[0].adapter == "poet"
    assert client.chat(model=model_id).status_code == 200
    assert backend.requests[1].arms[0].adapter is None


NO_ADAPTERS = [
    "smollm2:none",
    "smollm2:",
    "smollm2:Poet",
    "smollm2:poet ",
    "smollm2:poet\n",
    "smollm2:po\0et",
    "smollm2:../poet",
    "smollm2:none@adapt",
    "smollm2:" + "x" * 10_000,
]
NO_MODELS = [
    "poet",
    ":poet",
    "smollm2::poet",
    "smollm2:poet:code",
    "smollm2:poet@none",
    "smollm2:poet@",
    "smollm2:poet@adapt@adapt",
    "smollm2@adapt:poet",
    "smollm3:poet",
    "smollm2poet",
    "@adapt",
    "",
]


@pytest.mark.parametrize("model", NO_ADAPTERS, ids=range(len(NO_ADAPTERS)))
def test_unknown_adapter_is_not_found_and_known_ones_are_named(client: Client, model: str) -> None:
    for response in (client.chat(model=model), client.complete(model=model)):
        message = check_error(response, 404, param="model", code="model_not_found")
        assert message == "There is no such adapter; attached: code, poet."


@pytest.mark.parametrize("model", NO_MODELS, ids=range(len(NO_MODELS)))
def test_unknown_model_is_not_found(client: Client, model: str) -> None:
    message = check_error(client.chat(model=model), 404, param="model", code="model_not_found")
    assert "no such model" in message


def test_message_stays_short_with_many_adapters(client: Client, backend: FakeBackend) -> None:
    names = [f"n{i:03}" for i in range(300)]
    backend.attached |= {name: make_adapter(name) for name in names}
    message = check_error(client.chat(model="smollm2:x"), 404, param="model")
    assert message.endswith("attached: " + ", ".join(["code", *names[:19]]) + " and 282 more.")
    backend.attached.clear()
    assert "attached: none." in check_error(client.chat(model="smollm2:x"), 404, param="model")


@pytest.mark.parametrize("scale", [0, 0.25, 1, 1.0])
def test_scale_is_passed_on(client: Client, backend: FakeBackend, scale: float) -> None:
    for response in (
        client.chat(model="smollm2:poet", adapter_scale=scale),
        client.complete(model="smollm2:poet@adapt", adapter_scale=scale),
    ):
        assert response.status_code == 200
    assert [request.arms[0].adapter_scale for request in backend.requests] == [scale] * 2


BAD_SCALES: dict[str, tuple[Any, str]] = {
    "negative": (-0.1, "must be a number from 0 to 1, got -0.1"),
    "above": (1.5, "must be a number from 0 to 1, got 1.5"),
    "tiny-above": (1 + 1e-9, "must be a number from 0 to 1"),
    "huge": (1e308, "must be a number from 0 to 1"),
    "true": (True, "must be a valid number, got true"),
    "false": (False, "must be a valid number, got false"),
    "string": ("0.5", "must be a valid number, got a string"),
    "nan-string": ("NaN", "must be a valid number, got a string"),
    "list": ([0.5], "must be a valid number, got a list"),
    "object": ({"poet": 1}, "must be a valid number, got an object"),
}


@pytest.mark.parametrize(("scale", "match"), BAD_SCALES.values(), ids=BAD_SCALES)
def test_bad_scale_is_refused(client: Client, scale: Any, match: str) -> None:
    for response in (
        client.chat(model="smollm2:poet", adapter_scale=scale),
        client.complete(model="smollm2:poet", adapter_scale=scale),
    ):
        assert match in check_error(response, 400, param="adapter_scale")


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_scale_that_is_no_number_is_refused(client: Client, text: str) -> None:
    body = b'{"model": "smollm2:poet", "prompt": "a", "adapter_scale": %s}' % text.encode()
    assert client.post("/v1/completions", content=body).status_code == 400


@pytest.mark.parametrize("model", [None, "smollm2", "smollm2@adapt"])
@pytest.mark.parametrize("scale", [0, 1, 2])
def test_scale_without_an_adapter_is_refused(
    client: Client, model: str | None, scale: float
) -> None:
    for response in (
        client.chat(model=model, adapter_scale=scale),
        client.complete(model=model, adapter_scale=scale),
    ):
        message = check_error(response, 400, param="adapter_scale", code="invalid_value")
        assert "needs a model id with a side network" in message


def test_scale_of_null_is_the_default(client: Client, backend: FakeBackend) -> None:
    assert client.chat(model="smollm2", adapter_scale=None).status_code == 200
    assert client.chat(model="smollm2:poet", adapter_scale=None).status_code == 200
    assert [request.arms[0].adapter_scale for request in backend.requests] == [1.0, 1.0]


def test_openai_client_talks_to_an_adapter(address: str, backend: FakeBackend) -> None:
    api = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    assert "smollm2:poet" in [model.id for model in api.models.list()]
    assert api.models.retrieve("smollm2:poet@adapt").id == "smollm2:poet@adapt"
    answer = api.chat.completions.create(
        model="smollm2:poet",
        messages=[{"role": "user", "content": "hi"}],
        extra_body={"adapter_scale": 0.5},
    )
    assert (answer.model, answer.choices[0].message.content) == ("smollm2:poet", "hello fox")
    stream = api.completions.create(model="smollm2:code@adapt", prompt="the", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "hello fox"
    arms = [request.arms[0] for request in backend.requests]
    assert [(arm.adapter, arm.adapter_scale) for arm in arms] == [("poet", 0.5), ("code", 1.0)]
    with pytest.raises(openai.NotFoundError, match="attached: code, poet"):
        api.completions.create(model="smollm2:none", prompt="the")
