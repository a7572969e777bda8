"""The client for code without an event loop."""

import asyncio
from collections.abc import Generator
from contextlib import suppress
from typing import Any

from client.api import ApiClient


class BlockingClient:
    """Talks to one server, one request at a time. Ctrl-C ends what is running, on the server too.

    Args:
        client: what it waits for.
        key: sent as a bearer token unless empty.
    """

    def __init__(self, client: ApiClient, *, key: str = "") -> None:
        self.url = client.url
        self._client = client
        self._key = key
        self._runner = asyncio.Runner()

    def entries(self, path: str) -> list[dict[str, Any]]:
        """Return the entries of a list, such as /v1/models.

        Raises:
            RequestError: no connection, no answer in time, a refusal, or it is no list.
        """
        return self._runner.run(self._client.entries(path, key=self._key))

    def text(self, path: str) -> str:
        """Return the answer to a GET as text.

        Raises:
            RequestError: no connection, no answer in time, or a refusal.
        """
        return self._runner.run(self._client.text(path, key=self._key))

    def stream(self, path: str, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """Yield the chunks of a streamed answer; closing the generator closes the connection.

        Raises:
            RequestError: no connection, a refusal, or an error inside the stream.
        """
        chunks = self._client.stream(path, body, key=self._key)

        async def take() -> dict[str, Any] | None:
            return await anext(chunks, None)

        try:
            while (chunk := self._runner.run(take())) is not None:
                yield chunk
        except KeyboardInterrupt:
            # Where it came as a call ended, that call's end still stops the loop, at its next run.
            with suppress(RuntimeError):
                self._runner.run(asyncio.sleep(0))
            raise
        finally:
            self._runner.run(chunks.aclose())

    def close(self) -> None:
        """Close the connections."""
        self._runner.run(self._client.close())
        self._runner.close()
