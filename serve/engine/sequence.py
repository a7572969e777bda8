"""A request as the engine sees it, the token streams it asks for, and what comes out of them."""

from array import array
from collections.abc import Sequence as TokenIds
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Literal

from decoding import SamplingParams, derive_seed
from decoding.row import Row
from models.kv_cache import KVCache
from models.side import AttachedSide
from serve.engine.cache_blocks import (
    BASE_ROOT_KEY,
    chain_key,
    side_root_key,
    variant_root_key,
)
from serve.engine.model import Model

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


class ModelVariant:
    """A pruned variant of the base that sequences can run on.

    Attributes:
        model: its decoder; keys and values have the base's shapes, so it fills the base's cache.
        root_key: stands for its content in the keys of its blocks.
    """

    __slots__ = ("model", "root_key")

    def __init__(self, model: Model, digest: str) -> None:
        """Take a decoder and the digest of the files that the variant came from."""
        self.model = model
        self.root_key = variant_root_key(digest)


class SideAdapter:
    """A side network that sequences can use.

    Attributes:
        side: the network; alive as long as a sequence uses it.
        root_key: stands for its content in the keys of side blocks.
    """

    __slots__ = ("root_key", "side")

    def __init__(self, side: AttachedSide, digest: str) -> None:
        """Take a network and the digest of the files that it came from."""
        self.side = side
        self.root_key = side_root_key(digest)


@dataclass(slots=True, eq=False)
class SideStream:
    """A side network that reads the tokens of a sequence, and its part of the side cache.

    Attributes:
        adapter: the side network.
        scale: how much of it goes into the sequence's logits. 0: it reads along for a sibling that
            waits for the prompt.
        blocks: int32, side cache blocks, as many as the sequence has blocks.
        start: leading positions whose keys and values its cache had at admission.
        num_published: leading blocks that were offered for reuse.
        cache: what its blocks are blocks of; known once it has run.
    """

    adapter: SideAdapter
    scale: float
    blocks: "array[int]"
    start: int
    num_published: int
    cache: KVCache | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """One token stream: the prompt and what was generated after it.

    Attributes:
        request: the request it belongs to.
        index: number of the sequence in the request, from 0.
        params: sampling parameters.
        seed: of its draws.
        variant: what it runs on, or None for the base.
        adapter: the side network that it uses, or None.
        adapter_scale: how much of it, above 0.
        order: (arrival of the request, index); smaller is older and goes first.
        token_ids: int32, prompt and generated tokens.
        blocks: int32, cache blocks in the order of positions; empty unless running.
        sides: side networks that read it: its own first, if it uses one, then those that read along
            for its siblings; empty unless running.
        num_computed: leading tokens that need not be computed any more.
        write_start: leading positions whose keys and values the cache had at admission.
        num_published: leading blocks that were offered for reuse.
        num_cached_prompt_tokens: prompt tokens found in the prefix cache at first admission; None
            before it.
        has_output: an output was handed out.
        row: the sampler's state, made when the first token is drawn.
        prompt_logprobs: entries for prompt tokens 1, 2, ...; None when not asked for.
    """

    request: "Request"
    index: int
    params: SamplingParams
    seed: int
    variant: ModelVariant | None
    adapter: SideAdapter | None
    adapter_scale: float
    order: tuple[int, int]
    token_ids: "array[int]"
    blocks: "array[int]" = field(default_factory=lambda: array("i"))
    sides: list[SideStream] = field(default_factory=list)
    state: SequenceState = SequenceState.WAITING
    num_computed: int = 0
    write_start: int = 0
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
        root_key = BASE_ROOT_KEY if self.variant is None else self.variant.root_key
        while len(keys) <= i:
            start = len(keys) * block_size
            block_ids = self.token_ids[start : start + block_size].tobytes()
            keys.append(chain_key(keys[-1] if keys else root_key, block_ids))
        return keys[i]


@dataclass(frozen=True, kw_only=True, slots=True)
class Branch:
    """Sequences of a request that are made alike.

    Attributes:
        params: sampling parameters with `seed` and `max_tokens` set.
        num_sequences: how many.
        variant: what they run on, or None for the base.
        adapter: the side network that they use, or None; made for what they run on.
        adapter_scale: how much of it, 0 .. 1; 0: they are plain sequences of base or variant.
    """

    params: SamplingParams
    num_sequences: int = 1
    variant: ModelVariant | None = None
    adapter: SideAdapter | None = None
    adapter_scale: float = 1.0


@dataclass(slots=True, eq=False)
class Request:
    """One prompt and the sequences that continue it.

    Attributes:
        prompt_token_ids: at least one token id.
        branches: at least one; their sequences are numbered through.
        prompt_logprobs: None, or how many alternatives sequence 0 reports for each prompt token.
        prompt_is_template: the prompt ends in a chat template's header.
        is_traced: report what the decoding strategy did for each token.
        sequences: filled by `start`.
        held: sequences waiting for a sibling of their variant to compute the prompt.
        num_unfinished: sequences that have not finished.
        is_queued: no sequence was admitted yet.
    """

    prompt_token_ids: TokenIds[int]
    branches: tuple[Branch, ...]
    prompt_logprobs: int | None = None
    prompt_is_template: bool = False
    is_traced: bool = False
    sequences: list[Sequence] = field(default_factory=list)
    held: list[Sequence] = field(default_factory=list)
    num_unfinished: int = 0
    is_queued: bool = True

    @property
    def num_sequences(self) -> int:
        """Sequences of all branches."""
        return sum(branch.num_sequences for branch in self.branches)

    def check(self, *, vocab_size: int, max_context_tokens: int) -> None:
        """Refuse what could never run.

        Raises:
            ValueError: the prompt is empty, has ids outside the vocabulary or does not fit, or a
                branch is not complete.
        """
        prompt = self.prompt_token_ids
        if not prompt:
            raise ValueError("the prompt must have at least one token")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise ValueError(f"prompt token ids must be 0 to {vocab_size - 1}")
        if not self.branches:
            raise ValueError("a request must have at least one branch")
        for branch in self.branches:
            max_tokens = branch.params.max_tokens
            if branch.num_sequences < 1:
                raise ValueError(f"num_sequences must be at least 1, got {branch.num_sequences}")
            if max_tokens is None or branch.params.seed is None:
                raise ValueError("max_tokens and seed must be set")
            if not 0.0 <= branch.adapter_scale <= 1.0:
                raise ValueError(f"adapter_scale must be 0 to 1, got {branch.adapter_scale}")
            if len(prompt) + max_tokens > max_context_tokens:
                raise ValueError(
                    f"prompt and max_tokens must be at most {max_context_tokens} tokens "
                    f"together, got {len(prompt)} + {max_tokens}"
                )

    def start(self, arrival: int) -> None:
        """Make the sequences.

        Args:
            arrival: number of the request in the order of arrival.
        """
        prompt = array("i", self.prompt_token_ids)
        for branch in self.branches:
            assert branch.params.seed is not None
            for i in range(branch.num_sequences):
                index = len(self.sequences)
                sequence = Sequence(
                    request=self, index=index, params=branch.params,
                    seed=derive_seed(branch.params.seed, i), variant=branch.variant,
                    adapter=branch.adapter if branch.adapter_scale else None,
                    adapter_scale=branch.adapter_scale, order=(arrival, index),
                    token_ids=prompt[:],
                )  # fmt: skip
                self.sequences.append(sequence)
        self.num_unfinished = len(self.sequences)
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
