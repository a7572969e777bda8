"""The folder of a run: its settings, by which a run is known again, and its files."""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from evaluation.errors import RunError
from evaluation.records import RecordLog

SETTINGS = "run.json"


class SettingsError(ValueError):
    """A folder holds a run with other settings."""


def open_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder of a run, or check that the run in it is this one.

    Args:
        folder: made if missing.
        settings: everything that results depend on.

    Raises:
        SettingsError: it holds another run; the settings that differ are named.
        RunError: it cannot be written.
    """
    path = folder / SETTINGS
    # As it is read again: tuples are lists then.
    settings = json.loads(json.dumps(settings))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _check_same(json.loads(path.read_text(encoding="utf-8")), settings, folder)
        elif any(folder.iterdir()):
            raise SettingsError(f"{folder} is not empty, and holds no evaluation")
        else:
            write_whole(path, json.dumps(settings, indent=1) + "\n")
    except json.JSONDecodeError:
        raise SettingsError(f"{path} is damaged") from None
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror}") from None


def _check_same(old: Any, new: Mapping[str, Any], folder: Path) -> None:
    names = sorted({*old, *new}) if isinstance(old, dict) else list(new)
    changed = [
        name for name in names if not isinstance(old, dict) or old.get(name) != new.get(name)
    ]
    if changed:
        raise SettingsError(
            f"{folder} holds a run with another {', '.join(changed)}; give another folder, or the "
            "same settings to go on with it"
        )


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all.

    Raises:
        RunError: it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise RunError(f"{path} cannot be written: {error.strerror}") from None


def file_names(labels: Sequence[str]) -> dict[str, str]:
    """Return a name that any file system takes for each label, no two the same."""
    names: dict[str, str] = {}
    for label in labels:
        name = stem = re.sub(r"[^A-Za-z0-9._@=-]+", "-", label).strip("-.") or "arm"
        number = 2
        while name.lower() in {used.lower() for used in names.values()}:
            name, number = f"{stem}-{number}", number + 1
        names[label] = name
    return names


def open_logs(
    folder: Path, labels: Sequence[str], ending: str, stack: ExitStack
) -> dict[str, RecordLog]:
    """Open a log for each arm, by its label, until the stack is closed.

    Args:
        folder: of the logs.
        labels: of the arms.
        ending: of the files' names, after the arm's own.
        stack: closes them.

    Raises:
        RunError: one cannot be written.
    """
    return {
        label: stack.enter_context(RecordLog(folder / f"{name}{ending}"))
        for label, name in file_names(labels).items()
    }


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        RunError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from None


def seed_of(seed: int, *parts: str | int) -> int:
    """Return the seed of one sample: equal for all arms, independent between tasks and samples.

    Returns:
        31 bits, which every server takes.
    """
    text = "\0".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
