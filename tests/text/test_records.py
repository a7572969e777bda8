"""Reading training data, before anything is made of it."""

from pathlib import Path

import pytest

from text.errors import DataError
from text.records import read_records


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_lines_and_arrays_hold_the_same_records(tmp_path: Path) -> None:
    lines = read_records(write(tmp_path, "lines", '{"text": "a"}\n\n{"text": "b"}\n'))
    array = read_records(write(tmp_path, "array", '[{"text": "a"}, {"text": "b"}]'))
    assert [r.fields for r in lines] == [r.fields for r in array] == [{"text": "a"}, {"text": "b"}]
    assert [r.place for r in lines] == [f"{tmp_path}/lines: line {n}" for n in (1, 3)]
    assert [r.place for r in array] == [f"{tmp_path}/array: entry {n}" for n in (1, 2)]


def test_table_has_the_text_of_its_columns_and_the_label(tmp_path: Path) -> None:
    text = "index\tsentence1\tsentence2\tlabel\r\n0\t a\tb \tyes\r\n"
    (record,) = read_records(write(tmp_path, "a.tsv", text))
    assert record.fields == {"text": "a\nb", "label": "yes"}


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read .*none.jsonl: No such file"):
        read_records(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xe9"}')
    with pytest.raises(DataError, match="line 2: not UTF-8 text"):
        read_records(tmp_path / "latin.jsonl")
