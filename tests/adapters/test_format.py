"""The adapter folder: what it refuses to read, and what survives a failed write."""

import dataclasses
import errno
import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import format as adapter_format
from adapters.format import (
    CONFIG_FILE,
    FORMAT_VERSION,
    TENSOR_FILE,
    AdapterConfig,
    AdapterError,
    Host,
    check_base,
    digest,
    read_adapter,
    read_config,
    write_adapter,
)

CONFIG = AdapterConfig(
    method="qst", base_id="tiny", base_fingerprint="ab" * 32, base_quantization="nf4",
    fields={"reduction": 4}, description="for tests", training={"steps": 3},
)  # fmt: skip
TENSORS = {"alpha": torch.tensor(0.5), "up.weight": torch.arange(6.0).view(2, 3)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_adapter(tmp_path / "adapter", CONFIG, TENSORS)
    return tmp_path / "adapter"


def edit(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")) | changes
    values = {name: value for name, value in values.items() if value is not ...}
    (folder / CONFIG_FILE).write_text(json.dumps(values), encoding="utf-8")


def test_adapter_is_read_as_it_was_written(folder: Path) -> None:
    stored = read_adapter(folder)
    assert stored.config == CONFIG == read_config(folder)
    assert stored.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(stored.tensors[name], TENSORS[name]) for name in TENSORS)
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_FILE, TENSOR_FILE]


def test_digest_follows_both_files(folder: Path) -> None:
    first = digest(folder)
    assert first == read_adapter(folder).digest
    write_adapter(folder, dataclasses.replace(CONFIG, description="other"), TENSORS)
    second = digest(folder)
    write_adapter(folder, CONFIG, TENSORS | {"alpha": torch.tensor(0.25)})
    assert len({first, second, digest(folder)}) == 3
    assert len(first) == 64


def test_other_files_of_the_folder_are_left_alone(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    write_adapter(folder, CONFIG, TENSORS)
    assert (folder / "metrics.jsonl").read_text(encoding="utf-8") == "{}\n"


@pytest.mark.parametrize("failing", [1, 2], ids=["first_file", "second_file"])
def test_old_adapter_survives_a_full_disk(
    folder: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    before, calls = digest(folder), []

    def sync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(AdapterError, match=r"cannot be written \(.*No space left.* is unchanged"):
        write_adapter(folder, CONFIG, TENSORS | {"alpha": torch.tensor(2.0)})
    assert digest(folder) == before
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_FILE, TENSOR_FILE]


def test_old_adapter_survives_a_write_that_is_cut_short(folder: Path) -> None:
    before, limits = digest(folder), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(AdapterError, match="cannot be written"):
            write_adapter(folder, CONFIG, {"alpha": torch.zeros(5000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert digest(folder) == before
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_FILE, TENSOR_FILE]


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(AdapterError, match="file/adapter: the adapter cannot be written"):
        write_adapter(tmp_path / "file" / "adapter", CONFIG, TENSORS)


def test_config_that_is_no_json_is_not_written(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, training={"loss": float("nan")})
    with pytest.raises(AdapterError, match="config is no JSON"):
        write_adapter(tmp_path / "adapter", config, TENSORS)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("name", [CONFIG_FILE, TENSOR_FILE])
def test_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(AdapterError, match=f"no adapter; {name} is missing"):
        read_adapter(folder)


@pytest.mark.parametrize("name", [CONFIG_FILE, TENSOR_FILE])
def test_link_is_refused(folder: Path, name: str) -> None:
    (folder / name).rename(folder / "elsewhere")
    (folder / name).symlink_to(folder / "elsewhere")
    with pytest.raises(AdapterError, match=f"{name}: is a link"):
        read_adapter(folder)


def test_link_to_a_folder_is_followed_to_it_but_not_below_a_given_one(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert read_adapter(tmp_path / "link").config == CONFIG
    assert read_adapter(folder, within=tmp_path).config == CONFIG
    for path in (tmp_path / "link", tmp_path / "link" / "below", tmp_path / "none"):
        with pytest.raises(AdapterError, match=f"{path}: no adapter; it is no folder, or a link"):
            read_adapter(path, within=tmp_path)


@pytest.mark.parametrize("name", [CONFIG_FILE, TENSOR_FILE])
def test_pipe_in_place_of_a_file_is_refused_without_waiting(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(AdapterError, match=f"{name}: is no plain file"):
        read_adapter(folder)


def test_what_was_read_is_what_was_checked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file is opened once; a file that takes its place later is neither read nor hashed."""
    opened: list[object] = []
    really_open = os.open

    def count(path: Any, flags: int, *, dir_fd: int | None = None) -> int:
        opened.append(path)
        return really_open(path, flags, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", count)
    read_adapter(folder)
    assert opened == [folder, CONFIG_FILE, TENSOR_FILE]


@pytest.mark.parametrize("name", [CONFIG_FILE, TENSOR_FILE])
def test_file_over_its_limit_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(adapter_format._MAX_BYTES, name, 20)
    with pytest.raises(AdapterError, match=f"{name}: over 20 bytes"):
        read_adapter(folder)


@pytest.mark.parametrize("length", [0, 7, 60, -1])
def test_truncated_tensors_are_refused(folder: Path, length: int) -> None:
    content = (folder / TENSOR_FILE).read_bytes()
    (folder / TENSOR_FILE).write_bytes(content[:length])
    with pytest.raises(AdapterError, match="not a whole safetensors file"):
        read_adapter(folder)


def test_pickle_in_place_of_tensors_is_refused(folder: Path) -> None:
    torch.save(TENSORS, folder / TENSOR_FILE)
    with pytest.raises(AdapterError, match="not a whole safetensors file"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "must hold a JSON object, got list"),
        ('{"training": {"loss": NaN}}', "NaN is no JSON number"),
        ("\xff", "not valid JSON"),
    ],
)
def test_config_that_is_no_object_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / CONFIG_FILE).write_text(text, encoding="latin-1")
    with pytest.raises(AdapterError, match=message):
        read_config(folder)


@pytest.mark.parametrize("name", ["description", "base_id", "fields", "training", "chain", "new"])
@pytest.mark.parametrize("half", ["\ud800", "a\udfffb"], ids=["first", "second"])
@pytest.mark.parametrize("wrap", [str, lambda x: [x], lambda x: {"a": [x]}, lambda x: {x: 1}])
def test_half_a_surrogate_pair_is_refused_wherever_it_is(
    folder: Path, name: str, half: str, wrap: Any
) -> None:
    edit(folder, **{name: wrap(half)})
    with pytest.raises(AdapterError, match=f"'{name}': text with half a surrogate pair") as error:
        read_config(folder)
    assert str(error.value).encode()


def test_name_with_half_a_surrogate_pair_is_refused(folder: Path) -> None:
    edit(folder, **{"\ud800": 1})
    with pytest.raises(AdapterError, match=r"'\\ud800': text with half a surrogate pair") as error:
        read_config(folder)
    assert str(error.value).encode()


def test_whole_surrogate_pair_is_a_character(folder: Path) -> None:
    edit(folder, description="\U0001f600")
    assert "ud83d" in (folder / CONFIG_FILE).read_text(encoding="utf-8")
    assert read_config(folder).description == "\U0001f600"


@pytest.mark.parametrize("has_weights", [True, False])
def test_folder_of_peft_is_told_by_its_type(folder: Path, has_weights: bool) -> None:
    values = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "base_model_name_or_path": "x"}
    (folder / CONFIG_FILE).write_text(json.dumps(values), encoding="utf-8")
    if not has_weights:
        (folder / TENSOR_FILE).rename(folder / "adapter_model.bin")
    message = "a PEFT adapter of type 'LORA', which is not served; served are side networks and"
    with pytest.raises(AdapterError, match=message):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": FORMAT_VERSION + 1}, "format_version 2 is newer than 1, .* update"),
        ({"format_version": 2, "novelty": 1, "chain": ...}, "format_version 2 is newer"),
        ({"format_version": 0}, "format_version must be an integer of at least 1, got 0"),
        ({"format_version": "1"}, "format_version must be an integer of at least 1, got '1'"),
        ({"base_id": 3}, "base_id must be a string, got 3"),
        ({"fields": []}, r"fields must be an object, got \[\]"),
        ({"chain": "abc"}, "chain must be a list of strings, got 'abc'"),
        ({"chain": [1]}, r"chain must be a list of strings, got \[1\]"),
        ({"novelty": 1, "base_fingerprint": ...}, "novelty: unknown; base_fingerprint: missing"),
        ({"method": None, "base_id": 1}, "method must be a string, got None; base_id must be .*"),
    ],
)
def test_config_with_wrong_fields_is_refused(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    edit(folder, **changes)
    with pytest.raises(AdapterError, match=message):
        read_config(folder)


def make_host(fingerprint: str, model_id: str, chain: tuple[str, ...] = ()) -> Host:
    spec: Any = None
    return Host(
        spec=spec, fingerprint=fingerprint, quantization="nf4", model_id=model_id, chain=chain
    )


@pytest.mark.parametrize(
    ("model_id", "fingerprint", "chain", "message"),
    [
        (
            "other",
            "cd" * 32,
            (),
            "trained on tiny .*abababababab.*base is other .*cdcdcdcdcdcd",
        ),
        ("tiny", "cd" * 32, (), "the name is the same, but the weights or how they are quantised"),
        ("tiny", "ab" * 32, ("x",), "made for the base itself; this is the base with x"),
    ],
)
def test_wrong_base_is_refused(
    model_id: str, fingerprint: str, chain: tuple[str, ...], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        check_base(CONFIG, make_host(fingerprint, model_id, chain))


def test_right_base_is_accepted_under_any_name() -> None:
    assert check_base(CONFIG, make_host("ab" * 32, "renamed")) is None
