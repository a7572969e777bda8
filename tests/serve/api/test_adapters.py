"""/v1/adapters: who may change what is attached, and what is refused."""

from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from serve.api import ApiSettings, create_app
from serve.backends.protocol import AdapterLoadError
from text.tokenizer import Tokenizer

from .conftest import Client, FakeBackend, check_error, make_adapter

API_KEY = "sk-client"
ADMIN_KEY = "sk-admin-horse"
BODY = {"name": "poet", "path": "good"}
ALIAS = {"lora_name": "poet", "lora_path": "good"}
ADMIN_ROUTES = [
    ("POST", "/v1/adapters", BODY),
    ("DELETE", "/v1/adapters/here", None),
    ("POST", "/v1/load_lora_adapter", ALIAS),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "here"}),
]


def make_app(backend: FakeBackend, tokenizer: Tokenizer, **fields: Any) -> FastAPI:
    settings = ApiSettings(model_id="smollm2", **{"adapter_root": "/srv/adapters", **fields})
    return create_app(backend, tokenizer, settings=settings)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def admin(backend: FakeBackend, tokenizer: Tokenizer) -> Client:
    """A client with the admin key of a server without API keys."""
    backend.attached["here"] = make_adapter("here")
    app = make_app(backend, tokenizer, admin_keys=("sk-other-admin", ADMIN_KEY))
    return Client(app, headers=bearer(ADMIN_KEY))


# What is sent: its status on a server with an API key and an admin key, and with an admin key only.
CREDENTIALS: dict[str, tuple[list[Any], int, int]] = {
    "none": ([], 401, 401),
    "api-key": ([("Authorization", f"Bearer {API_KEY}")], 403, 401),
    "admin-key": ([("Authorization", f"Bearer {ADMIN_KEY}")], 200, 200),
    "second-admin-key": ([("Authorization", "bearer sk-second")], 200, 200),
    "prefix": ([("Authorization", f"Bearer {ADMIN_KEY[:-1]}")], 401, 401),
    "longer": ([("Authorization", f"Bearer {ADMIN_KEY}x")], 401, 401),
    "empty": ([("Authorization", "Bearer ")], 401, 401),
    "basic": ([("Authorization", f"Basic {ADMIN_KEY}")], 401, 401),
    "bare": ([("Authorization", ADMIN_KEY)], 401, 401),
    "twice": ([("Authorization", f"Bearer {ADMIN_KEY}")] * 2, 401, 401),
    "both": (
        [("Authorization", f"Bearer {API_KEY}"), ("Authorization", f"Bearer {ADMIN_KEY}")],
        401,
        401,
    ),
    "not-ascii": ([("Authorization", b"Bearer \xc3\xa9")], 401, 401),
}


@pytest.mark.parametrize("has_api_keys", [True, False], ids=["api-keys", "no-api-keys"])
@pytest.mark.parametrize(("headers", "with_keys", "without"), CREDENTIALS.values(), ids=CREDENTIALS)
@pytest.mark.parametrize(("method", "path", "body"), ADMIN_ROUTES)
def test_only_the_admin_key_changes_adapters(
    backend: FakeBackend,
    tokenizer: Tokenizer,
    method: str,
    path: str,
    body: Any,
    headers: list[Any],
    with_keys: int,
    without: int,
    has_api_keys: bool,
) -> None:
    backend.attached["here"] = make_adapter("here")
    app = make_app(
        backend,
        tokenizer,
        api_keys=(API_KEY,) if has_api_keys else (),
        admin_keys=(ADMIN_KEY, "sk-second"),
    )
    response = Client(app).request(method, path, json=body, headers=headers)
    status = with_keys if has_api_keys else without
    assert response.status_code == status
    assert (list(backend.attached) == ["here"]) == (status != 200)
    if status != 200:
        check_error(response, status, code="forbidden" if status == 403 else "invalid_api_key")
        assert (response.headers.get("www-authenticate") == "Bearer") == (status == 401)
    assert "sk-" not in response.text


@pytest.mark.parametrize("keys", [(), (API_KEY,)], ids=["no-keys", "api-keys"])
@pytest.mark.parametrize(("method", "path", "body"), ADMIN_ROUTES)
def test_without_an_admin_key_nobody_changes_adapters(
    backend: FakeBackend,
    tokenizer: Tokenizer,
    method: str,
    path: str,
    body: Any,
    keys: tuple[str, ...],
) -> None:
    client = Client(make_app(backend, tokenizer, api_keys=keys), headers=bearer(API_KEY))
    message = check_error(client.request(method, path, json=body), 403, code="forbidden")
    assert "--admin-key" in message
    assert "PROA_ADMIN_KEY" in message


def test_admin_key_opens_everything_else(backend: FakeBackend, tokenizer: Tokenizer) -> None:
    app = make_app(backend, tokenizer, api_keys=(API_KEY,), admin_keys=(ADMIN_KEY,))
    client = Client(app, headers=bearer(ADMIN_KEY), client=("203.0.113.9", 1))
    for path in ("/v1/models", "/v1/adapters", "/metrics", "/openapi.json"):
        assert client.get(path).status_code == 200


def test_admin_key_does_not_open_a_loopback_server_to_others(
    backend: FakeBackend, tokenizer: Tokenizer
) -> None:
    app = make_app(backend, tokenizer, admin_keys=(ADMIN_KEY,))
    client = Client(app, headers=bearer(ADMIN_KEY), client=("203.0.113.9", 1))
    message = check_error(client.post("/v1/adapters", BODY), 403, code="forbidden")
    assert "only loopback" in message
    evil = {"Origin": "http://evil.example"}
    client = Client(app, headers=bearer(ADMIN_KEY))
    check_error(client.post("/v1/adapters", BODY, headers=evil), 403, code="forbidden")


def test_key_of_another_kind_does_not_matter_where_none_is_needed(
    backend: FakeBackend, tokenizer: Tokenizer
) -> None:
    app = make_app(backend, tokenizer, admin_keys=(ADMIN_KEY,))
    assert Client(app, headers=bearer("none")).chat().status_code == 200


def test_adapter_lives_from_attaching_to_detaching(admin: Client, backend: FakeBackend) -> None:
    assert admin.post("/v1/adapters", BODY).json() == {
        "id": "smollm2:poet",
        "object": "adapter",
        "name": "poet",
        "method": "qst",
        "kind": "side_network",
        "description": "a test",
        "num_parameters": 10,
        "num_bytes": 40,
        "on": None,
        "labels": None,
        "removed": None,
        "speed": None,
        "is_loaded": True,
        "num_running": 0,
        "created": 1_700_000_000,
    }
    data = admin.get("/v1/adapters").json()["data"]
    assert [entry["name"] for entry in data] == ["here", "poet"]
    assert admin.get("/v1/adapters/poet").json() == data[1]
    assert admin.chat(model="smollm2:poet").status_code == 200
    gone = admin.request("DELETE", "/v1/adapters/poet")
    assert gone.json() == {"id": "smollm2:poet", "object": "adapter", "deleted": True}
    check_error(admin.chat(model="smollm2:poet"), 404, param="model", code="model_not_found")
    check_error(admin.get("/v1/adapters/poet"), 404, code="adapter_not_found")


def test_names_of_vllm_do_the_same(admin: Client, backend: FakeBackend) -> None:
    assert admin.post("/v1/load_lora_adapter", ALIAS).text.startswith("Success")
    assert set(backend.attached) == {"here", "poet"}
    response = admin.post("/v1/unload_lora_adapter", {"lora_name": "poet"})
    assert response.text.startswith("Success")
    assert set(backend.attached) == {"here"}
    message = check_error(
        admin.post("/v1/load_lora_adapter", {"lora_name": "x"}), 400, param="lora_path"
    )
    assert "lora_path is required" in message


def test_without_a_root_nothing_is_attached(backend: FakeBackend, tokenizer: Tokenizer) -> None:
    app = make_app(backend, tokenizer, admin_keys=(ADMIN_KEY,), adapter_root=None)
    client = Client(app, headers=bearer(ADMIN_KEY))
    for path, body in (("/v1/adapters", BODY), ("/v1/load_lora_adapter", ALIAS)):
        assert "--adapter-root" in check_error(client.post(path, body), 403, code="forbidden")


def test_detaching_twice_is_not_found(admin: Client) -> None:
    assert admin.request("DELETE", "/v1/adapters/here").status_code == 200
    for _ in range(2):
        check_error(admin.request("DELETE", "/v1/adapters/here"), 404, code="adapter_not_found")


def test_adapter_in_use_is_not_detached(admin: Client, backend: FakeBackend) -> None:
    backend.attached["here"] = make_adapter("here", num_running=1)
    response = admin.request("DELETE", "/v1/adapters/here")
    assert "in use" in check_error(response, 409, code="adapter_conflict")
    assert "here" in backend.attached


def test_taken_name_is_a_conflict(admin: Client) -> None:
    response = admin.post("/v1/adapters", {"name": "here", "path": "good"})
    assert "attached already" in check_error(response, 409, code="adapter_conflict")


def test_draining_server_attaches_nothing(admin: Client, backend: FakeBackend) -> None:
    backend.is_draining = True
    check_error(admin.post("/v1/adapters", BODY), 503, code="unavailable")
    assert set(backend.attached) == {"here"}


BODIES: dict[str, tuple[Any, str | None]] = {
    "no-name": ({"path": "good"}, "name"),
    "no-path": ({"name": "poet"}, "path"),
    "null": ({"name": None, "path": "good"}, "name"),
    "number": ({"name": 5, "path": "good"}, "name"),
    "list": ({"name": "poet", "path": ["good"]}, "path"),
    "unknown": ({**BODY, "force": True}, "force"),
}


@pytest.mark.parametrize(("body", "param"), BODIES.values(), ids=BODIES)
def test_body_of_the_wrong_shape_is_refused(admin: Client, body: Any, param: str) -> None:
    check_error(admin.post("/v1/adapters", body), 400, param=param)


def test_refusal_of_the_backend_is_told_and_not_logged(
    admin: Client, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    async def attach(name: str, path: str) -> Any:
        raise AdapterLoadError("adapter 'a': x/y: alpha: missing")

    backend.attach_adapter = attach  # type: ignore[method-assign]
    response = admin.post("/v1/adapters", {"name": "a", "path": "x/y"})
    message = check_error(response, 400, code="invalid_adapter")
    assert message == "adapter 'a': x/y: alpha: missing"
    assert "x/y" not in caplog.text


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
def test_adapter_that_cannot_come_back_is_unavailable(
    admin: Client, backend: FakeBackend, is_streamed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    backend.error = AdapterLoadError("adapter 'here': here/there has changed")
    response = admin.chat(model="smollm2:here", stream=is_streamed)
    message = check_error(response, 503, code="adapter_unavailable")
    assert message == "An adapter cannot be loaded any more: adapter 'here': here/there has changed"
    assert caplog.text == ""


def test_adapter_that_is_detached_meanwhile_is_not_found(
    admin: Client, backend: FakeBackend
) -> None:
    infos = backend.adapters()
    backend.adapters = lambda: infos  # type: ignore[method-assign]
    backend.attached.clear()
    check_error(admin.chat(model="smollm2:here"), 404, code="adapter_not_found")


def test_keys_and_paths_are_not_logged(admin: Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(0)
    admin.post("/v1/adapters", {"name": "poet", "path": "secret-folder"})
    admin.post("/v1/adapters", BODY)
    admin.request("DELETE", "/v1/adapters/poet")
    assert ADMIN_KEY not in caplog.text
    assert "secret-folder" not in caplog.text


def metric_lines(response: httpx.Response, stem: str) -> list[str]:
    return [line for line in response.text.splitlines() if line.startswith(f"proa_{stem}")]


def test_variant_is_described_with_what_it_is_worth(admin: Client, backend: FakeBackend) -> None:
    backend.attached["small"] = make_adapter("small", kind="variant", removed=0.4, speed=1.25)
    backend.attached["healed"] = make_adapter("healed", on="small")
    entry = admin.get("/v1/adapters/small").json()
    assert (entry["kind"], entry["on"]) == ("variant", None)
    assert (entry["removed"], entry["speed"]) == (0.4, 1.25)
    entry = admin.get("/v1/adapters/healed").json()
    assert (entry["on"], entry["removed"], entry["speed"]) == ("small", None, None)


def test_memory_of_variants_is_counted_apart(admin: Client, backend: FakeBackend) -> None:
    backend.attached["small"] = make_adapter("small", kind="variant", num_bytes=1000)
    metrics = admin.get("/metrics")
    for name, value in (("adapter", "40.0"), ("variant", "1000.0")):
        (line,) = metric_lines(metrics, f"{name}_memory_bytes{{")
        assert line.endswith(f" {value}")
    assert admin.chat(model="smollm2:small").status_code == 200
    counted = metric_lines(admin.get("/metrics"), 'adapter_tokens_total{adapter="small"')
    assert counted == ['proa_adapter_tokens_total{adapter="small",model_name="smollm2"} 3.0']


def test_metrics_count_adapters_and_their_tokens(admin: Client, backend: FakeBackend) -> None:
    backend.attached["cold"] = make_adapter("cold", is_loaded=False)
    assert admin.chat(model="smollm2:here", n=2).status_code == 200
    assert admin.chat().status_code == 200
    metrics = admin.get("/metrics")
    label = '{model_name="smollm2"}'
    assert metric_lines(metrics, "adapters_attached{") == [f"proa_adapters_attached{label} 2.0"]
    assert metric_lines(metrics, "adapters_loaded{") == [f"proa_adapters_loaded{label} 1.0"]
    assert metric_lines(metrics, "adapter_memory_bytes{") == [
        f"proa_adapter_memory_bytes{label} 40.0"
    ]
    assert metric_lines(metrics, "adapter_tokens_total") == [
        'proa_adapter_tokens_total{adapter="cold",model_name="smollm2"} 0.0',
        'proa_adapter_tokens_total{adapter="here",model_name="smollm2"} 6.0',
    ]
    assert metric_lines(metrics, "side_kv_cache_usage_perc{")
    admin.request("DELETE", "/v1/adapters/here")
    assert not [line for line in admin.get("/metrics").text.splitlines() if "here" in line]
