"""Runs the program under test and answers calls of its functions. Started by `sandbox`.

The first message holds the program. What this process says is data to the judge, never more: a
program that rewrites anything here only changes what its own functions are seen to return.
"""

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from evaluation.code.sandboxed import limits, wire


def main(settings: dict[str, int]) -> None:
    """Serve one judge until it is gone.

    Args:
        settings: `fd` of the channel, `cpu_s` and `memory_bytes` for the program.
    """
    channel = wire.Channel(settings["fd"])
    source = channel.receive()["program"]
    limits.limit(cpu_s=settings["cpu_s"], memory_bytes=settings["memory_bytes"])
    kept: list[Any] = []

    def refer(value: Any) -> int:
        kept.append(value)
        return len(kept) - 1

    def answer(work: Callable[[], Any]) -> None:
        try:
            channel.send({"value": wire.encode(work(), refer)})
        except wire.WireError:
            raise
        except BaseException as error:  # whatever the program raises, SystemExit too
            kind = type(error)
            names = [cls.__name__ for cls in kind.__mro__ if cls.__module__ == "builtins"]
            channel.send({"error": {"type": kind.__name__, "builtin": names[0]}})

    namespace: dict[str, Any] = {"__name__": "__main__"}
    sys.argv = ["program.py"]

    def start() -> None:
        exec(compile(source, "program.py", "exec"), namespace)  # noqa: S102

    with suppress(wire.WireError):
        answer(start)
        while True:
            asked = channel.receive()
            answer(partial(_do, asked, namespace, kept))


def _do(asked: dict[str, Any], namespace: dict[str, Any], kept: list[Any]) -> Any:
    """Return what one message asks for."""
    find = kept.__getitem__
    if "name" in asked:
        return namespace[asked["name"]]
    target = find(asked["ref"])
    if "call" in asked:
        positional, named = (wire.decode(part, find) for part in asked["call"])
        return target(*positional, **named)
    if "attribute" in asked:
        return getattr(target, asked["attribute"])
    if "set" in asked:
        return setattr(target, asked["set"], wire.decode(asked["to"], find))
    if "item" in asked:
        return target[wire.decode(asked["item"], find)]
    return list(target)
