"""A small client of the HTTP API for the terminal."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from serve.cli.arguments import CommandError
from serve.ui.protocol import DONE, error_message, event_data, parse_chunk

CONNECT_TIMEOUT_S = 5.0


class RequestError(CommandError):
    """The server refused a request or could not finish it."""


class Client:
    """Talks to one server.

    Args:
        url: address of the server, with or without the ending /v1.
        api_key: sent as a bearer token, or None.
    """

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        address = url if "://" in url else f"http://{url}"
        self.url = address.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # Between two tokens there is no limit: a busy server may let a request wait.
        timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
        try:
            self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout)
        except (httpx.InvalidURL, UnicodeEncodeError) as error:
            raise CommandError(f"cannot use {url!r} as an address: {error}") from None

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def get(self, path: str) -> Any:
        """Return the JSON answer to a GET.

        Raises:
            RequestError: no connection, or a status other than 200.
        """
        with self._translated():
            response = self._http.get(path)
            return self._checked(response)

    def models(self) -> list[str]:
        """Return the ids of the served models, the plain base model first."""
        ids = [str(entry["id"]) for entry in self.get("/v1/models")["data"]]
        return sorted(ids, key=lambda name: ("@" in name) + (":" in name))

    def stream_chat(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the chunks of a streamed chat completion.

        Closing the iterator closes the connection, which makes the server stop the work.

        Raises:
            RequestError: no connection, a refusal, or an error inside the stream.
        """
        with (
            self._translated(),
            self._http.stream("POST", "/v1/chat/completions", json=body) as response,
        ):
            if response.status_code != 200:
                response.read()
                self._checked(response)
            is_whole = False
            for line in response.iter_lines():
                data = event_data(line)
                if data == DONE:
                    is_whole = True
                    break
                if data is not None:
                    yield _chunk(data)
            if not is_whole:
                raise RequestError("the server ended the answer before it was complete")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError:
            raise RequestError(
                f"no server answers at {self.url}; start one with 'proa serve' or give --url"
            ) from None
        except (httpx.UnsupportedProtocol, httpx.InvalidURL):
            raise RequestError(
                f"{self.url!r} is not an address such as http://127.0.0.1:8000"
            ) from None
        except httpx.TimeoutException:
            raise RequestError(f"the server at {self.url} does not answer in time") from None
        except httpx.HTTPError as error:
            raise RequestError(f"the connection to {self.url} broke: {error}") from None
        except json.JSONDecodeError:
            raise RequestError(f"the server at {self.url} does not speak this API") from None

    def _checked(self, response: httpx.Response) -> Any:
        if response.status_code == 200:
            return response.json()
        try:
            message = error_message(response.json(), response.reason_phrase)
        except json.JSONDecodeError:
            message = response.reason_phrase
        if response.status_code == 401:
            message += " (give --api-key or set PROA_API_KEY)"
        raise RequestError(f"{message} [status {response.status_code}]")


def _chunk(data: str) -> dict[str, Any]:
    try:
        return parse_chunk(data)
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        raise RequestError(str(error)) from None
