"""The packed batch that one step of the decoder computes."""

from dataclasses import dataclass

from torch import Tensor


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
    """

    token_ids: Tensor
    positions: Tensor
    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    output_rows: Tensor
