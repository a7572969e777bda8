"""One answer as it streams in: its text, its speed, how it ended."""

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TypeVar

Event = TypeVar("Event")
SEPARATOR = " \N{MIDDLE DOT} "
PAINT_INTERVAL_S = 0.06
_PAINT_SHARE = 4  # painting takes at most one part of so many
_SHORTEST_S = 0.05  # over less, a speed says nothing


@dataclass(kw_only=True, slots=True)
class Answer:
    """What has come of an answer so far.

    Attributes:
        text: so far.
        finish_reason: once it has ended.
        num_tokens: generated, as the server counts them; chunks until it says so.
        first_s, last_s: seconds from sending the request to the first and to the last token.
    """

    text: str = ""
    finish_reason: str | None = None
    num_tokens: int = 0
    first_s: float | None = None
    last_s: float | None = None
    _start_s: float = field(default_factory=time.monotonic)

    def add(self, text: str) -> None:
        """Take a piece of text."""
        self.text += text
        self.num_tokens += 1
        self.last_s = time.monotonic() - self._start_s
        if self.first_s is None:
            self.first_s = self.last_s

    def describe(self) -> str:
        """Return tokens, speed, time to first token and the end, for people."""
        if self.first_s is None or self.last_s is None:
            return self.finish_reason or ""
        parts = [f"{self.num_tokens} tokens"]
        if self.num_tokens > 1 and self.last_s > self.first_s + _SHORTEST_S:
            parts.append(f"{(self.num_tokens - 1) / (self.last_s - self.first_s):.1f} tokens/s")
        parts.append(f"first after {self.first_s:.2f} s")
        if self.finish_reason == "length":
            parts.append("cut at the most tokens allowed")
        return SEPARATOR.join(parts)


async def paint_at_times(
    events: AsyncIterator[Event], take: Callable[[Event], None]
) -> AsyncIterator[None]:
    """Take every event, and yield now and then.

    A page need not be drawn for each token, and the longer an answer, the longer drawing it takes.
    """
    next_s = 0.0
    async for event in events:
        take(event)
        now_s = time.monotonic()
        if now_s >= next_s:
            yield
            painted_s = time.monotonic() - now_s
            next_s = now_s + max(PAINT_INTERVAL_S, _PAINT_SHARE * painted_s)
    yield
