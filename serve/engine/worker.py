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
from serve.engine.sequence import LiveRequest

logger = logging.getLogger(__name__)

MAX_WAIT_S = 120
"""Longest waiting time that `EngineThread.estimate_wait_s` gives."""


class EngineThread:
    """Feeds an engine with requests and commands and steps it while there is work; sleeps
    otherwise.

    Every method but `join` may be called from any thread and returns at once.

    Attributes:
        stopped: done once the thread has ended, however it did.
        is_draining: `drain` or `stop` was called.
    """

    def __init__(self, engine: Engine, publish: Callable[[Outputs], None]) -> None:
        """Start the thread.

        Args:
            engine: from now on the thread alone may change it.
            publish: called on the thread with the outputs of each step.
        """
        self.stopped: Future[None] = Future()
        self.is_draining = False
        self._engine = engine
        self._publish = publish
        self._condition = threading.Condition()
        self._commands: list[Callable[[], None]] = []
        self._submitted: dict[LiveRequest, None] = {}
        self._queued: dict[LiveRequest, None] = {}
        self._idle_work: deque[Callable[[], bool]] = deque()
        self._is_stopping = False
        self._is_closed = False
        self._admission_times_s: deque[float] = deque(maxlen=64)
        self._restart_clock()
        self._thread = threading.Thread(target=self._run, name="proa-engine", daemon=True)
        self._thread.start()

    @property
    def error(self) -> str | None:
        """Why nothing can run any more, or None."""
        if self._engine.error is None and not self._thread.is_alive() and not self.is_draining:
            return "the engine's thread has ended"
        return self._engine.error

    def count_queued(self) -> tuple[int, int]:
        """Count the requests of which nothing was admitted yet, and their prompt tokens."""
        with self._condition:
            lengths = [
                len(request.asked.prompt_token_ids) for request in self._queued if request.is_queued
            ]
        return len(lengths), sum(lengths)

    def submit(self, request: LiveRequest) -> None:
        """Queue a checked request.

        Raises:
            RuntimeError: the thread has ended.
        """
        with self._condition:
            if self._is_closed:
                raise RuntimeError("the engine has stopped")
            if not any(other.is_queued for other in self._queued):
                self._restart_clock()
            self._queued[request] = self._submitted[request] = None
            self._condition.notify()

    def abort(self, request: LiveRequest) -> None:
        """End all sequences of a request before the next step; a finished one is ignored.

        One that waits leaves the queue at once, whatever step is in progress; one that the engine
        has not even seen ends without an output.
        """
        with self._condition:
            self._queued.pop(request, None)
            if request in self._submitted:
                del self._submitted[request]
                return
            self._commands.append(partial(self._engine.abort, request))
            self._condition.notify()

    def abort_sequence(self, request: LiveRequest, index: int) -> None:
        """End one sequence of a request before the next step; a finished one is ignored."""
        with self._condition:
            self._commands.append(partial(self._engine.abort_sequence, request, index))
            self._condition.notify()

    def run_when_idle(self, work: Callable[[], bool]) -> None:
        """Call a function on the thread while there is nothing else to do, until it returns False.

        It may run the model. Each call is short: a request that comes meanwhile waits for its end.
        """
        with self._condition:
            self._idle_work.append(work)
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
        num_requests, _ = self.count_queued()
        with self._condition:
            times_s = list(self._admission_times_s)
        seconds_each = (time.monotonic() - times_s[0]) / max(1, len(times_s) - 1)
        return min(MAX_WAIT_S, max(1, math.ceil(num_requests * seconds_each)))

    def _restart_clock(self) -> None:
        self._admission_times_s.clear()
        self._admission_times_s.append(time.monotonic())

    def _run(self) -> None:
        try:
            while self._take_orders():
                self._step()
                if self._idle_work and not self._engine.has_work:
                    self._do_idle_work()
        except BaseException as error:  # whatever it is, nobody above would tell the clients
            logger.error("the engine failed: %s", describe_error(error))
            self._engine.abandon(error)
        finally:
            try:
                self._close()
            finally:
                self.stopped.set_result(None)

    def _step(self) -> None:
        """Take a step; in a method, so that nothing of it is held while the thread sleeps."""
        outputs = self._engine.step()
        if outputs:
            self._publish(outputs)

    def _take_orders(self) -> bool:
        """Sleep until there is something to do, and let the engine know of it; False: end."""
        engine = self._engine
        with self._condition:
            self._count_admissions()
            while not (
                self._submitted
                or self._commands
                or self._idle_work
                or engine.has_work
                or self.is_draining
            ):
                self._condition.wait()
            has_ended = not (self._submitted or self._commands or engine.has_work)
            if self._is_stopping or (self.is_draining and has_ended):
                return False
            submitted, self._submitted = self._submitted, {}
            commands, self._commands = self._commands, []
        for request in submitted:
            engine.add(request)
        for command in commands:
            command()
        return True

    def _count_admissions(self) -> None:
        """Forget those that wait no more, and note when they were admitted."""
        left = [request for request in self._queued if not request.is_queued]
        for request in left:
            del self._queued[request]
        self._admission_times_s.extend([time.monotonic()] * len(left))

    def _do_idle_work(self) -> None:
        """Take one step of the first piece of idle work; one that fails is dropped."""
        try:
            has_more = self._idle_work[0]()
        except Exception as error:
            logger.error("idle work failed: %s", describe_error(error))
            has_more = False
        if not has_more:
            self._idle_work.popleft()

    def _close(self) -> None:
        """End what is left, so that no request is ever without an end."""
        with self._condition:
            self._is_closed = True
            submitted, self._submitted = self._submitted, {}
            self._commands.clear()
            self._queued.clear()
        for request in submitted:
            self._engine.add(request)
        self._engine.abort_all()
        self._publish(self._engine.take_outputs())
