"""A request as the engine sees it, the token streams it asks for, and what comes out of them."""

from array import array
from collections.abc import Sequence as TokenIds
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Literal

from decoding import SamplingParams
from decoding.row import Row
from serve.engine.cache_blocks import BASE_ROOT_KEY, chain_key

FinishReason = Literal["stop", "length", "abort", "error"]
ScoredToken = tuple[float, tuple[tuple[int, float], ...]]
"""A token's log probability, and (token id, log probability) of the most likely alternatives."""


class SequenceState(Enum):
    """Where a sequence is in its life.

    HELD waits for a sibling to compute the prompt they share; WAITING waits for room; RUNNING owns
    cache blocks.
    """

    HELD = auto()
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """One token stream: the prompt and what was generated after it.

    Attributes:
        request: the request it belongs to.
        index: number of the sequence in the request, from 0.
        order: (arrival of the request, index); smaller is older and goes first.
        token_ids: int32, prompt and generated tokens.
        blocks: int32, cache blocks in the order of positions; empty unless running.
        num_computed: leading tokens whose keys and values are in the cache.
        num_published: leading blocks that were offered for reuse.
        num_cached_prompt_tokens: prompt tokens found in the prefix cache at first admission; None
            before it.
        has_output: an output was handed out.
        row: the sampler's state, made when the first token is drawn.
        prompt_logprobs: entries for prompt tokens 1, 2, ...; None when not asked for.
    """

    request: "Request"
    index: int
    order: tuple[int, int]
    token_ids: "array[int]"
    blocks: "array[int]" = field(default_factory=lambda: array("i"))
    state: SequenceState = SequenceState.WAITING
    num_computed: int = 0
    num_published: int = 0
    num_cached_prompt_tokens: int | None = None
    has_output: bool = False
    row: Row | None = None
    prompt_logprobs: list[ScoredToken] | None = None
    _block_keys: list[bytes] = field(default_factory=list)

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def num_prompt_logprobs(self) -> int:
        """Prompt tokens, after the first, whose log probability is computed."""
        return len(self.prompt_logprobs or ())

    @property
    def num_missing_prompt_logprobs(self) -> int:
        """Prompt tokens whose log probability is asked for and still to be computed."""
        if self.prompt_logprobs is None:
            return 0
        return len(self.request.prompt_token_ids) - 1 - len(self.prompt_logprobs)

    def block_key(self, i: int, block_size: int) -> bytes:
        """Give the key of block `i`, which must be full of known tokens."""
        keys = self._block_keys
        while len(keys) <= i:
            start = len(keys) * block_size
            block_ids = self.token_ids[start : start + block_size].tobytes()
            keys.append(chain_key(keys[-1] if keys else BASE_ROOT_KEY, block_ids))
        return keys[i]


@dataclass(slots=True, eq=False)
class Request:
    """One prompt and the sequences that continue it.

    Attributes:
        prompt_token_ids: at least one token id.
        params: sampling parameters with `seed` and `max_tokens` set.
        num_sequences: how many continuations.
        prompt_logprobs: None, or how many alternatives sequence 0 reports for each prompt token.
        prompt_is_template: the prompt ends in a chat template's header.
        is_traced: report what the decoding strategy did for each token.
        sequences: filled by `start`.
        held: sequences waiting for a sibling to compute the prompt.
        num_unfinished: sequences that have not finished.
        is_queued: no sequence was admitted yet.
    """

    prompt_token_ids: TokenIds[int]
    params: SamplingParams
    num_sequences: int = 1
    prompt_logprobs: int | None = None
    prompt_is_template: bool = False
    is_traced: bool = False
    sequences: list[Sequence] = field(default_factory=list)
    held: list[Sequence] = field(default_factory=list)
    num_unfinished: int = 0
    is_queued: bool = True

    def start(self, arrival: int) -> None:
        """Make the sequences.

        Args:
            arrival: number of the request in the order of arrival.
        """
        prompt = array("i", self.prompt_token_ids)
        self.num_unfinished = self.num_sequences
        self.sequences = [
            Sequence(request=self, index=i, order=(arrival, i), token_ids=prompt[:])
            for i in range(self.num_sequences)
        ]
        if self.prompt_logprobs is not None:
            self.sequences[0].prompt_logprobs = []


@dataclass(slots=True, eq=False)
class SequenceOutput:
    """One new token of a sequence, or its end.

    Attributes:
        index: of the sequence in its request.
        token_id: the token; None when the sequence ended without a new one.
        finish_reason: set on the last output of a sequence.
        scored: the token's log probability, if asked for.
        token_class, temperature, entropy: what the decoding strategy did; no class: not traced.
        num_cached_prompt_tokens: on the first output, prompt tokens found in the prefix cache.
        prompt_logprobs: on the first output of sequence 0 if asked for; the first prompt token's
            is None.
    """

    index: int
    token_id: int | None
    finish_reason: FinishReason | None = None
    scored: ScoredToken | None = None
    token_class: str | None = None
    temperature: float = 0.0
    entropy: float = 0.0
    num_cached_prompt_tokens: int = 0
    prompt_logprobs: list[ScoredToken | None] | None = None
