"""Checkpoints appear whole or not at all."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adapters import training_state as module
from adapters.training_state import (
    Progress,
    TrainingError,
    check_identity,
    load_progress,
    save_progress,
)

TENSORS = {"parameter.alpha": torch.tensor(0.5), "exp_avg.alpha": torch.tensor([1.0, 2.0])}
FIRST = Progress(step=3, identity={"seed": 0, "name": "a"}, metrics_bytes=17, num_tokens=9)
SECOND = Progress(step=6, identity={"seed": 0, "name": "a"}, state={"best_step": 4, "loss": 0.1})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert load_progress(tmp_path / "none") is None
    save_progress(tmp_path, FIRST, TENSORS)
    found = load_progress(tmp_path)
    assert found is not None
    assert found[0] == FIRST
    assert {n: t.tolist() for n, t in found[1].items()} == {
        n: t.tolist() for n, t in TENSORS.items()
    }


def test_older_checkpoint_goes_once_the_new_one_is_there(tmp_path: Path) -> None:
    save_progress(tmp_path, FIRST, TENSORS)
    save_progress(tmp_path, SECOND, TENSORS)
    assert names(tmp_path) == ["step-00000006"]


class Crash(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("call", range(8))
@pytest.mark.parametrize("failure", [Crash(), OSError(errno.ENOSPC, "No space left on device")])
def test_failure_at_any_moment_leaves_a_whole_checkpoint(
    call: int, failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_progress(tmp_path, FIRST, TENSORS)
    calls = iter(range(100))

    def failing(function: Callable) -> Callable:
        def wrapped(*arguments: object, **options: object) -> object:
            if next(calls) == call:
                raise failure
            return function(*arguments, **options)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", failing(Path.mkdir))
        patch.setattr(Path, "rename", failing(Path.rename))
        patch.setattr(module, "_write", failing(module._write))
        save_file = module.safetensors.torch.save_file
        patch.setattr(module.safetensors.torch, "save_file", failing(save_file))
        patch.setattr(os, "fsync", failing(os.fsync))
        with pytest.raises((Crash, TrainingError)) as raised:
            save_progress(tmp_path, SECOND, TENSORS)
    if isinstance(failure, OSError):
        assert "No space left" in str(raised.value)
    found = load_progress(tmp_path)
    assert found is not None
    assert found[0] in (FIRST, SECOND)
    save_progress(tmp_path, Progress(step=9, identity={}), TENSORS)
    assert names(tmp_path) == ["step-00000009"]


def test_half_written_folder_is_not_seen(tmp_path: Path) -> None:
    save_progress(tmp_path, FIRST, TENSORS)
    shutil.copytree(tmp_path / "step-00000003", tmp_path / ".part")
    found = load_progress(tmp_path)
    assert found is not None
    assert found[0].step == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("state.json", b"{", "is damaged"),
        ("state.json", b"[]", "is damaged"),
        ("state.json", b'{"version": 9}', "another version"),
        ("state.json", b'{"version": 2, "tensors_sha256": ""}', "not what was written"),
        ("state.safetensors", b"\0\0", "not what was written"),
    ],
)
def test_damaged_checkpoint_is_named(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    save_progress(tmp_path, FIRST, TENSORS)
    (tmp_path / "step-00000003" / name).write_bytes(content)
    with pytest.raises(TrainingError, match=f"step-00000003: .*{message}"):
        load_progress(tmp_path)


def test_first_checkpoint_that_fails_says_that_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match="step 3 cannot be saved .*; there is none yet"):
        save_progress(tmp_path / "file" / "checkpoints", FIRST, TENSORS)


def test_differing_options_are_all_named() -> None:
    check_identity({"a": 1, "b": [1, 2]}, {"a": 1, "b": [1, 2]})
    with pytest.raises(TrainingError, match="a: 1 then, 2 now; b: None then, 'x' now"):
        check_identity({"a": 1}, {"a": 2, "b": "x"})
