import pytest
from fastapi import FastAPI

from serve.api import ApiSettings, create_app
from serve.api.access import is_loopback
from text.tokenizer import Tokenizer

from .conftest import Client, FakeBackend, check_error

KEY = "sk-correct-horse"
OPEN = ["/health", "/livez", "/readyz"]
CLOSED = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/smollm2"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("POST", "/v1/compare"),
    ("POST", "/v1/compare/cmp-0123456789abcdef0123456789abcdef/vote"),
    ("GET", "/v1/compare/votes"),
    ("GET", "/v1/adapters"),
    ("GET", "/v1/adapters/poet"),
    ("POST", "/v1/adapters"),
    ("DELETE", "/v1/adapters/poet"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
    ("GET", "/v1/decoding_strategies"),
    ("GET", "/metrics"),
    ("GET", "/version"),
    ("GET", "/openapi.json"),
    ("GET", "/nope"),
    ("GET", "//health"),
    ("GET", "/health/../metrics"),
    ("GET", "/health%2f..%2fmetrics"),
]


@pytest.fixture
def locked(backend: FakeBackend, tokenizer: Tokenizer) -> FastAPI:
    settings = ApiSettings(model_id="smollm2", api_keys=("sk-other", KEY))
    return create_app(backend, tokenizer, settings=settings)


WRONG_HEADERS = {
    "none": [],
    "wrong": [("Authorization", "Bearer sk-wrong")],
    "prefix": [("Authorization", f"Bearer {KEY[:-1]}")],
    "longer": [("Authorization", f"Bearer {KEY}x")],
    "empty": [("Authorization", "Bearer ")],
    "basic": [("Authorization", f"Basic {KEY}")],
    "bare": [("Authorization", KEY)],
    "twice": [("Authorization", f"Bearer {KEY}"), ("Authorization", f"Bearer {KEY}")],
    "not-ascii": [("Authorization", b"Bearer \xc3\xa9")],
    "original-url": [("X-Original-URL", "/health"), ("X-Rewrite-URL", "/health")],
}


@pytest.mark.parametrize("headers", WRONG_HEADERS.values(), ids=WRONG_HEADERS)
@pytest.mark.parametrize(("method", "path"), CLOSED)
def test_everything_needs_a_key(
    locked: FastAPI, method: str, path: str, headers: list[tuple[str, str]]
) -> None:
    response = Client(locked).request(method, f"http://localhost{path}", headers=headers)
    check_error(response, 401, code="invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"
    assert KEY not in response.text


@pytest.mark.parametrize("path", OPEN)
def test_health_needs_no_key(locked: FastAPI, path: str) -> None:
    assert Client(locked).get(path).status_code == 200


@pytest.mark.parametrize(
    "value", [f"Bearer {KEY}", f"bearer {KEY}", f"BEARER  {KEY}", "Bearer sk-other"]
)
def test_a_key_opens_everything(locked: FastAPI, value: str) -> None:
    client = Client(locked, headers={"Authorization": value}, client=("203.0.113.9", 1))
    for path in ("/v1/models", "/metrics", "/openapi.json"):
        assert client.get(path, headers={"Host": "api.example.org"}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/livez", "/metrics"])
@pytest.mark.parametrize("peer", ["203.0.113.9", "10.0.0.1", "::2", "name", "::ffff:10.0.0.1"])
def test_other_machines_are_refused_without_keys(app: FastAPI, path: str, peer: str) -> None:
    message = check_error(Client(app, client=(peer, 1)).get(path), 403, code="forbidden")
    assert "only loopback addresses" in message


@pytest.mark.parametrize("peer", [("127.0.0.1", 1), ("127.8.9.1", 1), ("::1", 1), None])
def test_this_machine_is_served_without_keys(app: FastAPI, peer: tuple[str, int] | None) -> None:
    assert Client(app, client=peer).get("/v1/models").status_code == 200


def test_mapped_address_counts_as_what_it_maps() -> None:
    assert is_loopback("::ffff:127.0.0.1")
    assert not is_loopback("::ffff:8.8.8.8")


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "127.0.0.1:80", "[::1]:8000", "[::1]"]
)
def test_local_host_names_are_served(client: Client, host: str) -> None:
    assert client.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "evil.example:8000",
        "localhost@evil.example",
        "evil@localhost",
        "localhost/a?b",
        "localhost:x",
        "",
        "[::1",
        "127.0.0.1.nip.io",
    ],
)
def test_other_host_names_are_refused_without_keys(client: Client, host: str) -> None:
    response = client.get("/v1/models", headers={"Host": host})
    assert "Host header" in check_error(response, 403, code="forbidden")


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://localhost.evil.com"])
def test_web_pages_of_others_are_refused_without_keys(client: Client, origin: str) -> None:
    response = client.post("/tokenize", {"content": "a"}, headers={"Origin": origin})
    assert "Origin header" in check_error(response, 403, code="forbidden")


def test_allowed_hosts_are_a_setting(backend: FakeBackend, tokenizer: Tokenizer) -> None:
    settings = ApiSettings(model_id="smollm2", allowed_hosts=("proa.internal",))
    client = Client(create_app(backend, tokenizer, settings=settings))
    assert client.get("/livez", headers={"Host": "proa.internal:8000"}).status_code == 200
    check_error(client.get("/livez"), 403)


@pytest.mark.parametrize("origin", ["http://localhost:8000", "http://127.0.0.1:8000"])
def test_pages_of_the_servers_own_port_are_served_without_keys(client: Client, origin: str) -> None:
    headers = {"Origin": origin, "Host": "localhost:8000"}
    assert client.post("/tokenize", {"content": "a"}, headers=headers).status_code == 200


@pytest.mark.parametrize("origin", ["http://localhost:3000", "http://localhost", "null"])
def test_pages_of_other_ports_are_refused_without_keys(client: Client, origin: str) -> None:
    headers = {"Origin": origin, "Host": "localhost:8000"}
    response = client.post("/tokenize", {"content": "a"}, headers=headers)
    assert "port" in check_error(response, 403, code="forbidden")


def test_bad_origin_setting_is_refused() -> None:
    with pytest.raises(ValueError, match=r"allowed_origins: '\*' is not like https://"):
        ApiSettings(model_id="m", allowed_origins=("*",))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"model_id": ""}, "model_id must not be empty"),
        ({"unknown_fields": "drop"}, "unknown_fields must be 'refuse' or 'ignore', got 'drop'"),
        ({"api_keys": ("",)}, "api_keys must be non-empty"),
        ({"api_keys": ("\u00e9",)}, "api_keys must be non-empty ASCII"),
        ({"admin_keys": ("",)}, "admin_keys must be non-empty"),
        ({"api_keys": ("k",), "admin_keys": ("k",)}, "admin_keys must differ from api_keys"),
        ({"max_body_bytes": 0}, "max_body_bytes must be above 0, got 0"),
        ({"ping_interval_s": -1}, "ping_interval_s must be above 0, got -1"),
    ],
)
def test_bad_settings_are_refused(fields: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ApiSettings(**{"model_id": "m", **fields})
