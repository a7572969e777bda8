"""What a training run tells: `metrics.jsonl`, a plot of the losses, a progress bar."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from adapters.qst.training_state import TrainingError

METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "loss.png"


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

    def add_step(self, record: Mapping[str, Any]) -> None:
        """Write the record of a step and move the bar."""
        self.add(record)
        self._bar.set_postfix_str(f"loss {record['loss']:.4f}", refresh=False)
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


def plot_losses(folder: Path) -> None:
    """Draw the losses of `metrics.jsonl` into `loss.png`.

    Raises:
        TrainingError: the file cannot be written.
    """
    # Takes a second to load and is of no use until here.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(folder)
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = [r for r in records if r["event"] == "step"]
    evals = [r for r in records if r["event"] == "eval"]
    axes.plot([r["step"] for r in steps], [r["loss"] for r in steps], lw=0.8, label="training")
    if evals:
        axes.plot([r["step"] for r in evals], [r["loss"] for r in evals], "o-", label="held out")
    if evals and evals[0].get("base_loss") is not None:
        axes.axhline(evals[0]["base_loss"], color="grey", ls="--", label="base, held out")
    axes.set_xlabel("step")
    axes.set_ylabel("cross entropy (nats)")
    axes.legend()
    part = folder / f".{PLOT_FILE}.part"
    try:
        figure.savefig(part, format="png")
        part.replace(folder / PLOT_FILE)
    except OSError as error:
        raise TrainingError(f"{folder / PLOT_FILE}: cannot be written ({error})") from error
