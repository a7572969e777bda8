"""The folder of a run."""

import hashlib
import json
from pathlib import Path

import pytest

from evaluation.errors import RunError
from evaluation.folder import (
    SETTINGS,
    SettingsError,
    digest_of,
    file_names,
    open_folder,
    seed_of,
    write_whole,
)


def test_run_is_known_again_by_its_settings(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    open_folder(folder, {"a": (1, 2), "b": None})
    assert json.loads((folder / SETTINGS).read_text()) == {"a": [1, 2], "b": None}
    open_folder(folder, {"b": None, "a": [1, 2]})


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"a": 2, "b": 1}, "another a;"), ({"a": 1}, "another b;"), ({"a": 1, "b": 1, "c": 0}, "c;")],
)
def test_other_settings_are_refused_and_named(
    tmp_path: Path, settings: dict[str, int], named: str
) -> None:
    open_folder(tmp_path / "run", {"a": 1, "b": 1})
    with pytest.raises(SettingsError, match=named):
        open_folder(tmp_path / "run", settings)


def test_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(SettingsError, match="is not empty, and holds no evaluation"):
        open_folder(tmp_path, {"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_damaged_settings_are_an_error(tmp_path: Path) -> None:
    (tmp_path / SETTINGS).write_text("{")
    with pytest.raises(SettingsError, match="is damaged"):
        open_folder(tmp_path, {"a": 1})


def test_file_in_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with pytest.raises(RunError, match="cannot be written"):
        open_folder(tmp_path / "run", {"a": 1})


def test_file_is_written_as_a_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.md"
    write_whole(path, "old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(RunError, match="No space left"):
        write_whole(path, "new")
    assert [file.name for file in tmp_path.iterdir()] == ["report.md"]
    assert path.read_text() == "old"


def test_labels_have_different_file_names() -> None:
    names = file_names(["a/b", "a:b", "A-b", "../..", "", "smollm2:poet@adapt"])
    assert list(names.values()) == [
        "a-b", "a-b-2", "A-b-3", "arm", "arm-2", "smollm2-poet@adapt",
    ]  # fmt: skip


def test_seeds_differ_by_each_part_and_fit_31_bits() -> None:
    seeds = {
        seed_of(seed, task, sample) for seed in range(5) for task in "abc" for sample in (1, 2)
    }
    assert len(seeds) == 30
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert seed_of(1, "a", 2) == seed_of(1, "a", 2) == 106_514_261


def test_digest_is_the_sha_256_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert digest_of(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
    with pytest.raises(RunError, match="cannot be read"):
        digest_of(tmp_path / "b")
