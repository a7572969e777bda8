"""A backend that is full, stopped or broken."""

import json

import pytest

from serve.backends.protocol import BackendUnavailableError, QueueFullError

from .conftest import Client, FakeBackend, check_error


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
def test_full_queue_is_unavailable_with_retry_after(
    client: Client, backend: FakeBackend, is_streamed: bool
) -> None:
    backend.error = QueueFullError("full", 7)
    for response in (client.chat(stream=is_streamed), client.complete(stream=is_streamed)):
        check_error(response, 503, code="queue_full")
        assert response.headers["retry-after"] == "7"


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
def test_stopped_backend_is_unavailable(
    client: Client, backend: FakeBackend, is_streamed: bool
) -> None:
    backend.error = BackendUnavailableError("draining")
    check_error(client.chat(stream=is_streamed), 503, code="unavailable")
    check_error(client.complete(prompt=["a", "b"], stream=is_streamed), 503, code="unavailable")


FAILURES = {
    "exception": (RuntimeError("secret /etc/path"), "error", 500),
    "os-error": (OSError("secret /etc/path"), "error", 500),
    "sequence-error": (None, "error", 500),
    "sequence-abort": (None, "abort", 503),
}


@pytest.mark.parametrize(("error", "reason", "status"), FAILURES.values(), ids=FAILURES)
def test_failure_inside_a_request_is_an_error_for_it_alone(
    client: Client,
    backend: FakeBackend,
    caplog: pytest.LogCaptureFixture,
    error: Exception | None,
    reason: str,
    status: int,
) -> None:
    backend.failure, backend.failure_error, backend.failure_reason = 1, error, reason
    for response in (client.chat(), client.complete(prompt=["a", "b"])):
        check_error(response, status)
    assert "secret" not in caplog.text
    assert backend.num_open == 0
    backend.failure = None
    assert client.chat().status_code == 200


@pytest.mark.parametrize(("error", "reason", "status"), FAILURES.values(), ids=FAILURES)
def test_failure_inside_a_stream_is_its_last_event(
    client: Client, backend: FakeBackend, error: Exception | None, reason: str, status: int
) -> None:
    backend.failure, backend.failure_error, backend.failure_reason = 1, error, reason
    response = client.chat(stream=True)
    assert response.status_code == 200
    events = response.text.split("\n\n")
    assert events[-1] == ""
    assert "[DONE]" not in response.text
    last = json.loads(events[-2].removeprefix("data: "))
    assert set(last) == {"error"}
    assert set(last["error"]) == {"message", "type", "param", "code"}
    kinds = {500: "server_error", 503: "service_unavailable_error"}
    assert last["error"]["type"] == kinds[status]
    assert '"finish_reason":"' not in response.text
    assert "secret" not in response.text
