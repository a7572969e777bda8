"""The end of a page's stream: its next event is answered when the page has left it."""

import asyncio

import pytest
from starlette.types import Message

from serve.ui import streams
from serve.ui.streams import EventStreams

END: Message = {
    "type": "http.response.body", "more_body": True,
    "body": b'data: {"msg":"close_stream","event_id":null}\n\n',
}  # fmt: skip


class Connection:
    """One stream's connection, noting what is sent and the order in which things come to pass."""

    def __init__(self, open_streams: EventStreams) -> None:
        self.log: list[str] = []
        self.gone = asyncio.Event()
        self.receive, self.send = open_streams.wrap("page", self._receive, self._send)

    async def _receive(self) -> Message:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        self.log.append("sent")


def test_event_is_answered_when_the_page_has_left_its_ended_stream() -> None:
    async def run() -> list[str]:
        open_streams = EventStreams()
        stream = Connection(open_streams)
        listening = asyncio.create_task(stream.receive())
        ending = asyncio.create_task(stream.send(END))

        async def answer() -> None:
            await open_streams.wait_until_left("page")
            stream.log.append("answered")

        await asyncio.sleep(0)
        answering = asyncio.create_task(answer())
        for _ in range(5):
            await asyncio.sleep(0)
        stream.log.append("left")
        stream.gone.set()
        await asyncio.gather(ending, answering)
        assert not listening.done()  # the application is not told: it would drop the page's events
        listening.cancel()
        await open_streams.wait_until_left("page")
        return stream.log

    assert asyncio.run(run()) == ["sent", "left", "answered"]


def test_page_that_stays_is_waited_for_no_longer_than_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streams, "_LEAVE_S", 0.01)

    async def run() -> list[str]:
        open_streams = EventStreams()
        stream = Connection(open_streams)
        await stream.send(END)
        await open_streams.wait_until_left("page")
        return stream.log

    assert asyncio.run(run()) == ["sent"]


def test_two_streams_of_a_page_may_end_at_once() -> None:
    async def run() -> list[str]:
        open_streams = EventStreams()
        first, second = Connection(open_streams), Connection(open_streams)
        ending = [asyncio.create_task(stream.send(END)) for stream in (first, second)]
        await asyncio.sleep(0)
        listening = []
        for stream in (second, first):
            listening.append(asyncio.create_task(stream.receive()))
            stream.gone.set()
            await asyncio.sleep(0.01)
        await asyncio.gather(*ending)
        for task in listening:
            task.cancel()
        return [*first.log, *second.log]

    assert asyncio.run(run()) == ["sent", "sent"]


def test_page_that_leaves_in_the_middle_is_told_of() -> None:
    async def run() -> Message:
        open_streams = EventStreams()
        stream = Connection(open_streams)
        await stream.send({"type": "http.response.body", "body": b"data: {}", "more_body": True})
        await open_streams.wait_until_left("page")
        stream.gone.set()
        return await stream.receive()

    assert asyncio.run(run()) == {"type": "http.disconnect"}
