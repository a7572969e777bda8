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


class AdapterNotFoundError(Exception):
    """No adapter has this name."""


class AdapterConflictError(Exception):
    """The name is taken, or requests or other adapters use the adapter."""


class AdapterLoadError(Exception):
    """The adapter cannot be attached: outside the root, damaged, or made for another base."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterInfo:
    """An attached adapter: a side network, or a pruned variant of the base.

    Attributes:
        name: what follows the base's id in a model id: `base:name`.
        method: "qst", a side network, or "disp", a variant.
        description: free text from the adapter's card; may be empty.
        num_parameters: of the adapter; of a variant, those that are left in the layers' linears.
        num_bytes: memory that it takes while it is loaded, what it shares with the base left out.
        is_loaded: in memory; if not, its next request loads it. A variant always is.
        num_running: requests that name it and run now.
        created: Unix time at which it was attached, in seconds.
        on: name of the variant that a side network sits on; None: the base.
        removed: share of the layers' linears that a variant does without, 0 .. 1; None: no variant.
        speed: a variant's decode speed at one stream, as a multiple of the base's on this machine.
    """

    name: str
    method: str
    description: str
    num_parameters: int
    num_bytes: int
    is_loaded: bool
    num_running: int
    created: int
    on: str | None = None
    removed: float | None = None
    speed: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """Continuations of a request's prompt that are made alike.

    Attributes:
        params: sampling parameters; `seed` and `max_tokens` are set (the API resolves them).
        num_sequences: how many; number i draws with `decoding.derive_seed(params.seed, i)`.
        adapter: name of an attached adapter, or None for the base.
        adapter_scale: how much of its side network, 0 .. 1; 0 is the base, or the variant that it
            sits on, exactly.
    """

    params: SamplingParams
    num_sequences: int = 1
    adapter: str | None = None
    adapter_scale: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One prompt and its continuations. The base computes the prompt once for all arms on it; so
    does each variant.

    Attributes:
        request_id: unique among the requests in flight.
        prompt_token_ids: at least one id, each in the vocabulary, prompt + max_tokens within the
            context (checked by the API).
        arms: at least one; their sequences are numbered through, in order.
        prompt_is_template: the prompt ends in a chat template, which the answer does not continue.
        prompt_logprobs: None, or how many alternatives to report beside each prompt token's own
            log probability.
        is_traced: fill `TokenOutput.trace`.
    """

    request_id: str
    prompt_token_ids: list[int]
    arms: tuple[Arm, ...]
    prompt_is_template: bool = False
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
        sequence_index: number of the sequence in the request, from 0.
        token_id: the token; None when the sequence ended without a new one (abort, error).
        logprob: set when `params.logprobs` is, or the request is traced.
        trace: set when the request is traced.
        finish_reason: set on a sequence's last output. "stop": the token is an end-of-sequence or
            stop token.
        cached_prompt_tokens: prompt tokens that were not computed again; on a sequence's first
            output.
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
        num_side_cache_blocks, num_free_side_cache_blocks: gauges, of the side networks' cache.
        base_cached_prompt_tokens: counter; prompt tokens that the base's cache had. More than
            `cached_prompt_tokens` where side networks had to read them.
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
    num_side_cache_blocks: int = 0
    num_free_side_cache_blocks: int = 0
    base_cached_prompt_tokens: int = 0


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
            AdapterNotFoundError: an arm names an adapter that is not attached.
            AdapterLoadError: an adapter that had left memory cannot be read any more.
        """

    def adapters(self) -> list[AdapterInfo]:
        """Return what is attached, in the order of names."""

    async def attach_adapter(self, name: str, path: str) -> AdapterInfo:
        """Load the adapter in a folder and serve it under a name.

        Raises:
            AdapterConflictError: the name is taken.
            AdapterLoadError: a bad name or path, or the folder does not hold a fitting adapter.
        """

    async def detach_adapter(self, name: str) -> None:
        """Serve an adapter no more.

        Raises:
            AdapterNotFoundError: no adapter has this name.
            AdapterConflictError: requests use it, or adapters sit on it.
        """

    def abort_sequence(self, request_id: str, sequence_index: int) -> None:
        """Stop one sequence of a running request; its last output has finish_reason "abort".

        Unknown ids are ignored.
        """

    def stats(self) -> BackendStats: ...

    async def drain(self, timeout_s: float) -> None:
        """Admit nothing new, wait for what runs, abort what is left after `timeout_s`; stop."""
