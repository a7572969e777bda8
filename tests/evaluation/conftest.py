"""A server of the API that answers from a function, without a network."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from client.api import ApiClient
from evaluation.server import Servers

Body = dict[str, Any]


class FakeServer:
    """Answers requests as `answer` says.

    Attributes:
        models: ids that /v1/models lists.
        most_arms: of a comparison; None: it offers none.
        bodies: of the requests so far, with their path under "path".
        keys: Authorization headers received.
        failures: (status, message) to answer the next requests with; a status of 0 breaks the
            connection.
    """

    def __init__(self, answer: Callable[[Body], Body]) -> None:
        self.answer = answer
        self.models = ["base"]
        self.most_arms: int | None = None
        self.bodies: list[Body] = []
        self.keys: list[str | None] = []
        self.failures: list[tuple[int, str]] = []

    def _handle(self, request: httpx.Request) -> httpx.Response:
        self.keys.append(request.headers.get("Authorization"))
        if request.url.path == "/openapi.json" and self.most_arms:
            arms = {"type": "array", "maxItems": self.most_arms}
            schemas = {"CompareBody": {"properties": {"arms": arms}}}
            return httpx.Response(200, json={"components": {"schemas": schemas}})
        if request.method == "GET":
            return httpx.Response(200, json={"data": [{"id": name} for name in self.models]})
        body = {"path": request.url.path, **json.loads(request.content)}
        self.bodies.append(body)
        if self.failures:
            status, message = self.failures.pop(0)
            if status == 0:
                raise httpx.ConnectError("gone", request=request)
            return httpx.Response(status, json={"error": {"message": message}})
        return httpx.Response(200, json=self.answer(body))

    def connect(self, url: str) -> ApiClient:
        """Return a client of this server."""
        return ApiClient(url, transport=httpx.MockTransport(self._handle))

    def servers(self, *, patience_s: float = 1.0) -> Servers:
        """Return the servers of a run: this one at every address."""
        return Servers(patience_s=patience_s, make_client=self.connect)


@pytest.fixture
def make_server() -> Callable[[Callable[[Body], Body]], FakeServer]:
    return FakeServer


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries come at once."""
    monkeypatch.setattr("evaluation.server._FIRST_PAUSE_S", 0.001)
