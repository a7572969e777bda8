"""Runs the tests of a program that runs elsewhere, and says how it did. Started by `sandbox`.

The program's functions are called over `wire`; its objects never come here, so neither an `__eq__`
that is always true, nor a patched `assert`, nor an early exit makes a test pass. Nor can it read
what the tests expect: they are in this process only.
"""

import builtins
import json
import os
import random
import sys
from collections.abc import Iterator
from typing import Any

from evaluation.code.sandboxed import limits, wire


def main(settings: dict[str, int]) -> None:
    """Read a task from the standard input and write a verdict to the standard output.

    Args:
        settings: `fd` of the channel to the program, `cpu_s` and `memory_bytes` for the tests.
    """
    task = json.load(sys.stdin)
    verdicts = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    limits.limit(cpu_s=settings["cpu_s"], memory_bytes=settings["memory_bytes"])
    subject = Subject(wire.Channel(settings["fd"]))
    stage = "load"
    try:
        subject.ask({"program": task["program"]})
        stage = "test"
        random.seed(0)
        run_tests(task, subject)
        verdict = {"kind": "passed"}
    except wire.WireError:
        verdict = {"kind": "Exit", "stage": stage}
    except BaseException as error:  # the program's own, whatever it is, or a failed assertion
        verdict = {"kind": getattr(error, "subject_kind", type(error).__name__), "stage": stage}
    verdicts.write(json.dumps(verdict))
    verdicts.close()


def run_tests(task: dict[str, Any], subject: "Subject") -> None:
    """Run each test.

    Args:
        task: `names` that the program gives; `setup`, code whose names the tests may use beside
            them; `tests`.
        subject: the program.
    """
    given = {name: subject.ask({"name": name}, missing=NameError) for name in task["names"]}
    namespace: dict[str, Any] = {"__name__": "tests", **given}
    exec(compile(task["setup"], "setup.py", "exec"), namespace)  # noqa: S102
    # The beginning of the function, which a setup may hold, is not the program's.
    namespace.update(given)
    for test in task["tests"]:
        exec(compile(test, "test.py", "exec"), namespace)  # noqa: S102


class Subject:
    """The program at the other end of a channel."""

    def __init__(self, channel: wire.Channel) -> None:
        self._channel = channel

    def ask(self, message: dict[str, Any], *, missing: type[Exception] | None = None) -> Any:
        """Return what the program answers.

        Args:
            message: what is asked.
            missing: the error in place of KeyError.

        Raises:
            Exception: what the program raised, as the nearest built-in class.
        """
        self._channel.send(message)
        answer = self._channel.receive()
        if "value" in answer:
            return wire.decode(answer["value"], lambda number: Remote(self, number))
        raised = answer.get("error")
        if not isinstance(raised, dict):
            raise wire.WireError("no answer")
        name, kind = str(raised.get("type")), getattr(builtins, str(raised.get("builtin")), None)
        if missing is not None and kind is KeyError:
            name, kind = missing.__name__, missing
        raise _make_error(kind, name)


def _make_error(kind: Any, name: str) -> Any:
    """Return an error of a class, if it is one, that is known by a name."""
    error: Any
    try:
        error = kind() if issubclass(kind, Exception) else Exception()
    except TypeError:  # no class, or one that wants arguments
        error = Exception()
    error.subject_kind = name
    return error


class Remote:
    """A function or an object of the program. Equal to itself only."""

    def __init__(self, subject: Subject, number: int) -> None:
        vars(self).update(_subject=subject, _number=number)

    def _ask(self, **what: Any) -> Any:
        return self._subject.ask({"ref": self._number, **what})

    def __call__(self, *positional: Any, **named: Any) -> Any:
        return self._ask(call=[wire.encode(list(positional), _refer), wire.encode(named, _refer)])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._ask(attribute=name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask(set=name, to=wire.encode(value, _refer))

    def __getitem__(self, key: Any) -> Any:
        return self._ask(item=wire.encode(key, _refer))

    def __iter__(self) -> Iterator[Any]:
        return iter(self._ask(list=True))


def _refer(value: Any) -> int:
    if isinstance(value, Remote):
        return int(value._number)
    raise TypeError(f"a test passes a {type(value).__name__} to the program")
