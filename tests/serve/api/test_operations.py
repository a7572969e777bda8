import re

import pytest

from decoding import STRATEGIES, strategy_schema
from serve.api import ApiSettings, create_app
from serve.backends.protocol import QueueFullError
from serve.version import VERSION
from text.tokenizer import Tokenizer

from .conftest import Client, FakeBackend, check_error


def test_models_lists_the_model_and_its_strategies(client: Client) -> None:
    body = client.get("/v1/models").json()
    assert body["object"] == "list"
    ids = [model["id"] for model in body["data"]]
    assert ids == ["smollm2", *(f"smollm2@{name}" for name in STRATEGIES if name != "learned")]
    first, second = body["data"][:2]
    assert first["object"] == "model"
    assert first["max_model_len"] == 256
    assert (first["parent"], first["x_kind"]) == (None, "base")
    assert (second["parent"], second["root"], second["x_kind"]) == (
        "smollm2",
        "smollm2",
        "strategy",
    )
    assert all(isinstance(model["created"], int) for model in body["data"])


@pytest.mark.parametrize(
    ("path", "model_id"),
    [
        ("org/name:tag@adapt", "org/name:tag@adapt"),
        ("org%2Fname%3Atag%40adapt", "org/name:tag@adapt"),
        ("org/name:tag", "org/name:tag"),
    ],
)
def test_model_is_retrieved_by_ids_with_special_characters(
    backend: FakeBackend, tokenizer: Tokenizer, path: str, model_id: str
) -> None:
    app = create_app(backend, tokenizer, settings=ApiSettings(model_id="org/name:tag"))
    response = Client(app).get(f"/v1/models/{path}")
    assert response.status_code == 200
    assert response.json()["id"] == model_id


def test_unknown_model_is_not_found(client: Client) -> None:
    check_error(client.get("/v1/models/gpt-4"), 404, param="model", code="model_not_found")


def test_strategies_are_published_with_their_schema(client: Client) -> None:
    data = client.get("/v1/decoding_strategies").json()["data"]
    assert [entry["id"] for entry in data] == list(STRATEGIES)
    for entry in data:
        assert entry["schema"] == strategy_schema(STRATEGIES[entry["id"]])
        assert entry["model"] == f"smollm2@{entry['id']}"
    assert [entry["id"] for entry in data if entry["is_default"]] == ["fixed"]


def test_version_is_the_packages(client: Client) -> None:
    assert client.get("/version").json() == {"version": VERSION}


@pytest.mark.parametrize("path", ["/health", "/readyz", "/livez"])
def test_healthy_server_says_so(client: Client, path: str) -> None:
    assert client.get(path).json() == {"status": "ok"}


@pytest.mark.parametrize("path", ["/health", "/readyz"])
@pytest.mark.parametrize(
    ("fields", "code"), [({"is_draining": True}, "draining"), ({"broken": "x /a"}, "broken")]
)
def test_server_that_cannot_serve_is_not_ready(
    client: Client, backend: FakeBackend, path: str, fields: dict[str, object], code: str
) -> None:
    for name, value in fields.items():
        setattr(backend, name, value)
    assert check_error(client.get(path), 503, code=code) == f"The server is {code}."
    assert client.get("/livez").status_code == 200


def read_metrics(client: Client) -> dict[str, float]:
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    values = {}
    for line in response.text.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            values[name] = float(value)
    return values


def test_metrics_count_requests_and_tokens(client: Client) -> None:
    client.chat()
    client.chat(model="smollm2@adapt", stream=True, n=2, return_decoding_trace=True)
    client.chat(max_tokens=1)
    client.chat(temprature=1)
    values = read_metrics(client)
    fixed = 'model_name="smollm2",strategy="fixed"'
    adapt = 'model_name="smollm2",strategy="adapt"'
    assert values[f"proa_generation_tokens_total{{{fixed}}}"] == 4
    assert values[f"proa_generation_tokens_total{{{adapt}}}"] == 6
    assert values[f"proa_prompt_tokens_total{{{fixed}}}"] == 40
    assert values[f"proa_time_to_first_token_seconds_count{{{fixed}}}"] == 2
    assert values[f"proa_inter_token_latency_seconds_count{{{fixed}}}"] == 2
    assert values[f"proa_inter_token_latency_seconds_count{{{adapt}}}"] == 4
    assert values[f"proa_e2e_request_latency_seconds_count{{{adapt}}}"] == 1
    assert values[f"proa_request_time_per_output_token_seconds_count{{{fixed}}}"] == 1
    assert values[f"proa_sampling_temperature_count{{{adapt}}}"] == 6
    assert values[f"proa_sampling_temperature_sum{{{adapt}}}"] == pytest.approx(1.8)
    ends = "proa_sequences_finished_total{finished_reason"
    assert values[f'{ends}="stop",{adapt}}}'] == 2
    assert values[f'{ends}="stop",{fixed}}}'] == 1
    assert values[f'{ends}="length",{fixed}}}'] == 1
    http = 'proa_http_requests_total{endpoint="/v1/chat/completions",model_name="smollm2",status'
    assert values[f'{http}="200"}}'] == 3
    assert values[f'{http}="400"}}'] == 1


def test_metrics_read_the_backend(client: Client) -> None:
    values = read_metrics(client)
    name = '{model_name="smollm2"}'
    assert values[f"proa_kv_cache_usage_perc{name}"] == pytest.approx(0.4)
    assert values[f"proa_num_requests_waiting{name}"] == 2
    assert values[f"proa_prefix_cache_queries_total{name}"] == 50
    assert values[f"proa_prefix_cache_hits_total{name}"] == 20
    assert values[f"proa_num_preemptions_total{name}"] == 1


def test_metrics_count_what_is_refused(client: Client, backend: FakeBackend) -> None:
    backend.error = QueueFullError("full", 1)
    client.chat()
    client.get("/some/secret/path")
    text = client.get("/metrics").text
    assert 'finished_reason="error"' in text
    assert 'status="503"' in text
    assert 'endpoint="other",model_name="smollm2",status="404"' in text
    assert "secret" not in text


def test_metrics_of_two_applications_are_apart(
    client: Client, backend: FakeBackend, tokenizer: Tokenizer
) -> None:
    client.chat()
    other = Client(create_app(backend, tokenizer, settings=ApiSettings(model_id="other")))
    assert "smollm2" not in other.get("/metrics").text


@pytest.mark.parametrize(
    ("given", "pattern"),
    [
        (None, r"req-[0-9a-f]{32}"),
        ("abc-1.2:3_X", r"abc-1\.2:3_X"),
        ("has space", r"req-[0-9a-f]{32}"),
        ("x" * 200, r"req-[0-9a-f]{32}"),
    ],
    ids=["none", "given", "unfit", "long"],
)
def test_request_id_is_given_back(client: Client, given: str | None, pattern: str) -> None:
    headers = {} if given is None else {"X-Request-Id": given}
    for path in ("/livez", "/nope"):
        response = client.get(path, headers=headers)
        assert re.fullmatch(pattern, response.headers["x-request-id"])
