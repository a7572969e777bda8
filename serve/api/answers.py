"""Send or collect the answers to generations: JSON when all is done, or server-sent events.

Shared by all endpoints that generate. What is sent stops the work when the client goes.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.api.chunks import DONE, ChunkWriter, Details
from serve.api.context import Result, run_work
from serve.api.errors import encode_json, to_api_error
from serve.api.generation import Generation, Piece
from serve.api.schema import StreamOptions

_PING = b": ping\n\n"
_NO_DETAILS = Details()


async def stream_answer(
    generation: Generation,
    writer: ChunkWriter,
    *,
    num_choices: int,
    opening: Callable[[int, str | None], str],
    describe: Callable[[Piece], Details] | None,
    options: StreamOptions | None,
    usage: Callable[[], dict[str, object]] | None = None,
    prepare: Callable[[list[Piece]], Awaitable[None]] | None = None,
    on_end: Callable[[], Awaitable[None]] | None = None,
) -> AsyncGenerator[bytes, None]:
    """Yield the events of a streamed answer, one item for each step.

    Args:
        generation: gives the pieces.
        writer: writes the chunks.
        num_choices: how many answers there are.
        opening: writes what comes before a choice's first text, given its index and the usage.
        describe: gives log probabilities and trace of a piece, if the client asked for any.
        options: which usage to send.
        usage: gives it; None is the usage of the generation.
        prepare: awaited before a step's pieces are written.
        on_end: awaited when all choices have ended, before the client is told.
    """
    count = usage or generation.usage
    with_usage = options is not None and bool(options.include_usage)
    is_continuous = options is not None and with_usage and bool(options.continuous_usage_stats)
    is_open = [False] * num_choices
    async with aclosing(generation.steps()) as steps:
        async for pieces in steps:
            so_far = writer.usage_field(count()) if is_continuous else None
            if prepare is not None:
                await prepare(pieces)
            events = []
            for piece in pieces:
                index = piece.choice
                if not is_open[index]:
                    is_open[index] = True
                    events.append(opening(index, so_far))
                details = None
                if describe is not None and piece.output.token_id is not None:
                    details = describe(piece)
                if piece.text and details is None:
                    events.append(writer.text(index, piece.text, so_far))
                elif piece.text or (details is not None and piece.finish_reason is None):
                    assert details is not None
                    events.append(writer.detailed(index, piece.text, details, so_far))
                    details = None
                if piece.finish_reason is not None:
                    end = details or _NO_DETAILS
                    events.append(writer.finish(index, piece.finish_reason, end, so_far))
            data = "".join(events)
            if data:
                yield data.encode()
    if on_end is not None:
        await on_end()
    if with_usage:
        yield writer.usage_only(count()).encode() + DONE
    else:
        yield DONE


class Answer:
    """A whole choice.

    Attributes:
        text: all of its text.
        pieces: its tokens.
        finish_reason: why it ended.
    """

    def __init__(self) -> None:
        self.text = ""
        self.pieces: list[Piece] = []
        self.finish_reason: str | None = None


async def collect_answers(generation: Generation, num_choices: int) -> list[Answer]:
    """Return the choices when all have ended."""
    answers = [Answer() for _ in range(num_choices)]
    texts: list[list[str]] = [[] for _ in answers]
    async with aclosing(generation.steps()) as steps:
        async for pieces in steps:
            for piece in pieces:
                answer = answers[piece.choice]
                texts[piece.choice].append(piece.text)
                if piece.output.token_id is not None:
                    answer.pieces.append(piece)
                answer.finish_reason = piece.finish_reason
    for answer, parts in zip(answers, texts, strict=True):
        answer.text = "".join(parts)
    return answers


async def encode_whole(
    head: dict[str, object],
    field: str,
    make: Callable[[int, Answer], dict[str, object]],
    answers: Sequence[Answer],
    usage: dict[str, object],
    *,
    num_values: int,
) -> bytes:
    """Return the JSON of a whole answer, made in a thread where it would hold up other requests.

    Args:
        head: fields before the choices.
        field: name of the list of choices.
        make: writes a choice, given its index and what was generated.
        answers: of all choices.
        usage: the last field.
        num_values: log probabilities, trace entries and the like, about.
    """

    def encode() -> bytes:
        # Choice by choice: a single call would not let other threads run.
        choices = b",".join(encode_json(make(i, answer)) for i, answer in enumerate(answers))
        start, end = encode_json(head)[:-1], encode_json({"usage": usage})[1:]
        return b'%s,"%s":[%s],%s' % (start, field.encode(), choices, end)

    return await run_work(encode, size=num_values)


def count_tokens(answers: Sequence[Answer]) -> int:
    """Return how many tokens answers have."""
    return sum(len(answer.pieces) for answer in answers)


class ClientGoneError(Exception):
    """The client closed the connection."""


async def run_while_connected(
    receive: Receive,
    work: Coroutine[Any, Any, Result],
    *,
    on_idle: Callable[[], Awaitable[float]] | None = None,
) -> Result:
    """Run `work`, and cancel it when the client goes.

    Args:
        receive: the ASGI channel; the body has been read from it.
        work: what to run.
        on_idle: called at once and then after as many seconds as it returns.

    Raises:
        ClientGoneError: the client went first.
    """
    worker = asyncio.create_task(work)
    watcher = asyncio.create_task(_wait_for_disconnect(receive))
    try:
        while True:
            timeout = None if on_idle is None else await on_idle()
            done, _ = await asyncio.wait(
                (worker, watcher), timeout=timeout, return_when=asyncio.FIRST_COMPLETED
            )
            if worker in done:
                return worker.result()
            if watcher in done:
                raise ClientGoneError
    finally:
        worker.cancel()
        watcher.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class JsonWhenDone(Response):
    """Send JSON once it has been computed.

    Args:
        work: computes it.
        extra: more headers.
    """

    media_type = "application/json"

    def __init__(
        self, work: Coroutine[Any, Any, bytes], *, extra: Mapping[str, str] | None = None
    ) -> None:
        super().__init__()
        self._work = work
        self._extra = extra

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await run_while_connected(receive, self._work)
        except ClientGoneError:
            return
        headers = None if self._extra is None else dict(self._extra)
        response = Response(body, headers=headers, media_type=self.media_type)
        with suppress(OSError):
            await response(scope, receive, send)


class EventStream(Response):
    """Send frames of server-sent events as they come.

    The status waits for the first frame, so that a request that is not admitted gets its own. An
    error after that is an event; then the stream closes, without `[DONE]`.

    Args:
        frames: whole events, one item for each write.
        ping_interval_s: seconds without data after which a comment is sent.
        extra: more headers.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        frames: AsyncGenerator[bytes, None],
        *,
        ping_interval_s: float,
        extra: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(extra or {})},
            media_type=self.media_type,
        )
        del self.headers["content-length"]
        self._frames = frames
        self._ping_interval_s = ping_interval_s
        self._is_open = False
        self._last_send_s = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._last_send_s = time.monotonic()

        async def ping() -> float:
            if time.monotonic() - self._last_send_s >= self._ping_interval_s:
                await self._write(send, _PING)
            return max(0.001, self._last_send_s + self._ping_interval_s - time.monotonic())

        try:
            await run_while_connected(receive, self._pump(send), on_idle=ping)
        except ClientGoneError:
            return
        with suppress(OSError):
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pump(self, send: Send) -> None:
        try:
            async with aclosing(self._frames) as frames:
                async for frame in frames:
                    await self._write(send, frame)
        except ClientGoneError:
            raise
        except Exception as error:
            if not self._is_open:
                raise
            data = encode_json(to_api_error(error).body())
            await self._write(send, b"data: " + data + b"\n\n")

    async def _write(self, send: Send, data: bytes) -> None:
        self._last_send_s = time.monotonic()
        try:
            if not self._is_open:
                self._is_open = True
                await send(
                    {
                        "type": "http.response.start",
                        "status": self.status_code,
                        "headers": self.raw_headers,
                    }
                )
            await send({"type": "http.response.body", "body": data, "more_body": True})
        except OSError as error:
            raise ClientGoneError from error
