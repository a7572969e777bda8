"""An asynchronous client of the HTTP API."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from client.address import parse_address
from client.answers import DONE, EventParser, encode_body, parse_chunk, parse_error, parse_json
from client.errors import RequestError

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 30.0
# A stream has comments while its request waits; the server sends one every some seconds.
SILENCE_TIMEOUT_S = 120.0
# Servers close idle connections after some seconds; a request must not meet one that closes.
_KEEP_IDLE_S = 2.0


class ApiClient:
    """Talks to one server, for any number of users.

    Args:
        url: address of the server, with or without the ending /v1.
        transport: in place of the network.
        trust_env: whether to use the proxy that the process environment names.
        answer_timeout_s: longest wait for a whole answer that is no stream.
        silence_timeout_s: longest time in which a stream may say nothing at all.

    Raises:
        ValueError: it is not an address.
    """

    def __init__(
        self,
        url: str,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        trust_env: bool = False,
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
        silence_timeout_s: float = SILENCE_TIMEOUT_S,
    ) -> None:
        self.url = parse_address(url)
        self.silence_timeout_s = silence_timeout_s
        self._answer_timeout_s = answer_timeout_s
        self._http = httpx.AsyncClient(
            base_url=self.url, transport=transport, trust_env=trust_env,
            timeout=httpx.Timeout(silence_timeout_s, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(keepalive_expiry=_KEEP_IDLE_S),
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
        return parse_json((await self._send(method, path, key, body)).content)

    async def entries(self, path: str, *, key: str = "") -> list[dict[str, Any]]:
        """Return the entries of a list, such as /v1/models.

        Raises:
            RequestError: as `request`, or it is no list.
        """
        answer = await self.request("GET", path, key=key)
        found = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
            raise RequestError(f"the server does not speak this API: {path} is no list")
        return found

    async def text(self, path: str, *, key: str = "") -> str:
        """Return the answer to a GET as text.

        Raises:
            RequestError: as `request`.
        """
        return (await self._send("GET", path, key, None)).text

    async def stream(
        self, path: str, body: dict[str, Any], *, key: str = ""
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the chunks of a streamed answer.

        Closing the generator closes the connection, which makes the server stop the work.

        Args:
            path: where to post.
            body: sent as JSON; asks for a stream, where the endpoint does not always answer so.
            key: sent as a bearer token unless empty.

        Raises:
            RequestError: no connection, a refusal, or an error inside the stream.
        """
        parser = EventParser()
        with self._translated():
            request = self._http.stream("POST", path, **_contents(key, body))
            async with request as response:
                if not response.is_success:
                    await response.aread()
                    raise _to_error(response)
                async for piece in response.aiter_bytes():
                    for data in parser.feed(piece):
                        if data == DONE:
                            return
                        yield parse_chunk(data)
        raise RequestError("the server ended the answer before it was complete")

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _send(
        self, method: str, path: str, key: str, body: dict[str, Any] | None
    ) -> httpx.Response:
        with self._translated():
            # The library's time-outs are for each piece: a server that dribbles would meet them.
            async with asyncio.timeout(self._answer_timeout_s):
                response = await self._http.request(method, path, **_contents(key, body))
        if not response.is_success:
            raise _to_error(response)
        return response

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Say what happened in our words; the library's may quote a header."""
        try:
            yield
        except httpx.ConnectError as error:
            raise unreachable(self.url, error) from None
        except (httpx.TimeoutException, TimeoutError):
            raise RequestError(f"the server at {self.url} does not answer in time") from None
        except httpx.HTTPError:
            raise RequestError(
                f"the connection to {self.url} broke; the server may have stopped or restarted"
            ) from None


def unreachable(url: str, error: Exception) -> RequestError:
    """Return the error for a server that is not there, or whose certificate is not trusted."""
    reason = f" ({error})" if "SSL" in str(error) else ""
    return RequestError(
        f"no server answers at {url}{reason}; start one with 'proa serve' or give another address"
    )


def make_headers(key: str) -> dict[str, str]:
    """Return the headers of a request with JSON in it.

    What no header can hold becomes "?" in the key, which opens nothing then.
    """
    text = "".join(c if " " < c < "\x7f" else "?" for c in key.strip())
    headers = {"Content-Type": "application/json"}
    return headers | ({"Authorization": f"Bearer {text}"} if text else {})


def _contents(key: str, body: dict[str, Any] | None) -> dict[str, Any]:
    content = None if body is None else encode_body(body)
    return {"headers": make_headers(key), "content": content}


def _to_error(response: httpx.Response) -> RequestError:
    return parse_error(response.content, response.status_code, response.reason_phrase)
