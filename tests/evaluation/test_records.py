"""Files of JSON lines: what is read, what is refused, what survives a kill or a full disk."""

import gzip
import json
import os
from pathlib import Path

import pytest

from evaluation.errors import DataFileError, RunError
from evaluation.records import RecordLog, read_records, text_field


def test_objects_are_read_with_their_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n   {"a": 2}\n\ufeff\u200b{"a": 3}\r\n{"a": "x\u2028y"}')
    expected = [(1, {"a": 1}), (3, {"a": 2}), (4, {"a": 3}), (5, {"a": "x\u2028y"})]
    assert read_records(path) == expected


def test_packed_file_is_read_whatever_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(gzip.compress(b'{"a": 1}\n'))
    assert read_records(path) == [(1, {"a": 1})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no records"),
        (b"\n\n", "holds no records"),
        (b'{"a": 1}\n{"a": \n', r"line 2: no JSON: Expecting value"),
        (b'{"a": 1}\n[1]\n', "line 2: not a JSON object"),
        (b'{"a": 1}\n"x"\n', "line 2: not a JSON object"),
        (b"[" * 100_000, "line 1: no JSON"),
        (b'{"a": "\xff"}\n', "is not in UTF-8"),
        (gzip.compress(b'{"a": 1}\n' * 1000)[:-20], "cannot be read"),
        (b"\x1f\x8bnothing", "cannot be read"),
    ],
    # A packed file has the time in it, and every worker of a run must collect the same names.
    ids=["empty", "blank", "cut", "list", "text", "deep", "bytes", "half", "not packed"],
)
def test_file_that_cannot_be_used_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataFileError, match=message) as caught:
        read_records(path)
    assert str(caught.value).startswith(str(path))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match=r"b.jsonl cannot be read: No such file"):
        read_records(tmp_path / "b.jsonl")


@pytest.mark.parametrize("value", [None, 1, ["x"], {"a": "b" * 100}])
def test_field_that_is_no_text_is_named(value: object) -> None:
    with pytest.raises(DataFileError, match=r"f, line 1: a must be a text, got .{1,61}$"):
        text_field({} if value is None else {"a": value}, "a", "f, line 1")


def test_log_goes_on_after_the_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with RecordLog(path) as log:
        log.add({"a": 1})
        log.add({"a": "ü\n"})
    with path.open("a") as file:
        file.write('{"a": 3, "b')
    with RecordLog(path) as log:
        assert log.records == [{"a": 1}, {"a": "ü\n"}]
        log.add({"a": 4})
        assert log.records[-1] == {"a": 4}
    assert [json.loads(line)["a"] for line in path.read_text().splitlines()] == [1, "ü\n", 4]


def test_log_of_a_writer_that_was_killed_in_its_first_line_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"a"')
    with RecordLog(path) as log:
        assert log.records == []
    assert path.read_bytes() == b""


def test_log_with_a_bad_line_inside_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 1}\nnothing\n{"a": 2}\n')
    with pytest.raises(DataFileError, match="line 2"):
        RecordLog(path)
    assert path.read_text() == '{"a": 1}\nnothing\n{"a": 2}\n'


def test_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    log = RecordLog(tmp_path / "log.jsonl")
    log._file = open("/dev/full", "a")  # noqa: SIM115
    with pytest.raises(RunError, match="log.jsonl cannot be written: No space left on dev"), log:
        log.add({"a": 1})
    assert log.records == []


def test_folder_in_place_of_the_log_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be written"):
        RecordLog(tmp_path)
    assert os.listdir(tmp_path) == []
