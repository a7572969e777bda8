"""The paged cache of keys and values.

A head's keys and values are floats, or 8-bit codes with a scale for each position and head.
"""

from collections.abc import Sequence
from ctypes import Array, c_void_p
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from models.spec import DecoderSpec

SCALE_BYTES = 2


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
    heads = sum(
        layer.num_key_value_heads * head_bytes(layer.head_dim, dtype) for layer in spec.layers
    )
    return 2 * heads * block_size


def head_bytes(head_dim: int, dtype: torch.dtype) -> int:
    """Return the bytes of one head's key, or value, at one position."""
    return head_dim * dtype.itemsize + SCALE_BYTES * (dtype == torch.int8)


def quantize_heads(heads: Tensor) -> Tensor:
    """Round heads to 8-bit codes.

    Args:
        heads: (..., E) float32, finite.

    Returns:
        (..., E + 2) int8: codes in -127 .. 127 and the two bytes of their scale, the bfloat16 next
        above the largest magnitude / 127.
    """
    exact = heads.abs().amax(-1, keepdim=True) / 127
    bits = (exact.view(torch.int32) + 0xFFFF) >> 16
    scales = (bits << 16).view(torch.float32)
    codes = (heads * torch.where(scales > 0, 1 / scales, 0)).round()
    return torch.cat((codes.to(torch.int8), bits.to(torch.int16).view(torch.int8)), -1)


def dequantize_heads(stored: Tensor) -> Tensor:
    """Return (..., E) float32 heads of (..., E + 2) int8 ones from `quantize_heads`."""
    scales = stored[..., -SCALE_BYTES:].contiguous().view(torch.bfloat16)
    return stored[..., :-SCALE_BYTES].float() * scales.float()
