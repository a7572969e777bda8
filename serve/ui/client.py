"""An asynchronous client of the HTTP API."""

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from serve.ui.protocol import DONE, error_message, event_data, parse_chunk

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 30.0


class RequestError(Exception):
    """The server refused a request or could not finish it; the message is for people.

    Attributes:
        status: of the response; None where there was none.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class ApiClient:
    """Talks to one server, for all sessions of the interface.

    Args:
        url: address of the server, with or without the ending /v1.
        transport: in place of the network.

    Raises:
        ValueError: it is not an address.
    """

    def __init__(self, url: str, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        address = url if "://" in url else f"http://{url}"
        self.url = address.rstrip("/").removesuffix("/v1")
        try:
            parts = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise ValueError(f"{url!r} is not an address: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.host:
            raise ValueError(f"{url!r} is not an address such as http://127.0.0.1:8000")
        # Between two tokens there is no limit: a busy server may let a request wait.
        self._http = httpx.AsyncClient(
            base_url=self.url, transport=transport, trust_env=False,
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
        )  # fmt: skip

    async def request(
        self, method: str, path: str, *, key: str = "", body: dict[str, Any] | None = None
    ) -> Any:
        """Return the JSON answer of a request.

        Args:
            method, path: of the request.
            key: sent as a bearer token unless empty.
            body: sent as JSON.

        Raises:
            RequestError: no connection, no answer in time, or a refusal.
        """
        return self._parsed(await self._send(method, path, key, body))

    async def text(self, path: str, *, key: str = "") -> str:
        """Return the answer to a GET as text.

        Raises:
            RequestError: as `request`.
        """
        return (await self._send("GET", path, key, None)).text

    async def stream(
        self, path: str, body: dict[str, Any], *, key: str = ""
    ) -> AsyncIterator[dict[str, Any]]:
        """Yield the chunks of a streamed answer.

        Closing the iterator closes the connection, which makes the server stop the work.

        Raises:
            RequestError: no connection, a refusal, or an error inside the stream.
        """
        with self._translated():
            async with self._http.stream(
                "POST", path, json=body, headers=_headers(key)
            ) as response:
                if response.status_code != 200:
                    await response.aread()
                    self._parsed(response)
                async for line in response.aiter_lines():
                    data = event_data(line)
                    if data == DONE:
                        return
                    if data is not None:
                        yield self._chunk(data)
            raise RequestError("The server ended the answer before it was complete.")

    async def _send(
        self, method: str, path: str, key: str, body: dict[str, Any] | None
    ) -> httpx.Response:
        with self._translated():
            response = await self._http.request(
                method, path, json=body, headers=_headers(key), timeout=ANSWER_TIMEOUT_S
            )
        if response.status_code != 200:
            self._parsed(response)
        return response

    def _parsed(self, response: httpx.Response) -> Any:
        try:
            parsed = response.json()
        except json.JSONDecodeError:
            parsed = None
        if response.status_code == 200 and parsed is not None:
            return parsed
        message = error_message(parsed, response.reason_phrase or "no answer of this API")
        raise RequestError(message, response.status_code)

    def _chunk(self, data: str) -> dict[str, Any]:
        try:
            return parse_chunk(data)
        except ValueError as error:
            raise RequestError(str(error)) from None

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError:
            raise RequestError(f"No server answers at {self.url}. Is it running?") from None
        except httpx.TimeoutException:
            raise RequestError(f"The server at {self.url} does not answer in time.") from None
        except httpx.HTTPError:
            raise RequestError(
                f"The connection to {self.url} broke. The server may have stopped or restarted."
            ) from None


def _headers(key: str) -> dict[str, str]:
    # A key that is no ASCII opens nothing; httpx would raise.
    text = key.strip().encode("ascii", "replace").decode()
    return {"Authorization": f"Bearer {text}"} if text else {}
