"""The running state of requests: what a prompt's token streams run on, and how far each is."""

from array import array
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from torch import Tensor

from decoding import SamplingParams, derive_seed
from decoding.logprobs import TopLogprobs
from decoding.row import Row
from decoding.temperature_head import TemperatureHead
from models.fork import AttachedFork
from models.kv_cache import KVCache
from models.side import AttachedSide
from serve.engine.cache_blocks import (
    BASE_ROOT_KEY,
    chain_key,
    side_root_key,
    variant_root_key,
)
from serve.engine.model import Model
from serve.requests import GenerationRequest, TokenLogprob


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
        side: a narrow decoder with a cache of its own, or None; alive as long as a sequence
            uses it.
        fork: a fork, which reads the base's cache, in its place; or None.
        root_key: stands for its content in the keys of side blocks.
        classifier: (C, D) float32 head of a network that classifies, or None.
    """

    __slots__ = ("classifier", "fork", "root_key", "side")

    def __init__(
        self,
        side: AttachedSide | AttachedFork,
        digest: str,
        *,
        classifier: Tensor | None = None,
    ) -> None:
        """Take a network, the digest of the files that it came from, and its head."""
        self.side: AttachedSide | None = None
        self.fork: AttachedFork | None = None
        if isinstance(side, AttachedFork):
            self.fork = side
        else:
            self.side = side
        self.classifier = classifier
        self.root_key = side_root_key(digest)


class Attachment(NamedTuple):
    """What the sequences of an arm need beside the base.

    Attributes:
        variant: what they run on, or None for the base.
        side: the side network that they use, or None; made for what they run on.
        temperature_head: gives temperatures to a strategy that reads one, or None.
    """

    variant: ModelVariant | None
    side: SideAdapter | None
    temperature_head: TemperatureHead | None = None


NO_ATTACHMENT = Attachment(None, None)


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


class Choice(NamedTuple):
    """A token that a sequence does not take before several were tried.

    Attributes:
        logits: (V,) float32, of the model.
        temperature: that the token would have been drawn at.
        candidates: (token id, logprob) pairs that are tried.
        scores: mean log probability of each candidate and of what was looked at after it; those
            that are known.
    """

    logits: Tensor
    temperature: float
    candidates: TopLogprobs
    scores: dict[int, float]


@dataclass(slots=True, eq=False)
class Sequence:
    """One token stream: the prompt and what was generated after it.

    Attributes:
        request: the request it belongs to.
        index: number of the sequence in the request, from 0.
        num_prompt_tokens: length of the prompt.
        params: sampling parameters.
        seed: of its draws.
        variant: what it runs on, or None for the base.
        adapter: the side network that it uses, or None.
        adapter_scale: how much of it, above 0.
        order: (arrival of the request, index), of a probe also its number; smaller is older and
            goes first.
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
        temperature_head: gives its temperatures, or None.
        parent: the sequence that this one tries a token for, a probe; None otherwise.
        probes: that try tokens for this one, which waits for them; empty otherwise.
        choice: what they are to decide.
        logprobs: of a probe, of its tokens so far.
    """

    request: "LiveRequest"
    index: int
    num_prompt_tokens: int
    params: SamplingParams
    seed: int
    variant: ModelVariant | None
    adapter: SideAdapter | None
    adapter_scale: float
    order: tuple[int, ...]
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
    prompt_logprobs: list[TokenLogprob] | None = None
    temperature_head: TemperatureHead | None = None
    parent: "Sequence | None" = None
    probes: "list[Sequence]" = field(default_factory=list)
    choice: Choice | None = None
    logprobs: list[float] = field(default_factory=list)
    _block_keys: list[bytes] = field(default_factory=list)

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_prompt_logprobs(self) -> int:
        """Prompt tokens, after the first, whose log probability is computed."""
        return len(self.prompt_logprobs or ())

    @property
    def num_missing_prompt_logprobs(self) -> int:
        """Prompt tokens whose log probability is asked for and still to be computed."""
        if self.prompt_logprobs is None:
            return 0
        return self.num_prompt_tokens - 1 - len(self.prompt_logprobs)

    @property
    def num_reserved_tokens(self) -> int:
        """Tokens that it gets blocks for when it is admitted: a probe's all, so it never waits."""
        if self.parent is None:
            return len(self.token_ids)
        return self.num_prompt_tokens + (self.params.max_tokens or 0)

    @property
    def needs_states(self) -> bool:
        """Whether its final hidden state is read, not its logits alone."""
        return self.temperature_head is not None or self.request.asked.is_classification

    def make_probe(self, number: int, token_id: int, num_tokens: int) -> "Sequence":
        """Return a sequence that tries a token: greedy, in the model's own distribution."""
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, seed=0, logprobs=0)
        token_ids = self.token_ids[:]
        token_ids.append(token_id)
        return Sequence(
            request=self.request, index=self.index, num_prompt_tokens=len(token_ids),
            params=params, seed=0, variant=self.variant, adapter=self.adapter,
            adapter_scale=self.adapter_scale, order=(*self.order, number), token_ids=token_ids,
            num_cached_prompt_tokens=0, parent=self,
        )  # fmt: skip

    def block_key(self, i: int, block_size: int) -> bytes:
        """Give the key of block `i`, which must be full of known tokens."""
        keys = self._block_keys
        root_key = BASE_ROOT_KEY if self.variant is None else self.variant.root_key
        while len(keys) <= i:
            start = len(keys) * block_size
            block_ids = self.token_ids[start : start + block_size].tobytes()
            keys.append(chain_key(keys[-1] if keys else root_key, block_ids))
        return keys[i]

    def prompt_end_key(self, block_size: int) -> bytes:
        """Give the key of the prompt's last block, full or not, as the end of this prompt."""
        first = (self.num_prompt_tokens - 1) // block_size
        root_key = BASE_ROOT_KEY if self.variant is None else self.variant.root_key
        end = self.token_ids[first * block_size : self.num_prompt_tokens].tobytes()
        return chain_key(self.block_key(first - 1, block_size) if first else root_key, end)


@dataclass(slots=True, eq=False)
class LiveRequest:
    """A request that is with the engine. Its own identity tells it from others of the same id.

    Attributes:
        asked: what was asked for.
        attachments: of each of its arms.
        sequences: from `start` until all have finished.
        held: sequences waiting for a sibling of their variant to compute the prompt.
        num_unfinished: sequences that have not finished.
        is_queued: no sequence was admitted yet, and not all have finished.
    """

    asked: GenerationRequest
    attachments: Items[Attachment]
    sequences: list[Sequence] = field(default_factory=list)
    held: list[Sequence] = field(default_factory=list)
    num_unfinished: int = 0
    is_queued: bool = True

    def start(self, arrival: int) -> None:
        """Make the sequences.

        Args:
            arrival: number of the request in the order of arrival.
        """
        prompt = array("i", self.asked.prompt_token_ids)
        for arm, attachment in zip(self.asked.arms, self.attachments, strict=True):
            assert arm.params.seed is not None
            for i in range(arm.num_sequences):
                index = len(self.sequences)
                sequence = Sequence(
                    request=self, index=index, num_prompt_tokens=len(prompt), params=arm.params,
                    seed=derive_seed(arm.params.seed, i), variant=attachment.variant,
                    adapter=attachment.side if arm.adapter_scale else None,
                    adapter_scale=arm.adapter_scale, order=(arrival, index),
                    token_ids=prompt[:], temperature_head=attachment.temperature_head,
                )  # fmt: skip
                self.sequences.append(sequence)
        self.num_unfinished = len(self.sequences)
        if self.asked.prompt_logprobs is not None:
            self.sequences[0].prompt_logprobs = []
