"""The paged cache of keys and values."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.spec import DecoderSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class KVCache:
    """Blocks of keys and values, one pair of tensors for each layer.

    Attributes:
        keys, values: per layer; the layout is the executor's that made them, the block index first.
        num_blocks: blocks in each tensor.
        block_size: positions in a block.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    num_blocks: int
    block_size: int


def cache_bytes_per_block(spec: DecoderSpec, block_size: int, dtype: torch.dtype) -> int:
    """Return the bytes that one block takes over all layers."""
    channels = sum(2 * layer.num_key_value_heads * layer.head_dim for layer in spec.layers)
    return channels * block_size * dtype.itemsize
