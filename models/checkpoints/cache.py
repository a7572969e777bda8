"""Folders that appear whole or not at all, and the cache of converted checkpoints.

A cached folder keeps a checksum of each of its files, checked whenever it is used: damage by a disk
or by hand is told, not served. Whoever can write the folder can write the checksums too.
"""

import hashlib
import json
import os
import secrets
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from models.families import CheckpointError

_SUMS_FILE = "proa_sums.json"
_STALE_S = 24 * 3600.0
_CHUNK_BYTES = 1 << 20


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder beside `target` that takes its place on success.

    Whoever renames first wins: another process that finishes the same folder later discards its
    own. `target` must not be what is left of anything else.

    Args:
        target: folder to make.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target.parent)
    part = target.parent / f".proa-part-{os.getpid()}-{secrets.token_hex(4)}"
    part.mkdir()
    try:
        yield part
        for path in part.iterdir():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        try:
            part.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove what killed processes left more than a day ago."""
    for path in folder.glob(".proa-part-*"):
        try:
            is_stale = time.time() - path.stat().st_mtime > _STALE_S
        except FileNotFoundError:
            continue
        if is_stale:
            shutil.rmtree(path, ignore_errors=True)


def cached_folder(cache_dir: Path, name: str, key: object, build: Callable[[Path], None]) -> Path:
    """Return the cached folder for a key, building it the first time.

    Args:
        cache_dir: where the cache lies; made if missing.
        name: readable beginning of the folder's name.
        key: JSON value that changes whenever the content would.
        build: writes the content into an empty folder.

    Raises:
        CheckpointError: the content is not what was written, or the cache cannot be used; the
            message names file and folder.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    target = cache_dir / "checkpoints" / f"{name}-{digest[:16]}"
    try:
        if not target.is_dir():
            with whole_folder(target) as part:
                build(part)
                sums = {path.name: sum_file(path) for path in sorted(part.iterdir())}
                (part / _SUMS_FILE).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")
        damaged = _find_damage(target)
    except OSError as error:
        raise CheckpointError(
            f"{cache_dir}: the cache cannot be used ({error}); name another folder"
        ) from error
    if damaged is not None:
        raise CheckpointError(
            f"{target / damaged} is not what was written: the cache is damaged; remove {target}, "
            "and the next start makes it again"
        )
    return target


def _find_damage(folder: Path) -> str | None:
    """Return the name of a file that is another than when it was written, or None."""
    try:
        sums = json.loads((folder / _SUMS_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return _SUMS_FILE
    if not isinstance(sums, dict) or not sums:
        return _SUMS_FILE
    for name, written in sums.items():
        path = folder / name
        if not path.is_file() or sum_file(path) != written:
            return name
    return None


def sum_file(path: Path) -> str:
    """Return the CRC-32 of a file: it finds damage, not forgery."""
    crc = 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    return f"{crc:08x}"
