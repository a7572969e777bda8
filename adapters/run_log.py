"""What a training run leaves in its folder and tells: `metrics.jsonl`, a progress bar."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor
from tqdm import tqdm

from adapters.training_state import FOLDER, Progress, TrainingError, load_progress

METRICS_FILE = "metrics.jsonl"


class RunLog:
    """Appends records to `metrics.jsonl` and moves a progress bar, which shows on terminals only.

    Args:
        folder: of the run; must exist.
        num_steps: of the whole run.
        step: steps done already.
        num_bytes: keep this much of the file; what a killed run wrote after its checkpoint goes.
        report: told what the records of an evaluation say.
    """

    def __init__(
        self,
        folder: Path,
        *,
        num_steps: int,
        step: int,
        num_bytes: int,
        report: Callable[[str], None],
    ) -> None:
        self._path = folder / METRICS_FILE
        try:
            self._stream = self._path.open("r+b" if self._path.exists() else "w+b")
            self._stream.truncate(min(num_bytes, self._path.stat().st_size))
            self._stream.seek(0, os.SEEK_END)
        except OSError as error:
            raise TrainingError(f"{self._path}: cannot be written ({error})") from error
        self._bar = tqdm(total=num_steps, initial=step, unit="step", disable=None)
        self._report = report

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()
        self._stream.close()

    def add(self, record: Mapping[str, Any]) -> None:
        """Write a record.

        Raises:
            TrainingError: the file cannot be written.
        """
        try:
            self._stream.write((json.dumps(record) + "\n").encode())
            self._stream.flush()
        except OSError as error:
            raise TrainingError(f"{self._path}: cannot be written ({error})") from error

    def add_step(self, record: Mapping[str, Any], status: str) -> None:
        """Write the record of a step and move the bar, which shows the status."""
        self.add(record)
        self._bar.set_postfix_str(status, refresh=False)
        self._bar.update()

    def say(self, message: str) -> None:
        """Report a line without spoiling the bar."""
        self._bar.clear()
        self._report(message)
        self._bar.refresh()

    def sync(self) -> int:
        """Bring the file to the disk and return its length in bytes.

        Raises:
            TrainingError: the file cannot be written.
        """
        try:
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise TrainingError(f"{self._path}: cannot be written ({error})") from error
        return self._stream.tell()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run."""
    lines = (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def open_run(output: Path, *, resume: bool) -> tuple[Progress, dict[str, Tensor]] | None:
    """Make the folder of a run, or find the newest checkpoint in it.

    Args:
        output: new or empty, unless resuming.
        resume: go on with the run in it, if there is one.

    Returns:
        The checkpoint, or None for a run that starts.

    Raises:
        TrainingError: the folder cannot be used, its run is complete or its checkpoint damaged.
    """
    if output.exists() and not output.is_dir():
        raise TrainingError(f"output: {output} is a file; name a folder")
    found = load_progress(output / FOLDER) if resume else None
    if found is not None:
        return found
    if output.exists() and any(output.iterdir()) and not resume:
        raise TrainingError(
            f"output: {output} is not empty; name a new folder, or resume the run in it"
        )
    if resume and (output / METRICS_FILE).exists() and not (output / FOLDER).exists():
        raise TrainingError(f"output: the run in {output} is complete")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"output: {output} cannot be made ({error})") from error
    return None
