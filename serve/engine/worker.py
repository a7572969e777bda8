"""The one thread that runs an engine."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from serve.engine.engine import Engine, Outputs, describe_error
from serve.engine.sequence import Request

logger = logging.getLogger(__name__)

MAX_WAIT_S = 120
"""Longest waiting time that `EngineThread.estimate_wait_s` gives."""


class EngineThread:
    """Feeds an engine with commands and steps it while there is work; sleeps otherwise.

    Every method but `join` may be called from any thread and returns at once.

    Attributes:
        stopped: done once the thread has ended.
        num_queued_requests: requests of which nothing was admitted yet.
        num_queued_tokens: prompt tokens of those requests.
        is_draining: `drain` or `stop` was called.
    """

    def __init__(self, engine: Engine, publish: Callable[[Outputs], None]) -> None:
        """Start the thread.

        Args:
            engine: from now on the thread alone may change it.
            publish: called on the thread with the outputs of each step.
        """
        self.stopped: Future[None] = Future()
        self.num_queued_requests = 0
        self.num_queued_tokens = 0
        self.is_draining = False
        self._engine = engine
        self._publish = publish
        self._condition = threading.Condition()
        self._commands: list[Callable[[], None]] = []
        self._submitted: list[Request] = []
        self._is_stopping = False
        self._is_closed = False
        self._admission_times_s: deque[float] = deque(maxlen=64)
        self._restart_clock()
        self._thread = threading.Thread(target=self._run, name="proa-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queue a checked request.

        Raises:
            RuntimeError: the thread has ended.
        """
        with self._condition:
            if self._is_closed:
                raise RuntimeError("the engine has stopped")
            if not self.num_queued_requests:
                self._restart_clock()
            self.num_queued_requests += 1
            self.num_queued_tokens += len(request.prompt_token_ids)
            self._submitted.append(request)
            self._commands.append(partial(self._engine.add, request))
            self._condition.notify()

    def abort(self, request: Request) -> None:
        """End all sequences of a request before the next step; a finished one is ignored."""
        with self._condition:
            self._commands.append(partial(self._engine.abort, request))
            self._condition.notify()

    def abort_sequence(self, request: Request, index: int) -> None:
        """End one sequence of a request before the next step; a finished one is ignored."""
        with self._condition:
            self._commands.append(partial(self._engine.abort_sequence, request, index))
            self._condition.notify()

    def drain(self) -> None:
        """End the thread once nothing is left to do."""
        with self._condition:
            self.is_draining = True
            self._condition.notify()

    def stop(self) -> None:
        """Abort everything and end the thread, after the step in progress."""
        with self._condition:
            self.is_draining = self._is_stopping = True
            self._condition.notify()

    def join(self) -> None:
        """Wait for the thread to end."""
        self._thread.join()

    def estimate_wait_s(self) -> int:
        """Estimate how long admitting the present queue takes.

        The pace is that of the latest admissions since requests began to wait.

        Returns:
            Whole seconds, 1 to `MAX_WAIT_S`.
        """
        times_s = list(self._admission_times_s)
        seconds_each = (time.monotonic() - times_s[0]) / max(1, len(times_s) - 1)
        return min(MAX_WAIT_S, max(1, math.ceil(self.num_queued_requests * seconds_each)))

    def _restart_clock(self) -> None:
        self._admission_times_s.clear()
        self._admission_times_s.append(time.monotonic())

    def _run(self) -> None:
        engine = self._engine
        try:
            while (commands := self._wait_for_commands()) is not None:
                for command in commands:
                    command()
                num_queued = engine.scheduler.num_queued_requests
                outputs = engine.step()
                num_admitted = num_queued - engine.scheduler.num_queued_requests
                self._admission_times_s.extend([time.monotonic()] * num_admitted)
                if outputs:
                    self._publish(outputs)
        except Exception as error:
            logger.error("the engine failed: %s", describe_error(error))
            engine.abandon(error)
        finally:
            self._close()

    def _wait_for_commands(self) -> list[Callable[[], None]] | None:
        """Sleep until there is something to do; None when the thread is to end."""
        scheduler = self._engine.scheduler
        with self._condition:
            self.num_queued_requests = scheduler.num_queued_requests + len(self._submitted)
            self.num_queued_tokens = scheduler.num_queued_tokens + sum(
                len(request.prompt_token_ids) for request in self._submitted
            )
            while not (self._commands or self._engine.has_work or self.is_draining):
                self._condition.wait()
            has_ended = not self._commands and not self._engine.has_work
            if self._is_stopping or (self.is_draining and has_ended):
                return None
            commands, self._commands = self._commands, []
            self._submitted.clear()
            return commands

    def _close(self) -> None:
        """End what is left, so that no request is ever without an end."""
        with self._condition:
            self._is_closed = True
            commands, self._commands = self._commands, []
        for command in commands:
            command()
        self._engine.abort_all()
        self.num_queued_requests = self.num_queued_tokens = 0
        self._publish(self._engine.take_outputs())
        self.stopped.set_result(None)
