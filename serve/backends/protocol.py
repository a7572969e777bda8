"""What the API asks of a backend: token ids in, token ids out."""

from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from typing import Protocol

from prometheus_client.core import Metric

from adapters.kinds import Kind
from serve.requests import GenerationRequest, TokenOutput


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
    """The adapter cannot be attached: outside the root, damaged, or made for another base; or it
    cannot come back to memory. The message has no paths of the server."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterInfo:
    """An attached adapter.

    Attributes:
        name: what follows the base's id in a model id: `base:name`.
        method: what it was made with, by name; see `adapters.methods`.
        kind: what it is; "variant": a decoder that runs in the base's place, "side_network": what
            reads the hidden states of base or variant; "temperature_head": what gives the strategy
            "learned" its temperatures.
        description: free text from the adapter's card; may be empty.
        num_parameters: of the adapter; of a variant, those that are left in the layers' linears.
        num_bytes: memory that it takes while it is loaded, what it shares with the base left out.
        is_loaded: in memory; if not, its next request loads it. A variant always is.
        num_running: requests that name it and run now.
        created: Unix time at which it was attached, in seconds.
        on: name of the variant that it sits on; None: the base.
        removed: share of the layers' linears that a variant does without, 0 .. 1; None: no variant.
        speed: a variant's decode speed at one stream, as a multiple of the base's on this machine;
            None: not measured yet.
        labels: of a side network that classifies, what it tells apart: one name is a regression's;
            None: it generates.
    """

    name: str
    method: str
    kind: Kind
    description: str
    num_parameters: int
    num_bytes: int
    is_loaded: bool
    num_running: int
    created: int
    on: str | None = None
    removed: float | None = None
    speed: float | None = None
    labels: tuple[str, ...] | None = None

    @property
    def has_side(self) -> bool:
        """Whether a side network is part of it, so that there is something to scale."""
        return self.kind == "side_network"


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
            ValueError: the request could never run, or its id is in use.
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

    def own_metrics(self) -> Iterable[Metric]:
        """Return further series, those that the engine itself keeps; may be none."""

    async def drain(self, timeout_s: float) -> None:
        """Admit nothing new, wait for what runs, abort what is left after `timeout_s`; stop."""
