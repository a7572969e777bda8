"""The event loop of commands that run the engine in their own process, the server among them."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from uvicorn.loops.auto import auto_loop_factory

T = TypeVar("T")


def run_on_loop(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine as `asyncio.run` does, on uvloop where there is one.

    It takes a token from the engine's thread in less than half of asyncio's time.
    """
    with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
        return runner.run(main)
