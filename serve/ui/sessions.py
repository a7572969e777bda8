"""What open pages may make Gradio keep: so many sessions, so many bytes, for so long."""

import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradio.routes import App

MAX_SESSIONS = 256
MAX_COST = 64 * 2**20
MAX_COST_OF_ONE = MAX_COST // 4
EXPIRY_S = 600.0
# Memory that a value of a list or an object takes beside its own bytes.
_VALUE_COST = 64


class SessionError(Exception):
    """A page asks for more than there is for it.

    Attributes:
        status: HTTP status of the answer.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(slots=True)
class _Session:
    cost: int = 0
    largest: int = 0
    num_open: int = 0
    last_s: float = 0.0


class Sessions:
    """Counts what each session has sent, and makes Gradio forget sessions when it is too much.

    What a page sends is kept until its answer has been read, and its largest part, as state,
    for as long as the session lives. Pages need no key, so anybody may send.

    Args:
        gradio: keeps the sessions.
    """

    def __init__(self, gradio: "App") -> None:
        self._gradio = gradio
        self._sessions: OrderedDict[str, _Session] = OrderedDict()

    async def admit(self, name: str, body: bytes) -> None:
        """Count what a session sends, and make room for it.

        Raises:
            SessionError: it is too much at once, or pages that are open take all there is.
        """
        num_values = sum(map(body.count, (b",", b"[", b"{")))
        cost = len(body) + _VALUE_COST * num_values
        if cost > MAX_COST_OF_ONE:
            raise SessionError("This is too much for the page at once.", 413)
        await self.forget_expired()
        while self._is_full(name, cost):
            idle = [
                key for key, item in self._sessions.items() if not item.num_open and key != name
            ]
            if not idle:
                raise SessionError("Too many pages are open; close one, or try later.", 503)
            await self._forget(idle[0])
        session = self._sessions.setdefault(name, _Session())
        self._sessions.move_to_end(name)
        session.cost += cost
        session.largest = max(session.largest, cost)
        session.last_s = time.monotonic()

    def has_function(self, name: str, index: object) -> bool:
        """Return whether the page of a session has a function of this number."""
        state = self._gradio.state_holder.session_data.get(name)
        # What a page has made as it went is in its own state.
        blocks = self._gradio.get_blocks() if state is None else state.blocks_config
        return type(index) is int and index in blocks.fns

    def has_nothing_to_tell(self, name: str) -> bool:
        """Return whether all that the page of a session ran is over and was told to it."""
        queue = self._gradio.get_blocks()._queue
        messages = queue.pending_messages_per_session.get(name)
        is_told = messages is not None and messages.empty()
        return is_told and not queue.pending_event_ids_session.get(name)

    @contextmanager
    def opened(self, name: str) -> Iterator[None]:
        """Keep a session while a stream to its page is open; one that sent nothing ends with it."""
        session = self._sessions.setdefault(name, _Session())
        session.num_open += 1
        try:
            yield
        finally:
            session.num_open -= 1
            session.last_s = time.monotonic()
            if not session.num_open and not session.cost:
                self._sessions.pop(name, None)

    def settle(self, name: str) -> None:
        """Note that a page has read all answers: what is left of them is its state."""
        session = self._sessions.get(name)
        if session is not None:
            session.cost = session.largest

    async def forget_expired(self) -> None:
        """Forget the sessions whose pages have been gone for long."""
        oldest_s = time.monotonic() - EXPIRY_S
        for name, session in list(self._sessions.items()):
            if not session.num_open and session.last_s < oldest_s:
                await self._forget(name)

    def _is_full(self, name: str, cost: int) -> bool:
        num_others = len(self._sessions) - (name in self._sessions)
        total = sum(session.cost for session in self._sessions.values())
        return num_others >= MAX_SESSIONS or total + cost > MAX_COST

    async def _forget(self, name: str) -> None:
        self._sessions.pop(name, None)
        state, queue = self._gradio.state_holder, self._gradio.get_blocks()._queue
        await queue.clean_events(session_hash=name)
        state.session_data.pop(name, None)
        state.time_last_used.pop(name, None)
        queue.pending_messages_per_session.pop(name, None)
        for event_id in queue.pending_event_ids_session.pop(name, ()):
            queue.event_ids_to_events.pop(event_id, None)
