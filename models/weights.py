"""What a linear's weight can be: dense, 4-bit, or a product of two thin ones."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantized4Bit:
    """A matrix in bitsandbytes' 4-bit format, double quantisation of the scales already undone.

    The matrix is flattened row by row; blocks of `block_size` consecutive values share one scale, so a block may straddle
    rows. Of each byte the high nibble is the earlier value.

    Attributes:
        packed: (ceil(out_features * in_features / 2),) uint8.
        absmax: (ceil(out_features * in_features / block_size),) float32 scales.
        codebook: (16,) float32 values of the codes (NF4's or FP4's).
        shape: (out_features, in_features).
        block_size: values per scale.
    """

    packed: Tensor
    absmax: Tensor
    codebook: Tensor
    shape: tuple[int, int]
    block_size: int = 64

    def dequantize(self) -> Tensor:
        """Return the (out_features, in_features) float32 matrix, exactly, at any width."""
        count = self.shape[0] * self.shape[1]
        codes = torch.stack((self.packed >> 4, self.packed & 15), dim=1).flatten()[:count]
        scales = self.absmax.repeat_interleave(self.block_size)[:count]
        return (self.codebook[codes.long()] * scales).view(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRank:
    """A matrix left @ right of rank R.

    Attributes:
        left: (out_features, R) dense or 4-bit.
        right: (R, in_features) dense or 4-bit.
    """

    left: "Tensor | Quantized4Bit"
    right: "Tensor | Quantized4Bit"

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.left.shape[0], self.right.shape[1]


Weight = Tensor | Quantized4Bit | LowRank


def dense(weight: Weight) -> Tensor:
    """Return any weight as a (out_features, in_features) float32 matrix."""
    if isinstance(weight, Quantized4Bit):
        return weight.dequantize()
    if isinstance(weight, LowRank):
        return dense(weight.left) @ dense(weight.right)
    return weight.float()
