"""Read training data: JSON lines, a JSON array, or a table with a header."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from text.errors import DataError
from text.text_file import read_text

_ZERO_WIDTH = "\ufeff\u200b\u200c\u200d\u2060"
_TEXT_COLUMNS = (
    ("sentence",), ("text",), ("sentence1", "sentence2"), ("question", "sentence"),
    ("question1", "question2"), ("premise", "hypothesis"), ("#1 String", "#2 String"),
)  # fmt: skip
_LABEL_COLUMNS = ("label", "gold_label", "is_duplicate", "Quality")


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One entry of a file.

    Attributes:
        place: where it is, for messages: "data.jsonl: line 3".
        fields: what it says.
    """

    place: str
    fields: Mapping[str, Any]


def read_records(path: Path) -> list[Record]:
    """Read the objects of a JSON lines file, of a JSON array, or of a table with a header.

    Files that end in .tsv are tables; others are JSON. Empty lines are passed over.

    Raises:
        DataError: the file cannot be read or is empty, or a line is malformed; the line is named.
    """
    text = read_text(path)
    if path.suffix == ".tsv":
        records = list(_read_table(path, text))
    elif text.strip(_ZERO_WIDTH + " \t\r\n").startswith("["):
        records = list(_read_array(path, text))
    else:
        records = list(_read_lines(path, text))
    if not records:
        raise DataError(f"{path}: no examples; the file is empty")
    return records


def _read_lines(path: Path, text: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), 1):
        content = line.strip(_ZERO_WIDTH + " \t\r\n")
        if content:
            yield _record(f"{path}: line {number}", _parse_json(content, f"{path}: line {number}"))


def _read_array(path: Path, text: str) -> Iterator[Record]:
    content = text.strip(_ZERO_WIDTH + " \t\r\n")
    for number, value in enumerate(_parse_json(content, str(path)), 1):
        yield _record(f"{path}: entry {number}", value)


def _parse_json(content: str, place: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not valid JSON: {error}") from None


def _record(place: str, value: object) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{place}: must be a JSON object, got {type(value).__name__}")
    return Record(place=place, fields=value)


def _read_table(path: Path, text: str) -> Iterator[Record]:
    first, *lines = text.split("\n")
    names = [name.strip(_ZERO_WIDTH + " \r") for name in first.split("\t")]
    label = next((name for name in _LABEL_COLUMNS if name in names), None)
    columns = next((c for c in _TEXT_COLUMNS if set(c) <= set(names)), None)
    if label is None or columns is None:
        raise DataError(
            f"{path}: line 1: the header must name a label ({', '.join(_LABEL_COLUMNS)}) and the "
            f"text ({'; '.join(' and '.join(c) for c in _TEXT_COLUMNS)}), got {', '.join(names)}"
        )
    for number, line in enumerate(lines, 2):
        if not line.strip():
            continue
        cells = line.rstrip("\r").split("\t")
        place = f"{path}: line {number}"
        if len(cells) != len(names):
            raise DataError(f"{place}: {len(cells)} columns, the header has {len(names)}")
        row = dict(zip(names, cells, strict=True))
        text = "\n".join(row[name].strip() for name in columns)
        yield Record(place=place, fields={"text": text, "label": row[label]})
