"""`serve.backends.protocol.Backend` over vLLM: engines for the base and its variants."""

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from functools import partial

from prometheus_client import REGISTRY
from prometheus_client.core import Metric
from vllm.v1.engine.exceptions import EngineDeadError

from decoding import derive_seed
from decoding.options import ParameterError
from serve.backends.protocol import (
    AdapterInfo,
    AdapterLoadError,
    BackendStats,
    BackendUnavailableError,
    QueueFullError,
)
from serve.backends.vllm.asked import Asked
from serve.backends.vllm.attachments import VllmAttachment, VllmRegistry
from serve.backends.vllm.engine import EngineLoop, VllmEngine
from serve.backends.vllm.reports import ReportReader
from serve.requests import Arm, GenerationRequest, TokenOutput

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Live:
    """A request in flight.

    Attributes:
        asked: what was asked for.
        outputs: lists of outputs on their way to the reader.
        open: indices of the sequences that have not ended.
        has_output: whether any has come.
        tasks: that run the sequences, on the engines' loop.
    """

    asked: GenerationRequest
    outputs: "asyncio.Queue[list[TokenOutput]]" = field(default_factory=asyncio.Queue)
    open: set[int] = field(default_factory=set)
    has_output: bool = False
    tasks: "dict[int, Future[None]]" = field(default_factory=dict)


class VllmBackend:
    """Serves requests with vLLM; implements `serve.backends.protocol.Backend`.

    Every sequence is a request of vLLM's. Those that share a prompt wait for the first of them to
    compute it, so that they find it in the cache.

    Args:
        base: the base's engine.
        engines: of all variants, with the base's.
        loop: where they run.
        reports: reads what their samplers report.
        adapters: what requests can name.
        vocab_size: number of token ids.
        max_context_tokens: longest prompt and continuation.
        end_token_ids: the model's.
        max_waiting_requests, max_waiting_tokens: of the queue.
    """

    def __init__(
        self,
        base: VllmEngine,
        engines: Sequence[VllmEngine],
        loop: EngineLoop,
        reports: ReportReader,
        adapters: VllmRegistry,
        *,
        vocab_size: int,
        max_context_tokens: int,
        end_token_ids: Sequence[int],
        max_waiting_requests: int,
        max_waiting_tokens: int,
    ) -> None:
        self._base = base
        self._engines = engines
        self._loop = loop
        self._reports = reports
        self._adapters = adapters
        self._vocab_size = vocab_size
        self._max_context_tokens = max_context_tokens
        self._end_token_ids = end_token_ids
        self._max_waiting = (max_waiting_requests, max_waiting_tokens)
        self._live: dict[str, _Live] = {}
        self._is_draining = False
        self._is_stopped = False
        self._num_tokens = 0
        self._keys = itertools.count()

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._vocab_size

    @property
    def max_context_tokens(self) -> int:
        """Longest prompt + continuation, in tokens."""
        return self._max_context_tokens

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[TokenOutput], None]:
        """Admit a request and yield its outputs; see the protocol."""
        self._check_open()
        async with AsyncExitStack() as stack:
            used: dict[str | None, VllmAttachment] = {None: VllmAttachment(engine=self._base)}
            for name in sorted({arm.adapter for arm in request.arms if arm.adapter is not None}):
                used[name] = await stack.enter_async_context(self._adapters.use(name))
            live = self._admit(request, [used[arm.adapter] for arm in request.arms])
            try:
                while live.open or not live.outputs.empty():
                    outputs = await live.outputs.get()
                    while not live.outputs.empty():
                        outputs += live.outputs.get_nowait()
                    yield outputs
            finally:
                del self._live[request.request_id]
                for task in live.tasks.values():
                    task.cancel()

    def _admit(self, request: GenerationRequest, attachments: list[VllmAttachment]) -> _Live:
        self._check_open()
        num_tokens, room = len(request.prompt_token_ids), self._base.max_model_tokens
        if request.request_id in self._live:
            raise ValueError(f"request_id {request.request_id!r} is in use")
        request.check(vocab_size=self._vocab_size, max_context_tokens=self._max_context_tokens)
        for arm in request.arms:
            if arm.params.strategy.look_ahead is not None:
                raise ParameterError(
                    f"decoding.strategy {arm.params.strategy.name} tries several continuations of "
                    "one prefix before it takes a token, which vLLM cannot; use the native backend",
                    param="decoding.strategy",
                )
            arm.params.check_vocabulary(self._vocab_size, self._end_token_ids)
            if not arm.params.max_tokens and num_tokens >= room:
                raise ValueError(
                    f"vLLM scores prompts of at most {room - 1} tokens here, got {num_tokens}"
                )
        self._check_queue(num_tokens)
        live = self._live[request.request_id] = _Live(request)
        live.open = set(range(request.num_sequences))
        self._start(live, attachments)
        return live

    def _start(self, live: _Live, attachments: list[VllmAttachment]) -> None:
        """Submit the sequences; of those that share a prompt's cache the first goes first."""
        request, index = live.asked, 0
        home = asyncio.get_running_loop()
        first: dict[object, asyncio.Event] = {}
        prefix = f"{request.request_id}-{next(self._keys)}"

        def put(outputs: list[TokenOutput]) -> None:
            # What comes of a sequence after it was aborted is nobody's.
            outputs = [output for output in outputs if output.sequence_index in live.open]
            for output in outputs:
                self._num_tokens += output.token_id is not None
                if output.finish_reason is not None:
                    live.open.discard(output.sequence_index)
            live.has_output = True
            if outputs:
                live.outputs.put_nowait(outputs)

        def deliver(outputs: list[TokenOutput]) -> None:
            if not home.is_closed():
                home.call_soon_threadsafe(put, outputs)

        for arm, attachment in zip(request.arms, attachments, strict=True):
            scale = arm.adapter_scale if attachment.side is not None else 0.0
            shared = (id(attachment.engine), id(attachment.side) if scale else None, scale)
            for number in range(arm.num_sequences):
                waits = shared in first and attachment.engine.shares(request.prompt_token_ids)
                done = first.setdefault(shared, asyncio.Event())
                run = self._run(
                    request, arm, number, index, f"{prefix}-{index}", attachment, deliver,
                    done=done, waits=waits,
                )  # fmt: skip
                task = live.tasks[index] = self._loop.submit(run)
                # Also of one that was cancelled before it began.
                task.add_done_callback(partial(_release, self._loop, done))
                index += 1

    async def _run(
        self,
        request: GenerationRequest,
        arm: Arm,
        number: int,
        index: int,
        key: str,
        attachment: VllmAttachment,
        deliver: Callable[[list[TokenOutput]], None],
        *,
        done: asyncio.Event,
        waits: bool,
    ) -> None:
        """Run a sequence on the engines' loop, and deliver what comes of it, its end included.

        Args:
            request, arm: what it belongs to.
            number: of the sequence in its arm.
            index: of the sequence in its request.
            key: names it to the engine.
            attachment: what it needs.
            deliver: takes lists of outputs.
            done: set once the prompt is in the cache.
            waits: for that.
        """
        engine, side = attachment.engine, attachment.side
        try:
            if waits:
                await done.wait()
            adapter = await side.at_scale(arm.adapter_scale) if side and arm.adapter_scale else None
            assert arm.params.seed is not None
            asked = Asked(
                params=arm.params, seed=derive_seed(arm.params.seed, number), key=key,
                prompt_is_template=request.prompt_is_template, is_traced=request.is_traced,
                head=attachment.head,
                classifier=str(side.address) if side and request.is_classification else None,
            )  # fmt: skip
            steps = engine.run(
                index, request.prompt_token_ids, asked, end_token_ids=self._end_token_ids,
                adapter=adapter, prompt_logprobs=None if index else request.prompt_logprobs,
            )  # fmt: skip
            ended = None
            async with aclosing(steps):
                async for outputs in steps:
                    done.set()
                    deliver(outputs)
                    ended = outputs[-1].finish_reason
                    if ended == "error":  # here: vLLM would go on
                        break
            if ended is not None:
                return
        except EngineDeadError:
            pass  # whoever asks for the engine's state is told
        except Exception as error:
            # Not its text: that may quote what a user sent.
            logger.error("a sequence failed in vLLM: %s", type(error).__name__)
        deliver([TokenOutput(index, None, "error")])

    def adapters(self) -> list[AdapterInfo]:
        """Return what is attached, in the order of names."""
        return self._adapters.infos()

    async def attach_adapter(self, name: str, path: str) -> AdapterInfo:
        """Load the adapter in a folder and serve it under a name; see `AdapterRegistry.attach`."""
        info = await self._adapters.attach(name, path)
        try:
            async with self._adapters.use(name) as attachment:
                if attachment.side is not None:
                    loading = attachment.engine.submit(attachment.side.at_scale(1.0))
                    await asyncio.wrap_future(loading)
        except ValueError as error:
            self._adapters.detach(name)
            logger.error("adapter %r cannot be loaded: %s", name, error)
            reason = "the server cannot load it; its log says why"
            raise AdapterLoadError(f"adapter {name!r}: {reason}") from error
        return info

    async def detach_adapter(self, name: str) -> None:
        """Serve an adapter no more; see `AdapterRegistry.detach`."""
        self._adapters.detach(name)

    def abort_sequence(self, request_id: str, sequence_index: int) -> None:
        """Stop one sequence of a running request; unknown ids are ignored."""
        live = self._live.get(request_id)
        if live is not None and sequence_index in live.open:
            live.tasks[sequence_index].cancel()
            live.open.discard(sequence_index)
            live.outputs.put_nowait([TokenOutput(sequence_index, None, "abort")])

    def stats(self) -> BackendStats:
        """Return the counters and gauges of now."""
        engines = self._engines
        errors = [error for engine in engines if (error := engine.error) is not None]
        num_blocks = sum(engine.num_blocks for engine in engines)
        used = sum(round(engine.stats.cache_usage * engine.num_blocks) for engine in engines)
        return BackendStats(
            num_running_sequences=sum(len(x.open) for x in self._live.values() if x.has_output),
            num_waiting_requests=self._count_waiting()[0],
            num_cache_blocks=num_blocks,
            num_free_cache_blocks=num_blocks - used,
            prompt_tokens=sum(engine.stats.prompt_tokens for engine in engines),
            cached_prompt_tokens=sum(engine.stats.cached_prompt_tokens for engine in engines),
            generated_tokens=self._num_tokens,
            preemptions=sum(engine.stats.preemptions for engine in engines),
            steps=sum(engine.stats.num_steps for engine in engines),
            is_draining=self._is_draining,
            error=errors[0] if errors and not self._is_stopped else None,
        )

    def own_metrics(self) -> Iterator[Metric]:
        """Yield the series that vLLM keeps of the base's engine."""
        for family in REGISTRY.collect():
            if family.name.startswith("vllm:"):
                yield family

    async def drain(self, timeout_s: float) -> None:
        """Admit nothing new, wait for what runs, abort what is left after `timeout_s`; stop."""
        self._is_draining = True
        end_s = asyncio.get_running_loop().time() + timeout_s
        while any(x.open for x in self._live.values()):
            if asyncio.get_running_loop().time() >= end_s:
                for request_id, live in self._live.items():
                    for index in sorted(live.open):
                        self.abort_sequence(request_id, index)
                break
            await asyncio.sleep(0.01)
        if not self._is_stopped:
            self._is_stopped = True
            await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Stop the engines; returns when their processes have ended."""
        self._is_stopped = self._is_draining = True
        for engine in self._engines:
            engine.close()

        async def stop() -> None:
            self._reports.close()

        self._loop.submit(stop()).result()
        self._loop.close()

    def _check_open(self) -> None:
        for engine in self._engines:
            if engine.error is not None and not self._is_stopped:
                raise BackendUnavailableError(engine.error)
        if self._is_draining:
            raise BackendUnavailableError("the server is shutting down")

    def _count_waiting(self) -> tuple[int, int]:
        """Return how many requests have no output yet, and the tokens of their prompts."""
        waiting = [x.asked for x in self._live.values() if x.open and not x.has_output]
        return len(waiting), sum(len(asked.prompt_token_ids) for asked in waiting)

    def _check_queue(self, num_new_tokens: int) -> None:
        num_requests, num_tokens = self._count_waiting()
        most_requests, most_tokens = self._max_waiting
        if num_requests and (
            num_requests >= most_requests or num_tokens + num_new_tokens > most_tokens
        ):
            raise QueueFullError(f"the queue is full: {num_requests} requests are waiting", 1)


def _release(loop: EngineLoop, done: asyncio.Event, _: "Future[None]") -> None:
    """Let those go on that wait for a sequence which has ended."""
    loop.call(done.set)
