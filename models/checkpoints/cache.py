"""Folders that appear whole or not at all, and the cache of converted checkpoints."""

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_STALE_S = 24 * 3600.0


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
    part = target.parent / f".part-{os.getpid()}-{secrets.token_hex(4)}"
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
    for path in folder.glob(".part-*"):
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
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    target = cache_dir / "checkpoints" / f"{name}-{digest[:16]}"
    if not target.is_dir():
        with whole_folder(target) as part:
            build(part)
    return target
