"""Run the prompts of one request and turn their tokens into text."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import NamedTuple

from decoding import SamplingParams
from serve.api.context import ApiContext
from serve.api.errors import GenerationFailedError
from serve.api.metrics import ArmMeter
from serve.backends.protocol import (
    Arm,
    BackendUnavailableError,
    GenerationRequest,
    TokenLogprob,
    TokenOutput,
)
from text.detokenizer import StopMatcher
from text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a request asks the backend for.

    Attributes:
        request_id: unique; each prompt gets its own suffix.
        prompts: token ids of each prompt.
        arms: what to make of each prompt.
        is_traced: report the decoding trace.
        prompt_logprobs, prompt_is_template: as in `GenerationRequest`.
        is_dry: nothing is asked of the model; every choice ends at once.
    """

    request_id: str
    prompts: Sequence[list[int]]
    arms: tuple[Arm, ...]
    is_traced: bool = False
    prompt_logprobs: int | None = None
    prompt_is_template: bool = False
    is_dry: bool = False

    @property
    def num_sequences(self) -> int:
        """Answers to each prompt."""
        return sum(arm.num_sequences for arm in self.arms)

    @property
    def num_choices(self) -> int:
        """How many answers there are in all."""
        return len(self.prompts) * self.num_sequences


class Piece(NamedTuple):
    """What one token adds to a choice.

    Attributes:
        choice: prompt index times number of sequences, plus sequence index.
        output: the token.
        text: text that has become certain; may be empty.
        offset: characters that the choice's tokens stood for before this one.
        finish_reason: set on a choice's last piece.
    """

    choice: int
    output: TokenOutput
    text: str
    offset: int
    finish_reason: str | None


class Choice:
    """Text and end of one choice.

    Attributes:
        meter: counts the choice's arm.
        num_tokens: generated so far.
        num_chars: what the tokens stand for, stop text included.
        num_cached_tokens: prompt tokens that the prefix cache had.
        last_s: when its last output came; 0 before the first.
        finish_reason: set at the end.
    """

    __slots__ = (
        "_detokenizer",
        "_keeps_stop",
        "_matcher",
        "_min_tokens",
        "finish_reason",
        "last_s",
        "meter",
        "num_cached_tokens",
        "num_chars",
        "num_tokens",
    )

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, meter: ArmMeter) -> None:
        self._detokenizer = tokenizer.make_detokenizer()
        self._keeps_stop = params.include_stop_str_in_output
        self._matcher = (
            StopMatcher(params.stop, is_included=self._keeps_stop) if params.stop else None
        )
        self._min_tokens = params.min_tokens
        self.meter = meter
        self.num_tokens = 0
        self.num_chars = 0
        self.num_cached_tokens = 0
        self.last_s = 0.0
        self.finish_reason: str | None = None

    def advance(self, output: TokenOutput) -> str:
        """Return the text that has become certain; set `finish_reason` at the end."""
        if not self.last_s:
            self.num_cached_tokens = output.cached_prompt_tokens
        self.last_s = self.meter.count_output(output, self.last_s)
        text = ""
        if output.token_id is not None:
            self.num_tokens += 1
            if output.finish_reason != "stop" or self._keeps_stop:
                text = self._detokenizer.feed(output.token_id)
        if output.finish_reason is not None:
            self.finish_reason = output.finish_reason
            text += self._detokenizer.flush()
        self.num_chars += len(text)
        matcher = self._matcher
        if matcher is None or self.num_tokens <= self._min_tokens:
            return text
        text = matcher.feed(text)
        if matcher.matched is not None:
            self.finish_reason = "stop"
        elif self.finish_reason is not None:
            text += matcher.flush()
        return text


class Generation:
    """One request on its way through the backend.

    Attributes:
        prompt_logprobs: of each prompt, once its first token has arrived and if asked for.
    """

    def __init__(self, context: ApiContext, job: Job) -> None:
        self._backend = context.backend
        self._job = job
        self._window = context.settings.max_concurrent_prompts
        self._prompt_tokens = sum(map(len, job.prompts))
        self._meters = [
            ArmMeter(context.metrics, arm.params.strategy.name, arm.adapter, self._prompt_tokens)
            for arm in job.arms
        ]
        self._choices = [
            Choice(context.tokenizer, arm.params, meter)
            for _ in job.prompts
            for arm, meter in zip(job.arms, self._meters, strict=True)
            for _ in range(arm.num_sequences)
        ]
        self._num_open = job.num_choices
        self._completion_tokens = 0
        self._cached_tokens = 0
        self.prompt_logprobs: list[list[TokenLogprob | None] | None] = [None] * len(job.prompts)

    def usage(self) -> dict[str, object]:
        """Return the OpenAI usage object of what has happened so far."""
        return _usage(self._prompt_tokens, self._completion_tokens, self._cached_tokens)

    def choice_usage(self, index: int) -> dict[str, object]:
        """Return the usage object of one choice alone."""
        choice = self._choices[index]
        num_prompt_tokens = len(self._job.prompts[index // self._job.num_sequences])
        return _usage(num_prompt_tokens, choice.num_tokens, choice.num_cached_tokens)

    async def steps(self) -> AsyncGenerator[list[Piece], None]:
        """Yield the pieces of each step until every choice has finished.

        Raises:
            QueueFullError, BackendUnavailableError: not admitted.
            GenerationFailedError: a sequence ended with an error.
        """
        if self._job.is_dry:
            yield [_end_at_once(choice) for choice in range(self._job.num_choices)]
            return
        early: dict[int, list[TokenOutput]] = {}
        reason = "abort"
        try:
            async with aclosing(self._merged()) as merged:
                async for prompt, outputs in merged:
                    if self._job.prompt_logprobs is not None:
                        outputs = self._hold_early(early, prompt, outputs)
                    pieces = self._advance(prompt, outputs)
                    if pieces:
                        yield pieces
                    if not self._num_open:
                        break
        except Exception:
            reason = "error"
            raise
        finally:
            self._record_end(reason)

    def _hold_early(
        self, early: dict[int, list[TokenOutput]], prompt: int, outputs: list[TokenOutput]
    ) -> list[TokenOutput]:
        """Hold a prompt's tokens until its log probabilities, which come before them, are there."""
        for output in outputs:
            if output.prompt_logprobs is not None:
                self.prompt_logprobs[prompt] = output.prompt_logprobs
        outputs = early.pop(prompt, []) + outputs
        if self.prompt_logprobs[prompt] is None and all(o.finish_reason is None for o in outputs):
            early[prompt] = outputs
            return []
        return outputs

    def _advance(self, prompt: int, outputs: list[TokenOutput]) -> list[Piece]:
        base = prompt * self._job.num_sequences
        pieces = []
        for output in outputs:
            index = base + output.sequence_index
            choice = self._choices[index]
            if choice.finish_reason is not None:
                continue
            if output.finish_reason in ("error", "abort"):
                self._fail(output.finish_reason)
            if not choice.last_s and output.sequence_index == 0:
                self._cached_tokens += output.cached_prompt_tokens
            if output.token_id is not None:
                self._completion_tokens += 1
            offset = choice.num_chars
            text = choice.advance(output)
            pieces.append(Piece(index, output, text, offset, choice.finish_reason))
            if choice.finish_reason is not None:
                self._num_open -= 1
                choice.meter.count_finish(choice.finish_reason)
                if output.finish_reason is None:
                    self._backend.abort_sequence(self._prompt_id(prompt), output.sequence_index)
        return pieces

    def _fail(self, reason: str) -> None:
        if reason == "abort":
            raise BackendUnavailableError("the server stopped the request")
        raise GenerationFailedError

    def _record_end(self, reason: str) -> None:
        for meter in self._meters:
            choices = [choice for choice in self._choices if choice.meter is meter]
            for choice in choices:
                if choice.finish_reason is None:
                    meter.count_finish(reason)
            meter.close(
                max(choice.last_s for choice in choices),
                max(choice.num_tokens for choice in choices),
                is_whole=all(choice.finish_reason is not None for choice in choices),
            )

    def _prompt_id(self, prompt: int) -> str:
        return f"{self._job.request_id}-{prompt}"

    def _generate(self, prompt: int) -> AsyncGenerator[list[TokenOutput], None]:
        job = self._job
        return self._backend.generate(
            GenerationRequest(
                request_id=self._prompt_id(prompt),
                prompt_token_ids=job.prompts[prompt],
                arms=job.arms,
                prompt_logprobs=job.prompt_logprobs,
                is_traced=job.is_traced,
                prompt_is_template=job.prompt_is_template,
            )
        )

    async def _merged(self) -> AsyncGenerator[tuple[int, list[TokenOutput]], None]:
        """Yield (prompt index, outputs), with a bounded number of prompts in the backend."""
        if len(self._job.prompts) == 1:
            async with aclosing(self._generate(0)) as steps:
                async for outputs in steps:
                    yield 0, outputs
            return
        waiting = iter(range(len(self._job.prompts)))
        queue: asyncio.Queue[tuple[int, list[TokenOutput]] | asyncio.Task[None]] = asyncio.Queue()

        async def work() -> None:
            for prompt in waiting:
                async with aclosing(self._generate(prompt)) as steps:
                    async for outputs in steps:
                        queue.put_nowait((prompt, outputs))

        num_workers = min(self._window, len(self._job.prompts))
        workers = [asyncio.create_task(work()) for _ in range(num_workers)]
        for worker in workers:
            worker.add_done_callback(queue.put_nowait)
        try:
            while num_workers:
                item = await queue.get()
                if isinstance(item, asyncio.Task):
                    item.result()
                    num_workers -= 1
                else:
                    yield item
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)


def _end_at_once(choice: int) -> Piece:
    output = TokenOutput(sequence_index=0, token_id=None, finish_reason="length")
    return Piece(choice, output, "", 0, "length")


def _usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, object]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
