"""A server under evaluation: it is asked until it answers, and asked much at once."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from client.api import ApiClient
from client.errors import RequestError
from evaluation.errors import RunError

DEFAULT_URL = "http://127.0.0.1:8000"
ANSWER_TIMEOUT_S = 1800.0
"""Longest wait for one answer: a request may wait for many others."""

PATIENCE_S = 120.0
"""How long a server may be gone before the run stops."""

CONCURRENCY = 64
"""Requests under way at once: more than a server runs, so that none of its places is idle."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 15.0
# Attempts that took long before they failed.
_MAX_SLOW = 3
# No connection, or a state that passes.
_PASSING = {None, 408, 425, 429, 500, 502, 503, 504}

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """What is evaluated: a model of a server, with the fields that it is asked with.

    Attributes:
        label: what reports call it.
        model: model id.
        fields: sampling fields of the requests, such as temperature and decoding.
        url: of the server.
        key: of the server, or empty. It is kept in no file.
        salt: makes its seeds other ones than those of the other arms, unless empty.
    """

    label: str
    model: str
    fields: dict[str, Any] = field(default_factory=dict)
    url: str = DEFAULT_URL
    key: str = field(default="", repr=False)
    salt: str = ""

    def describe(self) -> dict[str, Any]:
        """Return what is kept of it."""
        return {"label": self.label, "model": self.model, "fields": self.fields, "url": self.url}


class Servers:
    """The servers of a run.

    Args:
        patience_s: how long one may be gone.
        make_client: gives the client of an address.
    """

    def __init__(
        self,
        *,
        patience_s: float = PATIENCE_S,
        make_client: Callable[[str], ApiClient] | None = None,
    ) -> None:
        self._patience_s = patience_s
        self._make = make_client or _connect
        self._clients: dict[str, ApiClient] = {}
        self._most_arms: dict[str, int] = {}
        self._jitter = random.Random()

    def client(self, url: str) -> ApiClient:
        """Return the client of an address."""
        if url not in self._clients:
            self._clients[url] = self._make(url)
        return self._clients[url]

    async def check(self, arms: Sequence[Arm]) -> None:
        """Check that the servers are there and know the models.

        Raises:
            RunError: one is not there, or does not know a model; the message lists those it knows.
        """
        for url in dict.fromkeys(arm.url for arm in arms):
            asked = [arm for arm in arms if arm.url == url]
            entries = await self.retry(partial(self._list, asked[0]))
            known = [str(entry.get("id")) for entry in entries]
            for arm in asked:
                if arm.model not in known:
                    raise RunError(
                        f"arm {arm.label!r}: the server at {url} has no model {arm.model!r}; it "
                        f"has {', '.join(sorted(known))}"
                    )

    async def _list(self, arm: Arm) -> list[dict[str, Any]]:
        return await self.client(arm.url).entries("/v1/models", key=arm.key)

    async def ask(self, arm: Arm, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a request of an arm.

        Args:
            arm: whose model and fields are added.
            path: of the endpoint.
            body: the other fields.

        Raises:
            RunError: the server refuses it, or was gone for too long.
        """
        whole = {"model": arm.model, **body, **arm.fields}
        answer = await self.retry(
            lambda: self.client(arm.url).request("POST", path, key=arm.key, body=whole)
        )
        if not isinstance(answer, dict):
            raise RunError(f"the server at {arm.url} does not speak this API: {path}")
        return answer

    async def ask_each(
        self, arms: Sequence[Arm], path: str, body: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """Return the answers of several arms to one request, in their order.

        Arms of one server that offers /v1/compare are asked in one request, or in as few as it
        takes: it computes the prompt once for all that share a base, and they draw the same random
        numbers.

        Args:
            arms: whose models and fields are added.
            path: /v1/completions or /v1/chat/completions.
            body: the other fields, with a seed.

        Raises:
            RunError: a server refuses it, or was gone for too long.
        """
        first = arms[0]
        together = len(arms) > 1 and all((a.url, a.key) == (first.url, first.key) for a in arms)
        most = await self._most_compared(first) if together else 0
        if not most:
            return list(await asyncio.gather(*(self.ask(arm, path, body) for arm in arms)))
        parts = [arms[start : start + most] for start in range(0, len(arms), most)]
        answers = await asyncio.gather(*(self._compare(part, body) for part in parts))
        return [answer for part in answers for answer in part]

    async def _compare(self, arms: Sequence[Arm], body: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the answers of arms of one server to one comparison."""
        first = arms[0]
        entries = [{"label": arm.label, "model": arm.model, **arm.fields} for arm in arms]
        answer = await self.retry(
            lambda: self.client(first.url).request(
                "POST", "/v1/compare", key=first.key, body={**body, "arms": entries}
            )
        )
        found = sorted(answer["arms"], key=lambda entry: int(entry["index"]))
        return [{"choices": [entry], "usage": entry["usage"]} for entry in found]

    async def _most_compared(self, arm: Arm) -> int:
        """Return how many arms the server of one compares in a request; 0: it does not."""
        if arm.url not in self._most_arms:
            try:
                described = await self.client(arm.url).request("GET", "/openapi.json", key=arm.key)
                fields = described["components"]["schemas"]["CompareBody"]["properties"]
                self._most_arms[arm.url] = int(fields["arms"]["maxItems"])
            except (RequestError, KeyError, TypeError, ValueError):
                self._most_arms[arm.url] = 0
        return self._most_arms[arm.url]

    async def retry(self, work: Callable[[], Awaitable[Any]]) -> Any:
        """Return what `work` gives, trying again with growing pauses while the server is gone.

        Raises:
            RunError: it refuses, or was gone for `patience_s`.
        """
        loop = asyncio.get_running_loop()
        end_s, pause_s = loop.time() + self._patience_s, _FIRST_PAUSE_S
        num_slow = 0
        while True:
            started_s = loop.time()
            try:
                return await work()
            except RequestError as error:
                if error.status not in _PASSING:
                    raise RunError(str(error)) from None
                # Time in which it worked on the request is not time in which it was gone.
                waited_s = loop.time() - started_s
                if waited_s > _LONGEST_PAUSE_S:
                    num_slow, end_s = num_slow + 1, end_s + waited_s
                if loop.time() + pause_s > end_s or num_slow > _MAX_SLOW:
                    raise RunError(
                        f"{error}; gave up after {self._patience_s:.0f} s. What is done is kept: "
                        "the same command goes on there"
                    ) from None
            await asyncio.sleep(pause_s * self._jitter.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def close(self) -> None:
        """Close the connections."""
        for client in self._clients.values():
            await client.close()


def message_of(answer: Mapping[str, Any], who: str) -> str:
    """Return the text of a chat's answer.

    Args:
        answer: of the server.
        who: gave it, for the message.

    Raises:
        RunError: it has no choices.
    """
    try:
        return str(answer["choices"][0]["message"]["content"] or "")
    except (KeyError, IndexError, TypeError):
        raise RunError(f"{who} gives no choices") from None


@asynccontextmanager
async def open_servers(**settings: Any) -> AsyncIterator[Servers]:
    """Give the servers of a run, and close their connections after it."""
    servers = Servers(**settings)
    try:
        yield servers
    finally:
        await servers.close()


def _connect(url: str) -> ApiClient:
    return ApiClient(
        url, trust_env=True, answer_timeout_s=ANSWER_TIMEOUT_S, silence_timeout_s=ANSWER_TIMEOUT_S
    )


@asynccontextmanager
async def task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """Give a group of tasks; the first failure cancels the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


async def run_each(
    items: Sequence[Item], work: Callable[[Item], Awaitable[None]], *, concurrency: int
) -> None:
    """Do something for each item, in their order, so many at once.

    The first failure cancels what is under way and is raised.
    """
    waiting = iter(items)

    async def take() -> None:
        for item in waiting:
            await work(item)

    async with task_group() as group:
        for _ in range(min(concurrency, len(items))):
            group.create_task(take())
