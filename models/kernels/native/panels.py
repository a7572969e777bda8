"""Repack weights into the panels that the native kernels read.

A panel holds 16 outputs side by side for every input, so that one vector load serves 16 outputs
and one broadcast activation. 4-bit and 8-bit weights are multiplied as 16-bit integers: a 4-bit
code selects one of 16 values of 12 bits, activations have 13 bits and a scale for each group of
inputs, sums are exact in 32 bits. That is nearer to float32 than bfloat16 arithmetic is.

GGUF's blocks keep their codes and scales. They are multiplied as unsigned 8-bit integers with
8-bit activations that have a scale for each 32 inputs, which is llama.cpp's precision too; the
linears of attention, of the head and after an activation take activations of 14 bits, as two of
8, because 8 bits everywhere cost 0.38 % of perplexity (SmolLM2-135M as Q4_1). Bytes
that a weight takes, in a file and here: Q4_0 and IQ4_NL 0.5625, Q4_1 0.625, Q5_0 0.6875, Q5_1
0.75, Q8_0 1.0625 both; Q4_K 0.5625 and 0.578, Q5_K 0.6875 and 0.703, Q6_K 0.820 and 0.828, because
6-bit scales are kept in 8 bits. Rows of an odd number of groups are padded by one where the format
has no minima.
"""

import ctypes
import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from models.kernels.native.memory import room_for
from models.kernels.native.structs import FORMATS, INPUT_KINDS, PANEL, float_format
from models.weights import Matrix, Quantized4Bit, Quantized8Bit, QuantizedBlocks, code_group

MAX_CODE = 4095


@dataclass(frozen=True, kw_only=True, slots=True)
class Panels:
    """A repacked matrix.

    Attributes:
        data: the bytes the kernels read.
        codebook: (16,) int16 for 4-bit codes, else None.
        format: the kernels' number for it.
        group: inputs per scale; 0 for dense.
        outputs: out_features.
    """

    data: Tensor
    codebook: Tensor | None
    format: int
    group: int
    outputs: int


def kernel_inputs(weight: Matrix, *, is_precise: bool) -> tuple[int, int]:
    """Return what inputs become for a weight: the kernels' number for it, and inputs per scale.

    Args:
        weight: the matrix.
        is_precise: 8-bit activations would cost quality: blocks are to take two 8-bit codes each.
    """
    if isinstance(weight, QuantizedBlocks):
        return INPUT_KINDS["two_bytes" if is_precise else "byte"], 32
    group = kernel_group(weight)
    return INPUT_KINDS["words" if group else "floats"], group


def kernel_group(weight: Matrix) -> int:
    """Return the inputs per scale that the kernels would use for a weight; 0: computed dense."""
    if isinstance(weight, Quantized8Bit):
        group = weight.shape[1] // weight.scales.shape[1]
        return group if group in (16, 32, 64) else 0
    if isinstance(weight, Quantized4Bit):
        # Blocks run over the flattened matrix; a group must not cross the edge of one.
        return code_group(math.gcd(weight.shape[1], weight.block_size))
    return 0


def pack(weight: Matrix, library: ctypes.CDLL) -> Panels:
    """Repack a (out_features, in_features) matrix; a quantised one of odd width becomes float32."""
    if isinstance(weight, QuantizedBlocks):
        return _pack_blocks(weight, library)
    group = kernel_group(weight)
    if group and isinstance(weight, Quantized4Bit):
        return _pack_codes4(weight, group, library)
    if group and isinstance(weight, Quantized8Bit):
        return _pack_codes8(weight, group)
    matrix = weight if isinstance(weight, Tensor) else weight.dequantize()
    outputs, inputs = matrix.shape
    kernel_format = float_format(matrix.dtype)
    panels = _pad_rows(matrix).view(-1, PANEL, inputs).transpose(1, 2).contiguous()
    return Panels(data=panels, codebook=None, format=kernel_format, group=0, outputs=outputs)


def _pad_rows(matrix: Tensor) -> Tensor:
    missing = -matrix.shape[0] % PANEL
    if not missing:
        return matrix
    return torch.cat((matrix, matrix.new_zeros(missing, *matrix.shape[1:])))


def _pack_blocks(weight: QuantizedBlocks, library: ctypes.CDLL) -> Panels:
    """Repack blocks from wherever they are, such as a mapped file, to where they stay."""
    outputs, inputs = weight.shape
    kernel_format = FORMATS[weight.kind.lower()]
    data = room_for(library.proa_blocks_bytes(kernel_format, outputs, inputs))
    rows = weight.data.contiguous()
    threads = len(os.sched_getaffinity(0))
    library.proa_pack_blocks(
        kernel_format, rows.data_ptr(), outputs, inputs, threads, data.data_ptr()
    )
    return Panels(data=data, codebook=None, format=kernel_format, group=32, outputs=outputs)


def _pack_codes4(weight: Quantized4Bit, group: int, library: ctypes.CDLL) -> Panels:
    outputs, inputs = weight.shape
    largest = weight.codebook.abs().max()
    codebook = (weight.codebook / largest * MAX_CODE).round().to(torch.int16).contiguous()
    scales = weight.absmax.float() * (largest / MAX_CODE)
    firsts = torch.arange(0, outputs * inputs, group)
    by_group = scales[firsts // weight.block_size].contiguous()
    panels = -(-outputs // PANEL)
    size = panels * (inputs // group) * (PANEL * group // 2 + PANEL * 4)
    data = torch.empty(size, dtype=torch.uint8)
    packed = weight.packed.contiguous()
    library.proa_pack_codes4(
        packed.data_ptr(), by_group.data_ptr(), outputs, inputs, group, data.data_ptr()
    )
    return Panels(
        data=data, codebook=codebook, format=FORMATS["codes4"], group=group, outputs=outputs
    )


def _pack_codes8(weight: Quantized8Bit, group: int) -> Panels:
    outputs, inputs = weight.shape
    groups = inputs // group
    codes = _pad_rows(weight.codes).view(-1, PANEL, groups, group // 2, 2)
    codes = codes.permute(0, 2, 3, 1, 4).reshape(-1, groups, group * PANEL)
    scales = _pad_rows(weight.scales).view(-1, PANEL, groups).transpose(1, 2).contiguous()
    data = torch.cat((codes, scales.view(torch.int8)), dim=2).contiguous()
    return Panels(data=data, codebook=None, format=FORMATS["codes8"], group=group, outputs=outputs)
