"""The file that says what is compared."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from client.address import parse_address
from evaluation.errors import DataFileError
from evaluation.records import shown
from evaluation.server import Arm

_OWN = ("label", "model", "url", "key_env")


def read_arms(path: Path, *, url: str, key: str, environ: Mapping[str, str]) -> list[Arm]:
    """Return the arms of a YAML file.

    Args:
        path: a list of arms under `arms`, each with `model` and perhaps `label`, `url`, `key_env`
            (the variable that holds the server's key) and any fields of requests.
        url, key: for arms without their own.
        environ: where keys are.

    Raises:
        DataFileError: it cannot be read, or an arm is wrong; the arm, the field and the reason are
            named.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataFileError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        place = getattr(error, "problem_mark", None)
        line = "" if place is None else f", line {place.line + 1}"
        raise DataFileError(f"{path}{line}: no YAML") from None
    entries = content.get("arms") if isinstance(content, dict) else None
    if not isinstance(entries, list) or len(entries) < 2:
        raise DataFileError(f"{path}: arms must be a list of at least two")
    if unknown := sorted(map(str, set(content) - {"arms"})):
        raise DataFileError(f"{path}: {unknown[0]} is unknown; the file has arms only")
    arms = [
        _read(entry, f"{path}, arms[{index}]", url=url, key=key, environ=environ)
        for index, entry in enumerate(entries)
    ]
    labels = [arm.label for arm in arms]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise DataFileError(f"{path}: two arms are labelled {shown(twice[0])}; give labels")
    return arms


def _read(entry: Any, place: str, *, url: str, key: str, environ: Mapping[str, str]) -> Arm:
    if not isinstance(entry, dict) or not all(isinstance(name, str) for name in entry):
        raise DataFileError(f"{place}: must be an object, got {shown(entry)}")
    for name in _OWN:
        if name in entry and (not isinstance(entry[name], str) or not entry[name]):
            raise DataFileError(f"{place}.{name} must be a text, got {shown(entry[name])}")
    if "model" not in entry:
        raise DataFileError(f"{place}.model is missing")
    for name in ("seed", "n", "stream", "messages", "prompt", "max_tokens"):
        if name in entry:
            raise DataFileError(f"{place}.{name}: is the same for all arms and set by the command")
    own_url = url
    if "url" in entry:
        try:
            own_url = parse_address(entry["url"])
        except ValueError as error:
            raise DataFileError(f"{place}.url: {error}") from None
    own_key = key if own_url == url else ""
    if "key_env" in entry:
        own_key = environ.get(entry["key_env"], "")
        if not own_key:
            raise DataFileError(f"{place}.key_env: the variable {entry['key_env']} is not set")
    fields = {name: value for name, value in entry.items() if name not in _OWN}
    return Arm(
        label=str(entry.get("label", entry["model"])), model=entry["model"], fields=fields,
        url=own_url, key=own_key,
    )  # fmt: skip
