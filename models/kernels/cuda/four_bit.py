"""Multiply with a 4-bit matrix by bitsandbytes' kernels."""

from collections.abc import Callable

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor

from models.quantization import NF4_CODEBOOK
from models.weights import Quantized4Bit


def quant_state(weight: Quantized4Bit, dtype: torch.dtype) -> QuantState:
    """Describe a matrix to bitsandbytes.

    Args:
        weight: on the device that computes.
        dtype: of the result.
    """
    is_nf4 = torch.allclose(weight.codebook.cpu(), torch.tensor(NF4_CODEBOOK), atol=1e-4)
    return QuantState(
        absmax=weight.absmax, shape=torch.Size(weight.shape), code=weight.codebook,
        blocksize=weight.block_size, quant_type="nf4" if is_nf4 else "fp4", dtype=dtype,
    )  # fmt: skip


def make_multiply_4bit(
    weight: Quantized4Bit, dtype: torch.dtype, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """Return what multiplies (..., in_features) with a copy of a matrix on a device, in `dtype`."""
    placed = Quantized4Bit(
        packed=weight.packed.to(device), absmax=weight.absmax.to(device),
        codebook=weight.codebook.to(device), shape=weight.shape, block_size=weight.block_size,
    )  # fmt: skip
    packed, state = placed.packed.view(-1, 1).t(), quant_state(placed, dtype)

    def multiply(x: Tensor) -> Tensor:
        return bnb.matmul_4bit(x.to(dtype), packed, quant_state=state)

    return multiply
