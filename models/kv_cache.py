"""The paged cache of keys and values.

A head's keys and values are floats, or 8-bit codes. At each position of a head, a value has one
scale and a key one for each `KEY_GROUP` channels.
"""

from collections.abc import Sequence
from ctypes import Array, c_void_p
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from models.spec import DecoderSpec

KEY_GROUP = 32
"""Channels of 8-bit keys that share a scale; few channels of keys are far larger than others."""
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

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole blocks, all sources before any target is written."""
        rows, places = torch.tensor(sources), torch.tensor(targets)
        for tensor in (*self.keys, *self.values):
            tensor.index_copy_(0, places.to(tensor.device), tensor[rows.to(tensor.device)])


def cache_bytes_per_block(spec: DecoderSpec, block_size: int, dtype: torch.dtype) -> int:
    """Return the bytes that one block takes over all layers."""
    heads = sum(
        layer.num_key_value_heads * sum(head_bytes(layer.head_dim, dtype)) for layer in spec.layers
    )
    return heads * block_size


def head_bytes(head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return the bytes of one head's key and of its value at one position."""
    size = head_dim * dtype.itemsize
    if dtype != torch.int8:
        return size, size
    return size + SCALE_BYTES * -(-head_dim // KEY_GROUP), size + SCALE_BYTES


def quantize_heads(heads: Tensor, group: int) -> Tensor:
    """Round heads to 8-bit codes.

    Args:
        heads: (..., E) float32, finite.
        group: channels that share a scale: `KEY_GROUP` in keys, E in values.

    Returns:
        (..., E + 2 groups) int8: codes in -127 .. 127, then the two bytes of each group's scale,
        the bfloat16 next above the largest magnitude / 127.
    """
    parts = heads.split(group, -1)
    exact = torch.stack([part.abs().amax(-1) for part in parts], -1) / 127
    bits = (exact.view(torch.int32) + 0xFFFF) >> 16
    scales = (bits << 16).view(torch.float32)
    inverse = torch.where(scales > 0, 1 / scales, 0).repeat_interleave(group, -1)
    codes = (heads * inverse[..., : heads.shape[-1]]).round()
    return torch.cat((codes.to(torch.int8), bits.to(torch.int16).view(torch.int8)), -1)


def dequantize_heads(stored: Tensor, head_dim: int, group: int) -> Tensor:
    """Return (..., E) float32 heads from what `quantize_heads` gives."""
    scales = stored[..., head_dim:].contiguous().view(torch.bfloat16).float()
    return stored[..., :head_dim] * scales.repeat_interleave(group, -1)[..., :head_dim]
