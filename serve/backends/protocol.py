"""What the API asks of a backend: token ids in, token ids out.

Text, stop strings and chat templates are the API's business; a backend sees token ids only.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Literal, Protocol

from decoding import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


class QueueFullError(Exception):
    """The backend admits no more requests for now."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class BackendUnavailableError(Exception):
    """The backend is draining, stopped or broken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One prompt, `num_sequences` continuations.

    Attributes:
        request_id: unique among the requests in flight.
        prompt_token_ids: at least one id, each in the vocabulary, prompt + max_tokens within the
            context (checked by the API).
        params: sampling parameters; `seed` and `max_tokens` are set (the API resolves them).
        prompt_is_template: the prompt ends in a chat template, which the answer does not continue.
        num_sequences: continuations; sequence i draws with `decoding.derive_seed(params.seed, i)`.
        prompt_logprobs: None, or how many alternatives to report beside each prompt token's own
            log probability.
        is_traced: fill `TokenOutput.trace`.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    prompt_is_template: bool = False
    num_sequences: int = 1
    prompt_logprobs: int | None = None
    is_traced: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprob:
    """Natural log probability of a token under the unscaled logits, with its alternatives.

    Attributes:
        logprob: of the token itself.
        top: (token_id, logprob) pairs, most likely first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenTrace:
    """What the decoding strategy did for one token.

    Attributes:
        token_class: class of the token's text (`decoding` token classes).
        temperature: temperature the token was drawn with, 0 for greedy.
        entropy: entropy in nats of the model's distribution at temperature 1.
    """

    token_class: str
    temperature: float
    entropy: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenOutput:
    """One new token of one sequence, or the end of a sequence.

    Attributes:
        sequence_index: 0 .. num_sequences - 1.
        token_id: the token; None when the sequence ended without a new one (abort, error).
        logprob: set when `params.logprobs` is, or the request is traced.
        trace: set when the request is traced.
        finish_reason: set on a sequence's last output. "stop": the token is an end-of-sequence or
            stop token.
        cached_prompt_tokens: prompt tokens found in the prefix cache; on a sequence's first output.
        prompt_logprobs: one entry for each prompt token (None for the first); on sequence 0's first
            output if asked for.
    """

    sequence_index: int
    token_id: int | None
    logprob: TokenLogprob | None = None
    trace: TokenTrace | None = None
    finish_reason: FinishReason | None = None
    cached_prompt_tokens: int = 0
    prompt_logprobs: list[TokenLogprob | None] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class BackendStats:
    """Counters since start and gauges of now.

    Attributes:
        num_running_sequences, num_waiting_requests: gauges.
        num_cache_blocks, num_free_cache_blocks: gauges; free includes cached blocks nobody uses.
        prompt_tokens, cached_prompt_tokens, generated_tokens, preemptions, steps: counters; a
            prompt counts once for each sequence.
        is_draining: no new requests are admitted.
        error: why the backend is broken, or None.
    """

    num_running_sequences: int
    num_waiting_requests: int
    num_cache_blocks: int
    num_free_cache_blocks: int
    prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens: int
    preemptions: int
    steps: int
    is_draining: bool
    error: str | None


class Backend(Protocol):
    """Runs requests. All methods are called on the event loop's thread."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_context_tokens(self) -> int:
        """Longest prompt + continuation, in tokens."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[list[TokenOutput], None]:
        """Admit a request and yield its outputs, one list a step.

        Ends when every sequence has finished. Closing the generator (`aclose`, or cancelling the
        task that reads it) aborts what still runs within one step.

        Raises:
            QueueFullError: no room in the queue (raised at the first `anext`).
            BackendUnavailableError: draining, stopped or broken.
        """

    def abort_sequence(self, request_id: str, sequence_index: int) -> None:
        """Stop one sequence of a running request; its last output has finish_reason "abort".

        Unknown ids are ignored.
        """

    def stats(self) -> BackendStats: ...

    async def drain(self, timeout_s: float) -> None:
        """Admit nothing new, wait for what runs, abort what is left after `timeout_s`; stop."""
