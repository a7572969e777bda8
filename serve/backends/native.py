"""The embedded backend: our engine on its own thread, behind asyncio."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack

import torch

from decoding.sampler import Sampler
from serve.attachments.registry import NO_ATTACHMENT, AdapterRegistry, Attachment
from serve.backends.protocol import (
    AdapterInfo,
    AdapterLoadError,
    AdapterNotFoundError,
    Arm,
    BackendStats,
    BackendUnavailableError,
    GenerationRequest,
    QueueFullError,
    TokenLogprob,
    TokenOutput,
    TokenTrace,
)
from serve.engine.engine import Engine, Outputs
from serve.engine.model import Model
from serve.engine.sequence import Branch, Request, ScoredToken, SequenceOutput
from serve.engine.worker import EngineThread


class _Stream:
    """The outputs of one request on their way from the engine to the reader."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.num_open = request.num_sequences
        self._steps: deque[list[TokenOutput]] = deque()
        self._has_steps = asyncio.Event()

    @property
    def is_exhausted(self) -> bool:
        return not self.num_open and not self._steps

    def put(self, outputs: list[SequenceOutput]) -> None:
        self.num_open -= sum(output.finish_reason is not None for output in outputs)
        self._steps.append([_token_output(output) for output in outputs])
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
        *,
        eos_token_ids: Sequence[int],
        num_cache_blocks: int,
        block_size: int = 16,
        max_batch_tokens: int = 512,
        max_running_sequences: int = 64,
        max_waiting_requests: int = 256,
        max_waiting_tokens: int = 131_072,
        prefix_caching: bool = True,
        cache_dtype: torch.dtype | None = None,
        max_context_tokens: int | None = None,
        num_side_cache_blocks: int | None = None,
        adapters: AdapterRegistry | None = None,
    ) -> None:
        """Allocate the cache and start the engine's thread.

        Args:
            model: a `models.decoder.Decoder`.
            sampler: a `decoding.Sampler` for the model's vocabulary.
            eos_token_ids: tokens that end a sequence unless `ignore_eos`.
            num_cache_blocks: blocks of the KV cache, >= 1.
            block_size: positions in a block.
            max_batch_tokens: tokens that a step computes at most, >= max_running_sequences.
            max_running_sequences: sequences that own cache blocks at most.
            max_waiting_requests: requests that wait for admission at most, >= 1.
            max_waiting_tokens: their prompt tokens at most, >= 1; one request may exceed it when
                no other waits.
            prefix_caching: reuse the cache between sequences that start alike.
            cache_dtype: of keys and values; None leaves it to the model.
            max_context_tokens: longest prompt + continuation; None: what model and cache allow.
            num_side_cache_blocks: as in `Engine`.
            adapters: what requests can name, over the same model; None: nothing.

        Raises:
            ValueError: a limit is out of range.
        """
        for name, value in (
            ("max_waiting_requests", max_waiting_requests),
            ("max_waiting_tokens", max_waiting_tokens),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._engine = Engine(
            model,
            sampler,
            eos_token_ids=eos_token_ids,
            num_cache_blocks=num_cache_blocks,
            block_size=block_size,
            max_batch_tokens=max_batch_tokens,
            max_running_sequences=max_running_sequences,
            prefix_caching=prefix_caching,
            cache_dtype=cache_dtype,
            max_context_tokens=max_context_tokens,
            num_side_cache_blocks=num_side_cache_blocks,
        )
        self._adapters = adapters
        self._max_waiting_requests = max_waiting_requests
        self._max_waiting_tokens = max_waiting_tokens
        self._loop: asyncio.AbstractEventLoop | None = None
        self._streams: dict[Request, _Stream] = {}
        self._requests: dict[str, Request] = {}
        self._thread = EngineThread(self._engine, self._publish)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._engine.vocab_size

    @property
    def max_context_tokens(self) -> int:
        """Longest prompt + continuation, in tokens."""
        return self._engine.max_context_tokens

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
            adapters: dict[str, Attachment] = {}
            if names:
                self._check_open()
                for name in sorted(names):
                    using = self._registry(name).use(name)
                    adapters[name] = await stack.enter_async_context(using)
            stream = self._admit(request, adapters)
            try:
                while not stream.is_exhausted:
                    yield await stream.get()
            finally:
                del self._streams[stream.request]
                del self._requests[request.request_id]
                if stream.num_open:
                    self._thread.abort(stream.request)

    def adapters(self) -> list[AdapterInfo]:
        """Return what is attached, in the order of names."""
        return self._adapters.infos() if self._adapters else []

    async def attach_adapter(self, name: str, path: str) -> AdapterInfo:
        """Load the adapter in a folder and serve it under a name; see `AdapterRegistry.attach`."""
        if self._adapters is None:
            raise AdapterLoadError("this server takes no adapters")
        return await self._adapters.attach(name, path)

    async def detach_adapter(self, name: str) -> None:
        """Serve an adapter no more; see `AdapterRegistry.detach`."""
        self._registry(name).detach(name)

    def abort_sequence(self, request_id: str, sequence_index: int) -> None:
        """Stop one sequence of a running request; unknown ids are ignored."""
        request = self._requests.get(request_id)
        if request is not None:
            self._thread.abort_sequence(request, sequence_index)

    def stats(self) -> BackendStats:
        """Return the counters and gauges of now."""
        engine, scheduler = self._engine, self._engine.scheduler
        return BackendStats(
            num_running_sequences=len(scheduler.running),
            num_waiting_requests=self._thread.num_queued_requests,
            num_cache_blocks=engine.num_cache_blocks,
            num_free_cache_blocks=engine.num_available_cache_blocks,
            prompt_tokens=scheduler.num_prompt_tokens,
            cached_prompt_tokens=scheduler.num_cached_prompt_tokens,
            generated_tokens=engine.num_generated_tokens,
            preemptions=scheduler.num_preemptions,
            steps=engine.num_steps,
            is_draining=self._thread.is_draining,
            error=engine.error,
            num_side_cache_blocks=engine.num_side_cache_blocks,
            num_free_side_cache_blocks=engine.num_available_side_cache_blocks,
            base_cached_prompt_tokens=scheduler.num_base_cached_prompt_tokens,
        )

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

    def _registry(self, name: str) -> AdapterRegistry:
        if self._adapters is None:
            raise AdapterNotFoundError(f"no adapter is called {name!r}")
        return self._adapters

    def _check_open(self) -> None:
        if self._engine.error:
            raise BackendUnavailableError(self._engine.error)
        if self._thread.is_draining:
            raise BackendUnavailableError("the server is shutting down")

    def _admit(self, request: GenerationRequest, adapters: Mapping[str, Attachment]) -> _Stream:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._streams:
                raise RuntimeError("the backend serves requests of another event loop")
            self._loop = loop
        self._check_open()
        if request.request_id in self._requests:
            raise ValueError(f"request_id {request.request_id!r} is in use")
        engine_request = Request(
            prompt_token_ids=request.prompt_token_ids,
            branches=tuple(_branch(arm, adapters) for arm in request.arms),
            prompt_is_template=request.prompt_is_template,
            prompt_logprobs=request.prompt_logprobs,
            is_traced=request.is_traced,
        )
        self._engine.check(engine_request)
        self._check_queue(len(request.prompt_token_ids))
        try:
            self._thread.submit(engine_request)
        except RuntimeError as error:
            raise BackendUnavailableError(str(error)) from error
        stream = _Stream(engine_request)
        self._streams[engine_request] = stream
        self._requests[request.request_id] = engine_request
        return stream

    def _check_queue(self, num_tokens: int) -> None:
        num_requests = self._thread.num_queued_requests
        num_tokens += self._thread.num_queued_tokens
        if num_requests and (
            num_requests >= self._max_waiting_requests or num_tokens > self._max_waiting_tokens
        ):
            raise QueueFullError(
                f"the queue is full: {num_requests} requests are waiting",
                self._thread.estimate_wait_s(),
            )

    def _publish(self, outputs: Outputs) -> None:
        """Hand a step's outputs to the event loop; called on the engine's thread."""
        if not outputs or self._loop is None:
            return
        try:
            self._loop.call_soon_threadsafe(self._deliver, outputs)
        except RuntimeError:  # the loop was closed under its requests
            self._engine.abort_all()

    def _deliver(self, outputs: Outputs) -> None:
        for request, request_outputs in outputs.items():
            stream = self._streams.get(request)
            if stream is not None:
                stream.put(request_outputs)


def _branch(arm: Arm, adapters: Mapping[str, Attachment]) -> Branch:
    attachment = NO_ATTACHMENT if arm.adapter is None else adapters[arm.adapter]
    return Branch(
        params=arm.params,
        num_sequences=arm.num_sequences,
        variant=attachment.variant,
        adapter=attachment.side,
        adapter_scale=arm.adapter_scale,
    )


def _token_logprob(scored: ScoredToken) -> TokenLogprob:
    return TokenLogprob(logprob=scored[0], top=scored[1])


def _token_output(output: SequenceOutput) -> TokenOutput:
    trace = None
    if output.token_class is not None:
        trace = TokenTrace(
            token_class=output.token_class,
            temperature=output.temperature,
            entropy=output.entropy,
        )
    prompt_logprobs = output.prompt_logprobs
    return TokenOutput(
        sequence_index=output.index,
        token_id=output.token_id,
        logprob=_token_logprob(output.scored) if output.scored else None,
        trace=trace,
        finish_reason=output.finish_reason,
        cached_prompt_tokens=output.num_cached_prompt_tokens,
        prompt_logprobs=None
        if prompt_logprobs is None
        else [None if scored is None else _token_logprob(scored) for scored in prompt_logprobs],
    )
