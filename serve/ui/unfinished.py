"""Answers that are cut off, and what is shown after them."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any

import gradio as gr

from serve.ui.controls import PRIVATE


class Unfinished:
    """The answers that a tab's pages still wait for, at most one for each page."""

    def __init__(self) -> None:
        self._ends: dict[str, asyncio.Event] = {}

    def track(self, answer: Callable[..., Any]) -> Callable[..., AsyncIterator[Any]]:
        """Return the same event handler, known to `halt` from its start to its end.

        Args:
            answer: an async generator function, which closes what it asks when it is closed.
        """

        async def tracked(request: gr.Request, *values: Any) -> AsyncIterator[Any]:
            name, ended = str(request.session_hash), asyncio.Event()
            self._ends[name] = ended
            try:
                async with aclosing(answer(*values)) as states:
                    async for state in states:
                        yield state
            finally:
                ended.set()
                if self._ends.get(name) is ended:
                    del self._ends[name]

        return tracked

    def halt(self, event: Callable[..., Any], running: Sequence[Any]) -> Any:
        """Have an event of the page cancel its answer; return the end of that, to go on from.

        The page asks for the cancellation and for what follows at once. What follows must come
        last, or what the answer still shows would be drawn over it: it has to be queued.

        Args:
            event: such as a button's `click`.
            running: the events that `track` was given for.
        """
        halted = event(None, None, None, cancels=list(running), **PRIVATE)
        return halted.then(self._wait, None, None, **PRIVATE)

    async def _wait(self, request: gr.Request) -> None:
        if (ended := self._ends.get(str(request.session_hash))) is not None:
            await ended.wait()
