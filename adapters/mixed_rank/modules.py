"""Factored linears as modules of torch, for models that are no decoders of ours.

Linears that read the same tensor, such as an attention's queries, keys and values, share a right
factor; it is computed once.
"""

from collections.abc import Sequence
from weakref import ReferenceType, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.mixed_rank.compress_config import GROUP
from models.weights import BLOCK_FORMATS, Matrix, QuantizedBlocks, dense


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
        self.is_int8 = is_int8
        if is_int8:
            self.register_buffer("codes", torch.zeros(outputs, inputs, dtype=torch.int8))
            self.register_buffer("scales", torch.zeros(outputs, inputs // GROUP))
        else:
            self.weight = nn.Parameter(torch.zeros(outputs, inputs))

    @torch.no_grad()
    def put(self, matrix: Matrix) -> None:
        """Take the values of a matrix of this shape; of 8 bits, one in Q8_0."""
        if not self.is_int8:
            self.weight.copy_(dense(matrix))
            return
        assert isinstance(matrix, QuantizedBlocks)
        assert matrix.kind == "Q8_0"
        blocks = matrix.data.view(len(matrix.data), -1, BLOCK_FORMATS["Q8_0"][1])
        self.scales.copy_(matrix.scales)
        self.codes.copy_(blocks[:, :, 2:].contiguous().view(torch.int8).flatten(1))

    def matrix(self) -> Tensor:
        """Return the (outputs, inputs) matrix as it is computed with."""
        if not self.is_int8:
            return self.weight
        return self.codes.to(self.scales.dtype) * self.scales.repeat_interleave(GROUP, dim=1)


class SharedFactor(Factor):
    """A right factor whose product is kept while several left ones ask for that of one input."""

    _input: ReferenceType[Tensor] | None = None
    _product: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., outputs) of (..., inputs)."""
        if torch.is_grad_enabled():
            # Between two steps of a training the same input meets another factor.
            return F.linear(x, self.matrix())
        if self._input is None or self._input() is not x or self._product is None:
            self._input, self._product = ref(x), F.linear(x, self.matrix())
        return self._product

    def forget(self) -> None:
        """Drop the product that is kept; a factor that is changed needs it."""
        self._input = self._product = None


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


def factor_linears(
    model: nn.Module, names: Sequence[str], rank: int, *, is_int8: bool
) -> list[LowRankLinear]:
    """Put factors in the place of linears that read the same; they are yet to be given values.

    Args:
        model: is changed.
        names: dotted, of linears or of what this has put in their place.
        rank: of the factors.
        is_int8: of both.

    Returns:
        Those in their place, which share their right factor.
    """
    shared: SharedFactor | None = None
    found = []
    for name in names:
        old = model.get_submodule(name)
        assert isinstance(old, (nn.Linear, LowRankLinear))
        if shared is None:
            inputs = old.in_features if isinstance(old, nn.Linear) else in_features(old)
            shared = SharedFactor(rank, inputs, is_int8=is_int8)
        module = LowRankLinear(old.out_features, shared, rank, old.bias, is_int8=is_int8)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, module.eval())
        found.append(module)
    return found


def in_features(linear: LowRankLinear) -> int:
    """Return how many inputs it reads."""
    right = linear.right
    return (right.codes if right.is_int8 else right.weight).shape[1]


def put_factors(linears: Sequence[LowRankLinear], left: Matrix, right: Matrix) -> None:
    """Give linears that share their right factor the values of both.

    Args:
        linears: from `factor_linears`.
        left: (m, R), of all outputs, one linear's below the other's.
        right: (R, n).
    """
    linears[0].right.put(right)
    linears[0].right.forget()
    start = 0
    for linear in linears:
        rows = slice(start, start + linear.out_features)
        if isinstance(left, QuantizedBlocks):
            linear.left.put(QuantizedBlocks(data=left.data[rows], kind=left.kind))
        else:
            linear.left.put(dense(left)[rows])
        start += linear.out_features
