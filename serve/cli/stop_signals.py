"""Ask a long run to stop with Ctrl-C, so that it can save a checkpoint first."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from serve.cli.arguments import say

INTERRUPTED = 130
"""Exit status of a run that was asked to stop and has saved a checkpoint."""


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM; a second one stops at once."""
    requested: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if requested:
            raise KeyboardInterrupt
        requested.append(number)
        say("stopping after this step; once more: at once")

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
