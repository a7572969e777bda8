"""Run the requests of one answer, one for each prompt, and turn their tokens into text."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import NamedTuple

from decoding import SamplingParams
from serve.api.context import ApiContext
from serve.api.errors import GenerationFailedError
from serve.api.metrics import ArmMeter
from serve.backends.protocol import BackendUnavailableError
from serve.requests import GenerationRequest, TokenLogprob, TokenOutput
from text.detokenizer import StopMatcher
from text.tokenizer import Tokenizer


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
    """One answer on its way through the backend.

    Attributes:
        num_sequences: answers to each prompt.
        num_choices: how many answers there are in all.
        prompt_logprobs: of each prompt, once its first token has arrived and if asked for.
        first_output_s: when the first output came, on the monotonic clock; None before that.
        on_failure: told `abort` or `error` where it ended without an answer.
    """

    def __init__(
        self, context: ApiContext, requests: Sequence[GenerationRequest], *, is_dry: bool = False
    ) -> None:
        """Begin to count.

        Args:
            context: of the application.
            requests: at least one, one for each prompt; all ask the same of it.
            is_dry: nothing is asked of the model; every choice ends at once.
        """
        arms = requests[0].arms
        self._backend = context.backend
        self._requests = requests
        self._is_dry = is_dry
        self._window = context.settings.max_concurrent_prompts
        self._prompt_tokens = sum(len(request.prompt_token_ids) for request in requests)
        self._meters = [
            ArmMeter(context.metrics, arm.params.strategy.name, arm.adapter, self._prompt_tokens)
            for arm in arms
        ]
        self._choices = [
            Choice(context.tokenizer, arm.params, meter)
            for _ in requests
            for arm, meter in zip(arms, self._meters, strict=True)
            for _ in range(arm.num_sequences)
        ]
        self.num_sequences = requests[0].num_sequences
        self.num_choices = self._num_open = len(self._choices)
        self._completion_tokens = 0
        self._cached_tokens = 0
        self.first_output_s: float | None = None
        self.on_failure: Callable[[str], None] | None = None
        self.prompt_logprobs: list[list[TokenLogprob | None] | None] = [None] * len(requests)

    def usage(self) -> dict[str, object]:
        """Return the OpenAI usage object of what has happened so far."""
        return _usage(self._prompt_tokens, self._completion_tokens, self._cached_tokens)

    def choice_usage(self, index: int) -> dict[str, object]:
        """Return the usage object of one choice alone."""
        choice = self._choices[index]
        num_prompt_tokens = len(self._requests[index // self.num_sequences].prompt_token_ids)
        return _usage(num_prompt_tokens, choice.num_tokens, choice.num_cached_tokens)

    def finish_reason(self, index: int) -> str | None:
        """Return why a choice ended; None: it has not."""
        return self._choices[index].finish_reason

    async def steps(self) -> AsyncGenerator[list[Piece], None]:
        """Yield the pieces of each step until every choice has finished.

        Raises:
            QueueFullError, BackendUnavailableError: not admitted.
            GenerationFailedError: a sequence ended with an error.
        """
        if self._is_dry:
            yield [_end_at_once(choice) for choice in range(self.num_choices)]
            return
        early: dict[int, list[TokenOutput]] = {}
        reason = "abort"
        try:
            async with aclosing(self._merged()) as merged:
                async for prompt, outputs in merged:
                    if self._requests[prompt].prompt_logprobs is not None:
                        outputs = self._hold_early(early, prompt, outputs)
                    if self.first_output_s is None:
                        self.first_output_s = time.monotonic()
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
        base = prompt * self.num_sequences
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
                    request_id = self._requests[prompt].request_id
                    self._backend.abort_sequence(request_id, output.sequence_index)
        return pieces

    def _fail(self, reason: str) -> None:
        if reason == "abort":
            raise BackendUnavailableError("the server stopped the request")
        raise GenerationFailedError

    def _record_end(self, reason: str) -> None:
        if self._num_open and self.on_failure is not None:
            self.on_failure(reason)
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

    async def _merged(self) -> AsyncGenerator[tuple[int, list[TokenOutput]], None]:
        """Yield (prompt index, outputs), with a bounded number of prompts in the backend."""
        requests = self._requests
        if len(requests) == 1:
            async with aclosing(self._backend.generate(requests[0])) as steps:
                async for outputs in steps:
                    yield 0, outputs
            return
        waiting = iter(enumerate(requests))
        queue: asyncio.Queue[tuple[int, list[TokenOutput]] | asyncio.Task[None]] = asyncio.Queue()

        async def work() -> None:
            for prompt, request in waiting:
                async with aclosing(self._backend.generate(request)) as steps:
                    async for outputs in steps:
                        queue.put_nowait((prompt, outputs))

        num_workers = min(self._window, len(requests))
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
