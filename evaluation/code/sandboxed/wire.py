"""Values between a program under test and its judge: plain data as JSON, all else by reference.

No end can make the other run anything: a value is rebuilt from JSON types, and what is not plain
data stays where it is and has a number.
"""

import json
from collections.abc import Callable
from typing import Any

MAX_MESSAGE_CHARS = 64 * 2**20
_HUGE = 2**63


class WireError(Exception):
    """The other end has gone, or does not keep to the protocol."""


class Channel:
    """Messages over a file descriptor, one JSON object a line."""

    def __init__(self, fd: int) -> None:
        # Kept apart from sys.stdout, which the program may close or write to.
        self._reader = open(fd, encoding="ascii", newline="\n", closefd=False)  # noqa: SIM115
        self._writer = open(fd, "w", encoding="ascii", newline="\n", closefd=False)  # noqa: SIM115

    def send(self, message: dict[str, Any]) -> None:
        """Send one message.

        Raises:
            WireError: the other end has gone.
        """
        try:
            self._writer.write(json.dumps(message) + "\n")
            self._writer.flush()
        except OSError:
            raise WireError("gone") from None

    def receive(self) -> dict[str, Any]:
        """Return the next message.

        Raises:
            WireError: the other end has gone, or it sent no object.
        """
        try:
            line = self._reader.readline(MAX_MESSAGE_CHARS)
            message = json.loads(line) if line.endswith("\n") else None
        except (OSError, ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise WireError("gone")
        return message


def encode(value: Any, refer: Callable[[Any], int]) -> Any:
    """Return a value as JSON types.

    Args:
        value: anything.
        refer: gives a number for what is not plain data.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        value = int(value)
        return value if -_HUGE < value < _HUGE else {"int": hex(value)}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, list):
        return [encode(item, refer) for item in value]
    for name, kind in _CONTAINERS.items():
        if isinstance(value, kind):
            return {name: [encode(item, refer) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(k, refer), encode(v, refer)] for k, v in value.items()]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, type):
        name = value.__name__
        return {"type": name} if _TYPES.get(name) is value else {"ref": refer(value)}
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return encode(value.tolist(), refer)
    return {"ref": refer(value)}


def decode(value: Any, find: Callable[[int], Any]) -> Any:
    """Return the value that `encode` gave.

    Args:
        value: JSON types.
        find: gives the object for a number.

    Raises:
        WireError: it is not from `encode`.
    """
    if isinstance(value, list):
        return [decode(item, find) for item in value]
    if not isinstance(value, dict):
        return value
    try:
        ((name, item),) = value.items()
        if name in _CONTAINERS:
            return _CONTAINERS[name](decode(part, find) for part in item)
        if name == "dict":
            return {decode(k, find): decode(v, find) for k, v in item}
        if name == "int":
            return int(item, 16)
        if name == "bytes":
            return bytes.fromhex(item)
        if name == "complex":
            return complex(*item)
        if name == "type":
            return _TYPES[item]
        if name == "ref":
            return find(item)
    except (ValueError, TypeError, KeyError):
        pass
    raise WireError("not from this protocol")


_CONTAINERS: dict[str, Any] = {"tuple": tuple, "set": set, "frozenset": frozenset}
_TYPES: dict[str, Any] = {
    kind.__name__: kind
    for kind in (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict)
}
