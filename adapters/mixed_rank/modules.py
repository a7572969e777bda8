"""Factored linears as modules of torch, for models that are no decoders of ours.

Linears that read the same tensor, such as an attention's queries, keys and values, share a right
factor; it is computed once.
"""

from weakref import ReferenceType, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.mixed_rank.quantize import GROUP
from models.q8_0 import quantize_q8_0
from models.weights import BLOCK_FORMATS, QuantizedBlocks


class Factor(nn.Module):
    """A matrix of a product.

    Attributes:
        codes, scales: where it has 8 bits: (outputs, inputs) int8 and (outputs, inputs / 32).
        weight: where it has none: (outputs, inputs).

    Args:
        outputs, inputs: its shape.
        is_int8: 8-bit codes with a scale for each 32 inputs instead of float values.
    """

    codes: Tensor
    scales: Tensor
    weight: nn.Parameter

    def __init__(self, outputs: int, inputs: int, *, is_int8: bool) -> None:
        super().__init__()
        self._is_int8 = is_int8
        if is_int8:
            self.register_buffer("codes", torch.zeros(outputs, inputs, dtype=torch.int8))
            self.register_buffer("scales", torch.zeros(outputs, inputs // GROUP))
        else:
            self.weight = nn.Parameter(torch.zeros(outputs, inputs))

    @torch.no_grad()
    def put(self, matrix: Tensor) -> None:
        """Take the values of a matrix of this shape, rounded if need be."""
        if not self._is_int8:
            self.weight.copy_(matrix)
            return
        blocks = quantize_q8_0(matrix).data.view(len(matrix), -1, BLOCK_FORMATS["Q8_0"][1])
        self.scales.copy_(blocks[:, :, :2].contiguous().view(torch.float16).flatten(1))
        self.codes.copy_(blocks[:, :, 2:].contiguous().view(torch.int8).flatten(1))

    def matrix(self) -> Tensor:
        """Return the (outputs, inputs) matrix as it is computed with."""
        if not self._is_int8:
            return self.weight
        return self.codes.to(self.scales.dtype) * self.scales.repeat_interleave(GROUP, dim=1)


class SharedFactor(Factor):
    """A right factor whose product is kept while several left ones ask for that of one input."""

    _input: ReferenceType[Tensor] | None = None
    _product: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., outputs) of (..., inputs)."""
        if self._input is None or self._input() is not x or self._product is None:
            self._input, self._product = ref(x), F.linear(x, self.matrix())
        return self._product


class LowRankLinear(nn.Module):
    """A linear whose matrix is left @ right.

    Args:
        outputs: of the linear.
        right: (rank, inputs), which others may share.
        rank: of the product.
        bias: (outputs,) or None.
        is_int8: of the left factor.
    """

    def __init__(
        self, outputs: int, right: SharedFactor, rank: int, bias: Tensor | None, *, is_int8: bool
    ) -> None:
        super().__init__()
        self.out_features = outputs
        self.right = right
        self.left = Factor(outputs, rank, is_int8=is_int8)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., outputs) of (..., inputs)."""
        return F.linear(self.right(x), self.left.matrix(), self.bias)


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another, by its dotted name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def as_blocks(factor: Factor) -> QuantizedBlocks | Tensor:
    """Return a factor as the other parts of Proa know it."""
    if not factor._is_int8:
        return factor.weight.detach()
    scales = factor.scales.half().contiguous().view(torch.uint8).view(*factor.scales.shape, 2)
    codes = factor.codes.view(torch.uint8).view(*factor.scales.shape, GROUP)
    return QuantizedBlocks(data=torch.cat((scales, codes), dim=2).flatten(1), kind="Q8_0")
