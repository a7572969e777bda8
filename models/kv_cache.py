"""The paged cache of keys and values."""

from collections.abc import Sequence
from ctypes import Array, c_void_p
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from models.spec import DecoderSpec


@dataclass(frozen=True, kw_only=True, eq=False)
class KVCache:
    """Blocks of keys and values, one pair of tensors for each layer; equal only to itself.

    Attributes:
        keys, values: per layer; the layout is the executor's that made them, the block index first.
        num_blocks: blocks in each tensor.
        block_size: positions in a block.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    num_blocks: int
    block_size: int

    @cached_property
    def addresses(self) -> tuple[Array[c_void_p], Array[c_void_p]]:
        """Where keys and values lie, layer by layer; asking every tensor at every step is slow."""
        kind = c_void_p * len(self.keys)
        keys = kind(*(tensor.data_ptr() for tensor in self.keys))
        return keys, kind(*(tensor.data_ptr() for tensor in self.values))


def cache_bytes_per_block(spec: DecoderSpec, block_size: int, dtype: torch.dtype) -> int:
    """Return the bytes that one block takes over all layers."""
    channels = sum(2 * layer.num_key_value_heads * layer.head_dim for layer in spec.layers)
    return channels * block_size * dtype.itemsize
