"""The streams on which pages read what their events do, and the end of such a stream.

Gradio ends a page's stream when none of the page's events is under way, and the page opens another
for its next event. A page that learns of an event after the server has ended the stream, and before
it has read that, would wait for the event on the ended stream, for ever. So the page is told of an
event when it has left the stream that ended.
"""

import asyncio
from contextlib import suppress

from starlette.responses import Response
from starlette.types import Message, Receive, Send

_END = b'data: {"msg":"close_stream"'
END_STREAM = Response(_END + b',"event_id":null}\n\n', media_type="text/event-stream")
"""What ends a stream, as an application."""
_LEAVE_S = 5.0


class EventStreams:
    """The streams of all pages."""

    def __init__(self) -> None:
        self._leaving: dict[str, asyncio.Event] = {}

    async def wait_until_left(self, session: str) -> None:
        """Wait until the page of a session has left its stream, if that has ended."""
        if (left := self._leaving.get(session)) is not None:
            await left.wait()

    def wrap(self, session: str, receive: Receive, send: Send) -> tuple[Receive, Send]:
        """Return `receive` and `send` of a stream that waits at its end until its page leaves it.

        Gradio must not learn that the page leaves: it would drop the page's events.
        """
        left = asyncio.Event()

        async def receive_until_end() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect":
                left.set()
                if self._leaving.get(session) is left:
                    await asyncio.Event().wait()  # cancelled by the end of the response
            return message

        async def send_and_wait(message: Message) -> None:
            if not message.get("body", b"").startswith(_END):
                await send(message)
                return
            self._leaving[session] = left
            try:
                await send(message)
                with suppress(TimeoutError):
                    await asyncio.wait_for(left.wait(), _LEAVE_S)
            finally:
                left.set()
                if self._leaving.get(session) is left:
                    del self._leaving[session]

        return receive_until_end, send_and_wait
