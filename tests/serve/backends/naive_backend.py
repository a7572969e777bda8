"""A backend without an engine: every sequence is generated token by token, over scripted logits.

It is what the conformance suite holds beside the native one, and what a new backend amounts to: one
file with a `build`, and one line in `BACKENDS`.
"""

import asyncio
import zlib
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from decoding import Sampler, SamplingParams, build_token_tables, derive_seed
from decoding.logprobs import token_logprobs
from serve.backends.building import BuiltBackend, Report
from serve.backends.protocol import (
    AdapterConflictError,
    AdapterInfo,
    AdapterLoadError,
    AdapterNotFoundError,
    BackendStats,
    BackendUnavailableError,
    QueueFullError,
)
from serve.config import ServeConfig
from serve.requests import (
    Arm,
    FinishReason,
    GenerationRequest,
    TokenLogprob,
    TokenOutput,
    TokenTrace,
)
from text.tokenizer import Tokenizer

EOS_TOKEN_ID = 256
CONTEXT_TOKENS = 2048


def build(config: ServeConfig, *, report: Report) -> BuiltBackend:
    """Build the backend of the tokenizer in a folder."""
    assert config.model is not None
    folder = Path(config.model)
    tokenizer = Tokenizer.from_folder(folder)
    report(f"scripted logits; {config.max_running_sequences} at once")
    return BuiltBackend(
        config=replace(config, kv_cache_tokens=CONTEXT_TOKENS, max_context=CONTEXT_TOKENS),
        model_name=folder.name,
        kernels="scripted",
        backend=NaiveBackend(config, tokenizer),
        tokenizer=tokenizer,
    )


class _Sequence(NamedTuple):
    index: int
    arm: Arm
    number: int


class NaiveBackend:
    """Implements `serve.backends.protocol.Backend`; a request is a slot that runs alone."""

    max_context_tokens = CONTEXT_TOKENS

    def __init__(self, config: ServeConfig, tokenizer: Tokenizer) -> None:
        token_bytes = tokenizer.token_bytes()
        self.vocab_size = len(token_bytes)
        self._sampler = Sampler(build_token_tables(token_bytes), eos_token_ids=(EOS_TOKEN_ID,))
        generator = torch.Generator().manual_seed(0)
        self._logits = 3 * torch.randn(997, self.vocab_size, generator=generator)
        self._slots = asyncio.Semaphore(config.max_running_sequences)
        self._config = config
        self._attached: dict[str, AdapterInfo] = {}
        self._running: dict[str, set[int]] = {}
        self._num_waiting = 0
        self._is_draining = False
        self._is_stopped = False
        self._num_tokens = 0
        for name, folder in config.adapters:
            self._attached[name] = self._load(name, Path(folder))

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[TokenOutput], None]:
        if self._is_draining:
            raise BackendUnavailableError("the server is shutting down")
        names = {arm.adapter for arm in request.arms if arm.adapter is not None}
        for name in names - self._attached.keys():
            raise AdapterNotFoundError(f"no adapter is called {name!r}")
        if request.request_id in self._running:
            raise ValueError(f"request_id {request.request_id!r} is in use")
        request.check(vocab_size=self.vocab_size, max_context_tokens=self.max_context_tokens)
        if self._num_waiting >= self._config.max_waiting_requests:
            raise QueueFullError(f"{self._num_waiting} requests are waiting", 1)
        self._running[request.request_id] = set()
        for name in names:
            self._count_user(name, 1)
        self._num_waiting += 1
        is_waiting = True
        try:
            async with self._slots:
                self._num_waiting -= 1
                is_waiting = False
                streams = {s.index: self._run(request, s) for s in _sequences(request)}
                while streams:
                    await asyncio.sleep(0)
                    yield self._step(request, streams)
        finally:
            self._num_waiting -= is_waiting
            del self._running[request.request_id]
            for name in names:
                self._count_user(name, -1)

    def _step(
        self, request: GenerationRequest, streams: dict[int, Iterator[TokenOutput]]
    ) -> list[TokenOutput]:
        outputs = []
        for index in list(streams):
            if self._is_stopped or index in self._running[request.request_id]:
                output = TokenOutput(index, None, "abort")
            else:
                output = next(streams[index])
            outputs.append(output)
            if output.finish_reason is not None:
                del streams[index]
        return outputs

    def _run(self, request: GenerationRequest, sequence: _Sequence) -> Iterator[TokenOutput]:
        arm, params, prompt = sequence.arm, sequence.arm.params, request.prompt_token_ids
        row = self._sampler.start(
            params, prompt, seed=derive_seed(params.seed or 0, sequence.number),
            prompt_is_template=request.prompt_is_template, is_traced=request.is_traced,
        )  # fmt: skip
        scored = None
        if request.prompt_logprobs is not None and sequence.index == 0:
            scored = self._score(prompt, arm, request.prompt_logprobs)
        if not params.max_tokens:
            yield TokenOutput(sequence.index, None, "length", prompt_logprobs=scored)
        history = list(prompt)
        for number in range(1, (params.max_tokens or 0) + 1):
            sampled = self._sampler.sample(self._next(history, arm)[None], [row])
            (token_id,) = sampled.token_ids
            row.append(token_id)
            history.append(token_id)
            self._num_tokens += 1
            logprob, entropy = sampled.logprobs[0], sampled.entropies[0]
            yield TokenOutput(
                sequence.index,
                token_id,
                _end(params, token_id, number),
                None if logprob is None else TokenLogprob(logprob, sampled.top[0]),
                None
                if entropy is None
                else TokenTrace(sampled.classes[0], sampled.temperatures[0], entropy),
                prompt_logprobs=scored if number == 1 else None,
            )

    def _next(self, history: list[int], arm: Arm) -> Tensor:
        """Return the (V,) logits after a history."""
        text = ",".join(map(str, history))
        logits = self._logits[zlib.crc32(text.encode()) % len(self._logits)]
        if arm.adapter is None or not arm.adapter_scale:
            return logits
        side = zlib.crc32(f"{text}{self._attached[arm.adapter].description}".encode())
        return logits + arm.adapter_scale * self._logits[side % len(self._logits)]

    def _score(self, prompt: list[int], arm: Arm, num_top: int) -> list[TokenLogprob | None]:
        found: list[TokenLogprob | None] = [None]
        for i in range(1, len(prompt)):
            logits = self._next(prompt[:i], arm)[None]
            found.append(TokenLogprob(*token_logprobs(logits, [prompt[i]], num_top=num_top)[0]))
        return found

    def own_metrics(self) -> tuple[()]:
        return ()

    def adapters(self) -> list[AdapterInfo]:
        return [self._attached[name] for name in sorted(self._attached)]

    async def attach_adapter(self, name: str, path: str) -> AdapterInfo:
        if name in self._attached:
            raise AdapterConflictError(f"an adapter is called {name!r} already")
        self._attached[name] = self._load(name, Path(self._config.adapter_root or "/") / path)
        return self._attached[name]

    async def detach_adapter(self, name: str) -> None:
        if name not in self._attached:
            raise AdapterNotFoundError(f"no adapter is called {name!r}")
        if self._attached[name].num_running:
            raise AdapterConflictError(f"requests use the adapter {name!r}")
        del self._attached[name]

    def abort_sequence(self, request_id: str, sequence_index: int) -> None:
        self._running.get(request_id, set()).add(sequence_index)

    def stats(self) -> BackendStats:
        num_running = len(self._running) - self._num_waiting
        return BackendStats(
            num_running_sequences=num_running, num_waiting_requests=self._num_waiting,
            num_cache_blocks=1, num_free_cache_blocks=1, prompt_tokens=0, cached_prompt_tokens=0,
            generated_tokens=self._num_tokens, preemptions=0, steps=0,
            is_draining=self._is_draining, error=None,
        )  # fmt: skip

    async def drain(self, timeout_s: float) -> None:
        self._is_draining = True
        try:
            await asyncio.wait_for(self._wait_until_idle(), timeout_s)
        except TimeoutError:
            self._is_stopped = True
            await self._wait_until_idle()

    async def _wait_until_idle(self) -> None:
        while self._running:
            await asyncio.sleep(0.001)

    def _load(self, name: str, folder: Path) -> AdapterInfo:
        if not folder.is_dir():
            raise AdapterLoadError(f"path must be a folder, got {folder}")
        return AdapterInfo(
            name=name, method="scripted", kind="side_network", description=folder.name,
            num_parameters=1, num_bytes=1,
            is_loaded=True, num_running=0, created=0,
        )  # fmt: skip

    def _count_user(self, name: str, change: int) -> None:
        info = self._attached[name]
        self._attached[name] = replace(info, num_running=info.num_running + change)


def _sequences(request: GenerationRequest) -> Iterator[_Sequence]:
    pairs = [(arm, number) for arm in request.arms for number in range(arm.num_sequences)]
    for index, (arm, number) in enumerate(pairs):
        yield _Sequence(index, arm, number)


def _end(params: SamplingParams, token_id: int, number: int) -> FinishReason | None:
    if token_id in params.stop_token_ids or (token_id == EOS_TOKEN_ID and not params.ignore_eos):
        return "stop"
    return "length" if number == params.max_tokens else None
