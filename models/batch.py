"""The packed batch that one step of the decoder computes."""

from dataclasses import dataclass

from torch import Tensor

from models.fork import AttachedFork
from models.kv_cache import KVCache
from models.side import AttachedSide


@dataclass(frozen=True, kw_only=True, slots=True)
class SideBatch:
    """Side networks to run on the tokens of a step.

    One entry is one side network that reads all of the step's tokens of one sequence. Several may
    read the same sequence; at most one of them has a scale above 0.

    Attributes:
        networks: S of them, from `Decoder.attach`.
        caches: the cache of each, from `Decoder.make_side_cache`; equal shapes may share one.
        sequences: (S,) int32, which sequence of the batch each reads.
        block_tables: (S, M) int32, cache block of each run of `block_size` positions.
        write_starts: (S,) int32, as in `PackedBatch`, of each side network's own cache.
        scales: (S,) float32 in 0 .. 1: how much of it goes into the sequence's logits. 0: none, it
            only fills its cache.
    """

    networks: tuple[AttachedSide, ...]
    caches: tuple[KVCache, ...]
    sequences: Tensor
    block_tables: Tensor
    write_starts: Tensor
    scales: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class ForkBatch:
    """Forks that stand in for the base in some of a step's output rows.

    Attributes:
        networks: F of them, from `Decoder.attach`; one for each of the rows.
        outputs: (F,) int32, which output row each makes the logits of, increasing.
        sequences: (F,) int32, the sequence of the batch that it belongs to.
        scales: (F,) float32 in 0 .. 1: how much of the fork goes into the logits.
    """

    networks: tuple[AttachedFork, ...]
    outputs: Tensor
    sequences: Tensor
    scales: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatch:
    """Tokens of several sequences, some prefilling, some decoding, one after the other.

    All tensors are int32, contiguous and on the CPU; the decoder moves them where it computes. The
    keys and values of the step's own tokens are written to the cache before attention reads it, so
    `context_lens` counts them.

    Attributes:
        token_ids: (T,) token ids.
        positions: (T,) position of each token in its sequence.
        query_starts: (B + 1,) sequence b owns tokens query_starts[b] .. query_starts[b + 1].
        context_lens: (B,) tokens of the sequence in the cache once this step has run.
        block_tables: (B, M) cache block of each run of `block_size` positions; entries past the
            context are ignored.
        output_rows: (L,) which of the T tokens to compute logits for, increasing.
        write_starts: (B,) first position whose keys and values are written; earlier ones are in
            the cache already and are left alone. None: all of them are written.
        side: side networks on these tokens, or None.
        forks: forks for some of the output rows, or None; a row has a side network or a fork.
    """

    token_ids: Tensor
    positions: Tensor
    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    output_rows: Tensor
    write_starts: Tensor | None = None
    side: SideBatch | None = None
    forks: ForkBatch | None = None
