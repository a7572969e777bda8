"""vLLM's engine on an event loop of its own, and what comes of one sequence."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar, cast

from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs.engine import tokens_input
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.sampling_params import SamplingParams as VllmSamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import StatLoggerBase

from serve.backends.vllm.asked import Asked
from serve.backends.vllm.reports import ReportReader
from serve.requests import FinishReason, TokenLogprob, TokenOutput, TokenTrace

Result = TypeVar("Result")


class EngineLoop:
    """An event loop on a thread, for engines: they live as long as it does, whoever asks."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="vllm", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def submit(self, coroutine: Coroutine[Any, Any, Result]) -> "Future[Result]":
        """Run a coroutine there; callable from any thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def call(self, work: Callable[[], object]) -> None:
        """Call a function there, from any thread; once the loop is closed, not at all."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(work)

    def close(self) -> None:
        """Stop the loop; returns when the thread has ended."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


class StatsKeeper(StatLoggerBase):
    """Keeps what vLLM reports of its steps.

    Attributes:
        num_steps, prompt_tokens, cached_prompt_tokens, preemptions: counters.
        cache_usage: share of the cache's blocks that requests hold.
    """

    def __init__(self) -> None:
        self.num_steps = 0
        self.prompt_tokens = 0
        self.cached_prompt_tokens = 0
        self.preemptions = 0
        self.cache_usage = 0.0

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Count a step."""
        self.num_steps += 1
        if scheduler_stats is not None:
            self.cache_usage = scheduler_stats.kv_cache_usage
            self.cached_prompt_tokens += scheduler_stats.prefix_cache_stats.hits
        if iteration_stats is not None:
            self.prompt_tokens += iteration_stats.num_prompt_tokens
            self.preemptions += iteration_stats.num_preempted_reqs

    def log_engine_initialized(self) -> None:
        """Say nothing."""


class VllmEngine:
    """One model in vLLM: the base, or a variant.

    Args:
        arguments: of the engine.
        reports: reads what its sampler reports.
        loop: where it runs.

    Attributes:
        config: the engine's configuration, sizes resolved.
        stats: of its steps.
    """

    def __init__(self, arguments: AsyncEngineArgs, reports: ReportReader, loop: EngineLoop) -> None:
        self._reports = reports
        self._loop = loop
        self.stats = StatsKeeper()
        self._engine: AsyncLLM = loop.submit(self._start(arguments)).result()
        self.config: VllmConfig = self._engine.vllm_config
        self._is_closed = False

    async def _start(self, arguments: AsyncEngineArgs) -> AsyncLLM:
        return AsyncLLM.from_engine_args(
            arguments, stat_loggers=[lambda config, index=0: self.stats]
        )

    @property
    def num_blocks(self) -> int:
        """Blocks of the cache."""
        return int(self.config.cache_config.num_gpu_blocks or 0)

    @property
    def max_model_tokens(self) -> int:
        """Longest prompt and continuation; vLLM generates a token at least."""
        return int(self.config.model_config.max_model_len)

    def shares(self, prompt_token_ids: Sequence[int]) -> bool:
        """Whether sequences with a prompt may find a part of it in the cache."""
        cache = self.config.cache_config
        return bool(cache.enable_prefix_caching) and len(prompt_token_ids) > cache.block_size

    @property
    def error(self) -> str | None:
        """Why it cannot go on, or None; once it is closed, None."""
        if self._is_closed or not self._engine.errored:
            return None
        return f"vLLM's engine failed: {type(self._engine.dead_error).__name__}"

    def submit(self, coroutine: Coroutine[Any, Any, Result]) -> "Future[Result]":
        """Run a coroutine where the engine runs."""
        return self._loop.submit(coroutine)

    async def add(self, adapter: LoRARequest) -> None:
        """Have every worker load a side network.

        Raises:
            ValueError: a worker cannot; the message says why.
        """
        try:
            await self._engine.add_lora(adapter)
        except Exception as error:
            raise ValueError(str(error)) from error

    def forget(self, adapter_ids: Sequence[int]) -> None:
        """Have every worker forget side networks; callable from any thread."""

        async def remove() -> None:
            for adapter_id in adapter_ids:
                await self._engine.remove_lora(adapter_id)

        if not self._is_closed and not self._engine.errored:
            self._loop.submit(remove())

    def close(self) -> None:
        """Stop the workers; nothing can be asked of it any more."""

        async def stop() -> None:
            self._engine.shutdown()
            del self._engine

        if not self._is_closed:
            self._is_closed = True
            self._loop.submit(stop()).result()

    async def run(
        self,
        index: int,
        prompt_token_ids: list[int],
        asked: Asked,
        *,
        end_token_ids: Sequence[int],
        adapter: LoRARequest | None,
        prompt_logprobs: int | None,
    ) -> AsyncGenerator[list[TokenOutput], None]:
        """Yield the outputs of a sequence; runs on the engine's loop.

        Args:
            index: number of the sequence in its request.
            prompt_token_ids: the prompt.
            asked: what the sampler is told; its key is the request's id in the engine.
            end_token_ids: the model's end tokens.
            adapter: the side network it uses, or None.
            prompt_logprobs: as in `GenerationRequest`.
        """
        params, max_tokens = asked.params, asked.params.max_tokens or 0
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else end_token_ids)}
        is_reported = asked.is_traced or asked.classifier is not None
        num_logprobs = params.logprobs if max_tokens else None
        if num_logprobs is None and asked.is_traced and max_tokens:
            num_logprobs = 0
        settings = VllmSamplingParams(
            # The token is the only one that our sampler leaves.
            temperature=0.0, max_tokens=max(1, max_tokens), ignore_eos=True, detokenize=False,
            stop_token_ids=sorted(ends), logprobs=num_logprobs, prompt_logprobs=prompt_logprobs,
            output_kind=RequestOutputKind.DELTA, extra_args=asked.to_extra_args(),
        )  # fmt: skip
        if is_reported:
            self._reports.expect(asked.key)
        try:
            position = 0
            async for out in self._engine.generate(
                tokens_input(prompt_token_ids), settings, asked.key, lora_request=adapter
            ):
                outputs = await self._outputs(index, out, position, asked, prompt_logprobs)
                position += len(outputs)
                if outputs:
                    yield outputs
        finally:
            self._reports.forget(asked.key)

    async def _outputs(
        self,
        index: int,
        out: RequestOutput,
        position: int,
        asked: Asked,
        num_prompt_top: int | None,
    ) -> list[TokenOutput]:
        """Turn what vLLM gives of a sequence into outputs, one for each token."""
        (part,) = out.outputs
        tokens = list(part.token_ids)
        found: list[TokenOutput] = []
        is_scored = asked.params.logprobs is not None or asked.is_traced
        is_reported = asked.is_traced or asked.classifier is not None
        for i, token_id in enumerate(tokens):
            record = await self._reports.get(asked.key, position + i) if is_reported else {}
            is_last = out.finished and i == len(tokens) - 1
            reason = cast(FinishReason, part.finish_reason or "stop") if is_last else None
            if record.get("error"):
                return [*found, TokenOutput(index, None, "error")]
            output = TokenOutput(index, token_id, reason)
            if not asked.params.max_tokens:
                output = TokenOutput(index, None, "length")
                if "scores" in record:
                    scores = tuple(record["scores"])
                    output = TokenOutput(index, None, "stop", class_scores=scores)
            elif is_scored:
                assert part.logprobs is not None
                top = asked.params.logprobs or 0
                output = output._replace(logprob=_logprob(token_id, part.logprobs[i], top))
                if asked.is_traced:
                    trace = TokenTrace(
                        record["token_class"], record["temperature"], record["entropy"],
                        record["stage"],
                    )  # fmt: skip
                    output = output._replace(trace=trace)
            if position + i == 0:
                output = output._replace(
                    cached_prompt_tokens=out.num_cached_tokens or 0,
                    prompt_logprobs=_prompt_logprobs(out, num_prompt_top),
                )
            found.append(output)
        if out.finished and not tokens:
            found.append(TokenOutput(index, None, cast(FinishReason, part.finish_reason or "stop")))
        return found


def _prompt_logprobs(out: RequestOutput, num_top: int | None) -> list[TokenLogprob | None] | None:
    if num_top is None or out.prompt_logprobs is None:
        return None
    tokens = out.prompt_token_ids or []
    return [
        None if entry is None else _logprob(token_id, entry, num_top)
        for token_id, entry in zip(tokens, out.prompt_logprobs, strict=True)
    ]


def _logprob(token_id: int, entry: Mapping[int, Any], num_top: int) -> TokenLogprob:
    """Turn vLLM's logprobs of a token and of the likeliest ones into ours."""
    ranked = sorted((one.rank, other, one.logprob) for other, one in entry.items())
    top = tuple((other, logprob) for rank, other, logprob in ranked if rank <= num_top)
    return TokenLogprob(entry[token_id].logprob, top)
