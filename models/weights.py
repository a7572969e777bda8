"""What a linear's weight can be: dense, 4-bit, 8-bit, as a GGUF file packs it, or low-rank."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantized4Bit:
    """A matrix in bitsandbytes' 4-bit format, double quantisation of the scales already undone.

    The matrix is flattened row by row; blocks of `block_size` consecutive values share one scale,
    so a block may straddle rows. Of each byte the high nibble is the earlier value.

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
class Quantized8Bit:
    """A matrix of 8-bit codes, each run of `group` inputs of a row with its own scale.

    Attributes:
        codes: (out_features, in_features) int8, -127 .. 127.
        scales: (out_features, in_features / group) float32.
    """

    codes: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> Tensor:
        """Return the (out_features, in_features) float32 matrix."""
        group = self.codes.shape[1] // self.scales.shape[1]
        return self.codes.float() * self.scales.repeat_interleave(group, dim=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedBlocks:
    """A matrix in one of GGUF's block formats, byte for byte as a file has it.

    Attributes:
        data: (out_features, bytes of a row) uint8; a row is a sequence of blocks.
        kind: the format's name there, one of `BLOCK_FORMATS`.
    """

    data: Tensor
    kind: str

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        values, size = BLOCK_FORMATS[self.kind]
        return self.data.shape[0], self.data.shape[1] // size * values

    @property
    def scales(self) -> Tensor:
        """What whole blocks are multiplied by, and what is added: (out_features, N) float16."""
        first, count = _SCALES[self.kind]
        blocks = self.data.view(len(self.data), -1, BLOCK_FORMATS[self.kind][1])
        fields = blocks[:, :, first : first + 2 * count].contiguous()
        return fields.view(torch.float16).flatten(1)

    def dequantize(self) -> Tensor:
        """Return the (out_features, in_features) float32 matrix, exactly."""
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType[self.kind]
        return torch.from_numpy(dequantize(self.data.numpy(), kind)).view(self.shape)


# Values in a block and bytes that they take, scales included, of the formats that are computed
# from their own codes.
BLOCK_FORMATS = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210), "IQ4_NL": (32, 18),
}  # fmt: skip
# First byte and number of the float16 scales in a block.
_SCALES = {
    "Q4_0": (0, 1), "Q4_1": (0, 2), "Q5_0": (0, 1), "Q5_1": (0, 2), "Q8_0": (0, 1),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208, 1), "IQ4_NL": (0, 1),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRank:
    """A matrix left @ right of rank R.

    Attributes:
        left: (out_features, R).
        right: (R, in_features).
    """

    left: "Tensor | Quantized4Bit | Quantized8Bit | QuantizedBlocks"
    right: "Tensor | Quantized4Bit | Quantized8Bit | QuantizedBlocks"

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.left.shape[0], self.right.shape[1]


Matrix: TypeAlias = Tensor | Quantized4Bit | Quantized8Bit | QuantizedBlocks
Weight: TypeAlias = Matrix | LowRank


def dense(weight: Weight) -> Tensor:
    """Return any weight as a float32 tensor of the same shape."""
    if isinstance(weight, (Quantized4Bit, Quantized8Bit, QuantizedBlocks)):
        return weight.dequantize()
    if isinstance(weight, LowRank):
        return dense(weight.left) @ dense(weight.right)
    return weight.float()


def select_rows(weight: Matrix, rows: Sequence[int] | Tensor) -> Matrix:
    """Take rows of a matrix (or of a bias), exactly.

    Args:
        weight: (out_features, in_features) or (out_features,).
        rows: the rows to take, in order.

    Returns:
        The same kind; a `Quantized4Bit` whose rows share blocks becomes dense float32.
    """
    index = torch.as_tensor(rows)
    if isinstance(weight, Tensor):
        return weight[index]
    if isinstance(weight, QuantizedBlocks):
        return replace(weight, data=weight.data[index])
    if isinstance(weight, Quantized8Bit):
        return Quantized8Bit(codes=weight.codes[index], scales=weight.scales[index])
    out_features, in_features = weight.shape
    if in_features % weight.block_size:
        return weight.dequantize()[index]
    return replace(
        weight,
        packed=weight.packed.view(out_features, -1)[index].flatten(),
        absmax=weight.absmax.view(out_features, -1)[index].flatten(),
        shape=(len(index), in_features),
    )


def count_linear_parameters(weights: Mapping[str, Weight]) -> int:
    """Count the parameters of the layers' linears, without biases.

    Args:
        weights: by canonical name.
    """
    linears = (
        weight
        for name, weight in weights.items()
        if name.startswith("layers.") and len(weight.shape) == 2
    )
    return sum(math.prod(matrix.shape) for matrix in iterate_matrices(linears))


def iterate_matrices(weights: Iterable[Weight]) -> Iterator[Matrix]:
    """Yield matrices, those of products too; what several products share comes once."""
    seen: set[int] = set()
    for weight in weights:
        parts = (weight.left, weight.right) if isinstance(weight, LowRank) else (weight,)
        for matrix in parts:
            if id(matrix) not in seen:
                seen.add(id(matrix))
                yield matrix


def code_group(in_features: int) -> int:
    """Inputs that can share a scale in kernels: the largest of 64, 32, 16 that divides the width.

    Returns 0 if none does; such a matrix is computed dense.
    """
    return next((group for group in (64, 32, 16) if in_features % group == 0), 0)


def quantize_8bit(matrix: Tensor) -> Tensor | Quantized8Bit:
    """Round a dense (out_features, in_features) matrix to 8 bits, or return it if no group fits."""
    group = code_group(matrix.shape[1])
    if not group:
        return matrix
    codes = torch.empty(matrix.shape, dtype=torch.int8)
    scales = torch.empty(matrix.shape[0], matrix.shape[1] // group)
    for rows in torch.arange(matrix.shape[0]).split(4096):  # bounds the float32 copies
        groups = matrix[rows].float().view(len(rows), -1, group)
        scales[rows] = groups.abs().amax(-1) / 127
        scaled = groups / scales[rows].clamp_min(1e-30)[..., None]
        codes[rows] = scaled.round_().to(torch.int8).view(len(rows), -1)
    return Quantized8Bit(codes=codes, scales=scales)
