"""One answer as it streams in: its text, its speed, how it ended."""

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TypeVar

Event = TypeVar("Event")
SEPARATOR = " \N{MIDDLE DOT} "
PAINT_INTERVAL_S = 0.06


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
        if self.num_tokens > 1 and self.last_s > self.first_s:
            parts.append(f"{(self.num_tokens - 1) / (self.last_s - self.first_s):.1f} tokens/s")
        parts.append(f"first after {self.first_s:.2f} s")
        if self.finish_reason == "length":
            parts.append("cut at the most tokens allowed")
        return SEPARATOR.join(parts)


async def paint_at_times(
    events: AsyncIterator[Event], take: Callable[[Event], None]
) -> AsyncIterator[None]:
    """Take every event, and yield now and then: a page need not be drawn for each token."""
    painted_s = -PAINT_INTERVAL_S
    async for event in events:
        take(event)
        now_s = time.monotonic()
        if now_s - painted_s >= PAINT_INTERVAL_S:
            painted_s = now_s
            yield
    yield
