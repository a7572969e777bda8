"""Files of JSON objects, one a line: data sets that are read, results that grow.

A run appends to its files as results come. What a line holds was complete when its line end was
written, so a run that was killed goes on after the last whole line.
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from evaluation.errors import DataFileError, RunError

Record = dict[str, Any]
Item = TypeVar("Item")

# Files in the wild have these before an object: byte order marks, zero-width blanks.
_BLANKS = " \t\r\n\ufeff\u200b\u200c\u200d\u2060\xa0"


def read_records(path: Path) -> list[tuple[int, Record]]:
    """Return the objects of a file, each with the number of its line, from 1.

    Args:
        path: JSON lines, in UTF-8, or such a file packed by gzip. Empty lines are passed over.

    Raises:
        DataFileError: it cannot be read, or a line is no JSON object.
    """
    found = []
    for number, line in _lines(path):
        text = line.strip(_BLANKS)
        if not text:
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "not valid"
            raise DataFileError(f"{path}, line {number}: no JSON: {reason}") from None
        if not isinstance(record, dict):
            raise DataFileError(f"{path}, line {number}: not a JSON object")
        found.append((number, record))
    if not found:
        raise DataFileError(f"{path} holds no records")
    return found


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open("rb") as probe:
            is_packed = probe.read(2) == b"\x1f\x8b"
        opened = gzip.open(path) if is_packed else path.open("rb")  # noqa: SIM115
        # Split at line feeds only: text inside JSON may hold other line ends.
        with opened, TextIOWrapper(opened, encoding="utf-8", newline="\n") as file:
            yield from enumerate(file, start=1)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or "damaged"
        raise DataFileError(f"{path} cannot be read: {reason}") from None
    except UnicodeDecodeError:
        raise DataFileError(f"{path} is not in UTF-8") from None


def text_field(record: Record, name: str, place: str) -> str:
    """Return a field that must be a text.

    Args:
        record: of a file.
        name: of the field.
        place: file and line, for the message.

    Raises:
        DataFileError: it is missing, or no text.
    """
    value = record.get(name)
    if not isinstance(value, str):
        raise DataFileError(f"{place}: {name} must be a text, got {shown(value)}")
    return value


def shown(value: object) -> str:
    """Return a value as messages show it."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def spread(items: Sequence[Item], count: int | None) -> list[Item]:
    """Return so many items, spread over all, which may be sorted; None: all."""
    if count is None or count >= len(items):
        return list(items)
    step = len(items) / count
    return [items[int(index * step)] for index in range(count)]


class RecordLog:
    """A file of results that grows line by line.

    Args:
        path: made if missing. A last line without its end is cut off: its writer was killed.

    Attributes:
        records: what the file held when it was opened, and what was added since.

    Raises:
        DataFileError: it holds lines that are no results.
        RunError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[Record] = []
        try:
            if path.exists():
                content = path.read_bytes()
                whole = content.rfind(b"\n") + 1
                if whole < len(content):
                    with path.open("r+b") as file:
                        file.truncate(whole)
                if whole:
                    self.records = [record for _, record in read_records(path)]
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise RunError(f"{path} cannot be written: {error.strerror}") from None

    def add(self, record: Record) -> None:
        """Write a record.

        Raises:
            RunError: it cannot be written, as on a full disk; a part of a line may be in the file
                then, which the next run cuts off.
        """
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise RunError(f"{self.path} cannot be written: {error.strerror}") from None
        self.records.append(record)

    def __enter__(self) -> "RecordLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._file.close()
        except OSError as failure:
            # What was buffered cannot be written: said already, unless nothing went wrong.
            if kind is None:
                raise RunError(f"{self.path} cannot be written: {failure.strerror}") from None
