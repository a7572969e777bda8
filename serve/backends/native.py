"""The embedded backend: our engine on its own thread, behind asyncio."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack

from prometheus_client.core import Metric

from decoding.sampler import Sampler
from serve.attachments.native import NativeRegistry
from serve.backends.protocol import (
    AdapterInfo,
    AdapterLoadError,
    AdapterNotFoundError,
    BackendStats,
    BackendUnavailableError,
    QueueFullError,
)
from serve.engine.engine import Engine, Outputs
from serve.engine.limits import EngineLimits
from serve.engine.model import Model
from serve.engine.sequence import NO_ATTACHMENT, Attachment, LiveRequest
from serve.engine.worker import EngineThread
from serve.requests import GenerationRequest, TokenOutput


class _Stream:
    """The outputs of one request on their way from the engine to the reader.

    Attributes:
        live: the request.
        open: indices of the sequences that have not ended.
    """

    def __init__(self, live: LiveRequest) -> None:
        self.live = live
        self.open = set(range(live.asked.num_sequences))
        self._steps: deque[list[TokenOutput]] = deque()
        self._has_steps = asyncio.Event()

    @property
    def is_exhausted(self) -> bool:
        return not self.open and not self._steps

    def put(self, outputs: list[TokenOutput]) -> None:
        for output in outputs:
            if output.finish_reason is not None:
                self.open.discard(output.sequence_index)
        self._steps.append(outputs)
        self._has_steps.set()

    async def get(self) -> list[TokenOutput]:
        while not self._steps:
            self._has_steps.clear()
            await self._has_steps.wait()
        return self._steps.popleft()


class NativeBackend:
    """Serves requests with `serve.engine`; implements `serve.backends.protocol.Backend`.

    Serves one event loop at a time.
    """

    def __init__(
        self,
        model: Model,
        sampler: Sampler,
        limits: EngineLimits,
        *,
        eos_token_ids: Sequence[int],
        adapters: NativeRegistry | None = None,
    ) -> None:
        """Allocate the cache and start the engine's thread.

        Args:
            model: a `models.decoder.Decoder`.
            sampler: a `decoding.Sampler` for the model's vocabulary.
            limits: of the engine and of the queue before it.
            eos_token_ids: tokens that end a sequence unless `ignore_eos`.
            adapters: what requests can name, over the same model; None: nothing.

        Raises:
            ValueError: the limits do not go with the model.
        """
        self._engine = Engine(model, sampler, limits, eos_token_ids=eos_token_ids)
        self._adapters = adapters
        self._loop: asyncio.AbstractEventLoop | None = None
        self._streams: dict[str, _Stream] = {}
        self._thread = EngineThread(self._engine, self._publish)
        self._thread.stopped.add_done_callback(lambda _: self._call_loop(self._fail_streams))

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._engine.vocab_size

    @property
    def max_context_tokens(self) -> int:
        """Longest prompt + continuation, in tokens."""
        return self._engine.limits.max_context_tokens

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[TokenOutput], None]:
        """Admit a request and yield its outputs, one list a step.

        Closing the generator, or cancelling the task that reads it, aborts what still runs before
        the next step.

        Raises:
            QueueFullError: no room in the queue (raised at the first `anext`).
            BackendUnavailableError: draining, stopped or broken.
            AdapterNotFoundError: an arm names an adapter that is not attached.
            AdapterLoadError: an adapter that had left memory cannot be read any more.
            ValueError: the request could never run, or its id is in use.
        """
        names = {arm.adapter for arm in request.arms if arm.adapter is not None}
        async with AsyncExitStack() as stack:
            used: dict[str | None, Attachment] = {None: NO_ATTACHMENT}
            if names:
                self._check_open()
                for name in sorted(names):
                    using = self._registry(name).use(name)
                    used[name] = await stack.enter_async_context(using)
            stream = self._admit(request, [used[arm.adapter] for arm in request.arms])
            try:
                while not stream.is_exhausted:
                    yield await stream.get()
            finally:
                del self._streams[request.request_id]
                if stream.open:
                    self._thread.abort(stream.live)

    def adapters(self) -> list[AdapterInfo]:
        """Return what is attached, in the order of names."""
        return self._adapters.infos() if self._adapters else []

    async def attach_adapter(self, name: str, path: str) -> AdapterInfo:
        """Load the adapter in a folder and serve it under a name; see `AdapterRegistry.attach`."""
        if self._adapters is None:
            raise AdapterLoadError("this server takes no adapters")
        info = await self._adapters.attach(name, path)
        if test := self._adapters.speed_test(name):
            self._thread.run_when_idle(test.step)
        return info

    async def detach_adapter(self, name: str) -> None:
        """Serve an adapter no more; see `AdapterRegistry.detach`."""
        self._registry(name).detach(name)

    def abort_sequence(self, request_id: str, sequence_index: int) -> None:
        """Stop one sequence of a running request; unknown ids are ignored."""
        stream = self._streams.get(request_id)
        if stream is not None:
            self._thread.abort_sequence(stream.live, sequence_index)

    def stats(self) -> BackendStats:
        """Return the counters and gauges of now."""
        engine, scheduler = self._engine, self._engine.scheduler
        return BackendStats(
            num_running_sequences=len(scheduler.running) - scheduler.num_probes,
            num_waiting_requests=self._thread.count_queued()[0],
            num_cache_blocks=engine.num_cache_blocks,
            num_free_cache_blocks=engine.num_available_cache_blocks,
            prompt_tokens=scheduler.num_prompt_tokens,
            cached_prompt_tokens=scheduler.num_cached_prompt_tokens,
            generated_tokens=engine.num_generated_tokens,
            preemptions=scheduler.num_preemptions,
            steps=engine.num_steps,
            is_draining=self._thread.is_draining,
            error=self._thread.error,
            num_side_cache_blocks=engine.num_side_cache_blocks,
            num_free_side_cache_blocks=engine.num_available_side_cache_blocks,
            base_cached_prompt_tokens=scheduler.num_base_cached_prompt_tokens,
        )

    def own_metrics(self) -> tuple[Metric, ...]:
        """Return nothing: `stats` has all that there is."""
        return ()

    async def drain(self, timeout_s: float) -> None:
        """Admit nothing new, wait for what runs and waits, abort what is left, and stop.

        Args:
            timeout_s: how long to wait before aborting, in seconds, >= 0.
        """
        self._thread.drain()
        stopped = asyncio.wrap_future(self._thread.stopped)
        await asyncio.wait([stopped], timeout=timeout_s)
        if not stopped.done():
            self._thread.stop()
            await asyncio.wait([stopped])

    def close(self) -> None:
        """Abort everything and stop, without an event loop; returns when the thread has ended."""
        self._thread.stop()
        self._thread.join()

    def _registry(self, name: str) -> NativeRegistry:
        if self._adapters is None:
            raise AdapterNotFoundError(f"no adapter is called {name!r}")
        return self._adapters

    def _check_open(self) -> None:
        if self._thread.error:
            raise BackendUnavailableError(self._thread.error)
        if self._thread.is_draining:
            raise BackendUnavailableError("the server is shutting down")

    def _admit(self, request: GenerationRequest, attachments: list[Attachment]) -> _Stream:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._streams:
                raise RuntimeError("the backend serves requests of another event loop")
            self._loop = loop
        self._check_open()
        if request.request_id in self._streams:
            raise ValueError(f"request_id {request.request_id!r} is in use")
        self._engine.check(request)
        self._check_queue(len(request.prompt_token_ids))
        live = LiveRequest(request, attachments)
        try:
            self._thread.submit(live)
        except RuntimeError as error:
            raise BackendUnavailableError(str(error)) from error
        stream = self._streams[request.request_id] = _Stream(live)
        return stream

    def _check_queue(self, num_new_tokens: int) -> None:
        limits = self._engine.limits
        num_requests, num_tokens = self._thread.count_queued()
        if num_requests and (
            num_requests >= limits.max_waiting_requests
            or num_tokens + num_new_tokens > limits.max_waiting_tokens
        ):
            raise QueueFullError(
                f"the queue is full: {num_requests} requests are waiting",
                self._thread.estimate_wait_s(),
            )

    def _publish(self, outputs: Outputs) -> None:
        """Hand a step's outputs to the event loop; called on the engine's thread."""
        if outputs and not self._call_loop(self._deliver, outputs):
            self._engine.abort_all()

    def _call_loop(self, work: Callable[..., None], *arguments: object) -> bool:
        """Do something on the event loop, from another thread; False if it is closed."""
        try:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(work, *arguments)
        except RuntimeError:  # it was closed under its requests
            return False
        return True

    def _deliver(self, outputs: Outputs) -> None:
        for live, steps in outputs.items():
            stream = self._streams.get(live.asked.request_id)
            if stream is not None and stream.live is live:
                stream.put(steps)

    def _fail_streams(self) -> None:
        """End what the engine's thread has left without an end."""
        for stream in self._streams.values():
            if stream.open:
                stream.put([TokenOutput(index, None, "error") for index in sorted(stream.open)])
