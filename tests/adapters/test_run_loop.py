"""The loop that drives every method's runs, with a job that only counts."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from adapters.run_log import RunLog, read_metrics
from adapters.run_loop import Run, StepRecord
from adapters.training_state import TrainingError, TrainingInterrupted, load_progress


class Counter:
    """Adds the step's number to a sum, which is all of its state."""

    rates = "speed"

    def __init__(self, run: Run, *, due: tuple[int, ...] = (), broken: int = 0) -> None:
        self.sum = torch.zeros(1)
        self.saved: list[int] = []
        self._run, self._due, self._broken = run, due, broken

    def step(self, step: int) -> StepRecord:
        if step == self._broken:
            raise TrainingError("the sum is nan")
        self.sum += step
        fields = {"sum": float(self.sum)}
        return StepRecord(fields=fields, status="", num_tokens=10 * step)

    def end_step(self, step: int, elapsed_s: float, log: RunLog) -> bool:
        assert self._run.progress.step == step
        self._run.keep(last=step)
        return step in self._due

    def state_tensors(self) -> dict[str, Tensor]:
        self.saved.append(self._run.progress.step)
        return {"sum": self.sum}


def make_run(output: Path, lines: list[str] | None = None, seed: int = 0) -> Run:
    return Run(
        output, identity={"seed": seed}, num_steps=7, checkpoint_every=3,
        report=[].append if lines is None else lines.append,
    )  # fmt: skip


def start(output: Path, *, stop_after: int = 99, due: tuple[int, ...] = ()) -> Counter:
    run = make_run(output)
    tensors = run.prepare(resume=True)
    job = Counter(run, due=due)
    if tensors is not None:
        job.sum.copy_(tensors["sum"])
    run.take_steps(job, lambda: run.progress.step >= stop_after)
    return job


def without_speed(folder: Path) -> list[dict]:
    return [{k: v for k, v in r.items() if k != "tokens_per_s"} for r in read_metrics(folder)]


def test_checkpoints_are_at_the_interval_at_the_end_and_where_they_are_due(tmp_path: Path) -> None:
    assert start(tmp_path / "plain").saved == [0, 3, 6, 7]
    assert start(tmp_path / "due", due=(4,)).saved == [0, 3, 4, 6, 7]


def test_steps_are_logged_with_their_speed(tmp_path: Path) -> None:
    start(tmp_path)
    records = read_metrics(tmp_path)
    assert [r["sum"] for r in records] == [1, 3, 6, 10, 15, 21, 28]
    assert set(records[0]) == {"event", "step", "sum", "tokens_per_s"}


@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_stopped_run_goes_on_as_if_nothing_had_happened(stop_after: int, tmp_path: Path) -> None:
    with pytest.raises(TrainingInterrupted, match=f"stopped after step {stop_after}"):
        start(tmp_path / "parts", stop_after=stop_after)
    parts, whole = start(tmp_path / "parts"), start(tmp_path / "whole")
    assert parts.sum == whole.sum == 28
    assert without_speed(tmp_path / "parts") == without_speed(tmp_path / "whole")
    found = [load_progress(tmp_path / name / "checkpoints") for name in ("parts", "whole")]
    first, second = [item[0] for item in found if item is not None]
    assert first.num_tokens == second.num_tokens == 280
    assert first.state == second.state == {"last": 7}


def test_stop_at_the_last_step_is_the_end(tmp_path: Path) -> None:
    assert start(tmp_path, stop_after=7).sum == 28


def test_step_that_fails_keeps_the_checkpoint_and_says_what_helps(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert run.prepare(resume=False) is None
    message = r"step 5: the sum is nan; the last checkpoint is kept in .*; a lower speed may help"
    with pytest.raises(TrainingError, match=message):
        run.take_steps(Counter(run, broken=5), lambda: False)
    assert start(tmp_path).sum == 28


def test_other_identity_is_not_resumed(tmp_path: Path) -> None:
    with pytest.raises(TrainingInterrupted):
        start(tmp_path, stop_after=2)
    with pytest.raises(TrainingError, match="seed: 0 then, 1 now"):
        make_run(tmp_path, seed=1).prepare(resume=True)
    lines: list[str] = []
    assert make_run(tmp_path, lines).prepare(resume=True) is not None
    assert lines == ["resuming after step 2 of 7"]


def test_closed_run_has_no_checkpoints_and_is_complete(tmp_path: Path) -> None:
    start(tmp_path)
    run = make_run(tmp_path)
    assert run.prepare(resume=True) is not None
    run.close()
    assert not run.checkpoints.exists()
    with pytest.raises(TrainingError, match="is complete"):
        make_run(tmp_path).prepare(resume=True)
