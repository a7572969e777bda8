"""One run of a method: its steps, log, checkpoints, interruption, and how it goes on."""

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from adapters.run_log import RunLog, open_run
from adapters.training_state import (
    FOLDER,
    Progress,
    TrainingError,
    TrainingInterrupted,
    check_identity,
    save_progress,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """What a step tells.

    Attributes:
        fields: for `metrics.jsonl`; JSON values.
        status: for the progress bar.
        num_tokens: computed.
    """

    fields: Mapping[str, Any]
    status: str
    num_tokens: int


class Job(Protocol):
    """What a run computes.

    Attributes:
        rates: the options to lower where a step fails; empty: there are none.
    """

    rates: str

    def step(self, step: int) -> StepRecord:
        """Learn, at a step counted from 1.

        Raises:
            TrainingError: the loss or the gradient is not finite; nothing was changed.
        """
        ...

    def end_step(self, step: int, elapsed_s: float, log: RunLog) -> bool:
        """Evaluate, write what is ready; return whether a checkpoint is due whatever the interval.

        The run's progress counts the step already, which took `elapsed_s` seconds.
        """
        ...

    def state_tensors(self) -> dict[str, Tensor]:
        """Return all tensors that are needed to go on, by name."""
        ...


class Run:
    """A run that leaves everything in one folder, and resumed computes what it would have computed.

    Args:
        output: the folder.
        identity: every option, and what data and base are; a run resumes only with the same.
        num_steps: of the whole run.
        checkpoint_every: steps between checkpoints.
        report: told what happens, a line at a time.
        state: what the method keeps beside tensors, at the start; JSON values.

    Attributes:
        progress: where it is.
        checkpoints: folder of the checkpoints.
    """

    def __init__(
        self,
        output: Path,
        *,
        identity: Mapping[str, Any],
        num_steps: int,
        checkpoint_every: int,
        report: Callable[[str], None],
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.output, self.checkpoints = output, output / FOLDER
        self.progress = Progress(step=0, identity=identity, state=state or {})
        self._num_steps, self._checkpoint_every = num_steps, checkpoint_every
        self._report = report

    def prepare(self, resume: bool) -> dict[str, Tensor] | None:
        """Make the folder, or find the newest checkpoint in it and take over its progress.

        Returns:
            What `Job.state_tensors` returned then, or None for a run that starts.

        Raises:
            TrainingError: the folder cannot be used, or its run is another or complete.
        """
        found = open_run(self.output, resume=resume)
        if found is None:
            return None
        check_identity(found[0].identity, self.progress.identity)
        self.progress = found[0]
        self._report(f"resuming after step {self.progress.step} of {self._num_steps}")
        return found[1]

    def keep(self, **state: Any) -> None:
        """Change what the next checkpoint keeps beside tensors."""
        self.progress = replace(self.progress, state={**self.progress.state, **state})

    def open_log(self) -> RunLog:
        """Open the log where the progress is."""
        return RunLog(
            self.output, num_steps=self._num_steps, step=self.progress.step,
            num_bytes=self.progress.metrics_bytes, report=self._report,
        )  # fmt: skip

    def take_steps(self, job: Job, should_stop: Callable[[], bool]) -> None:
        """Do what is left of the steps.

        Args:
            job: started, or where the checkpoint was.
            should_stop: asked after each step.

        Raises:
            TrainingError: a step failed, or a file cannot be written.
            TrainingInterrupted: `should_stop` said so; a checkpoint is saved.
        """
        with self.open_log() as log:
            if self.progress.step == 0:
                self._save(job, log)
            for step in range(self.progress.step + 1, self._num_steps + 1):
                start_s = time.monotonic()
                record = self._step(job, step)
                elapsed_s = time.monotonic() - start_s
                speed = {"tokens_per_s": round(record.num_tokens / elapsed_s, 1)}
                log.add_step({"event": "step", "step": step, **record.fields, **speed},
                             record.status)  # fmt: skip
                num_tokens = self.progress.num_tokens + record.num_tokens
                self.progress = replace(self.progress, step=step, num_tokens=num_tokens)
                is_due = job.end_step(step, elapsed_s, log) or step == self._num_steps
                is_stopping = should_stop() and step < self._num_steps
                if is_due or is_stopping or step % self._checkpoint_every == 0:
                    self._save(job, log)
                if is_stopping:
                    raise TrainingInterrupted(step, self.checkpoints)

    def close(self) -> None:
        """Remove the checkpoints, which have served their purpose."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def _step(self, job: Job, step: int) -> StepRecord:
        try:
            return job.step(step)
        except TrainingError as error:
            hint = f"; a lower {job.rates} may help" if job.rates else ""
            raise TrainingError(
                f"step {step}: {error}; the last checkpoint is kept in {self.checkpoints}{hint}"
            ) from error

    def _save(self, job: Job, log: RunLog) -> None:
        self.progress = replace(self.progress, metrics_bytes=log.sync())
        save_progress(self.checkpoints, self.progress, job.state_tensors())
