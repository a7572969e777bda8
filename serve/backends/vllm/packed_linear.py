"""A linear of one rank, made of matrices in any of our formats."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.spec import DecoderSpec, LayerSpec
from models.weights import (
    BLOCK_FORMATS,
    LowRank,
    Matrix,
    Quantized4Bit,
    Quantized8Bit,
    Weight,
    dense,
    select_rows,
)

Multiply: TypeAlias = Callable[[Tensor], Tensor]
MakeMultiply: TypeAlias = Callable[[Sequence[Matrix]], Multiply]
"""Gives what multiplies (..., in_features) with matrices that share their input, side by side."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """A rank's part of the work on a layer.

    Attributes:
        rank, size: which of how many.
    """

    rank: int = 0
    size: int = 1

    def part(self, count: int, what: str) -> slice:
        """Return the rank's run of `count` equal things.

        Raises:
            ValueError: they cannot be divided.
        """
        if count % self.size:
            raise ValueError(
                f"tensor_parallel_size: {self.size} does not divide the {count} {what}"
            )
        width = count // self.size
        return slice(self.rank * width, (self.rank + 1) * width)

    def key_value_heads(self, count: int) -> slice:
        """Return the rank's KV heads; where there are fewer than ranks, several have the same."""
        if count >= self.size:
            return self.part(count, "key and value heads")
        if self.size % count:
            raise ValueError(
                f"tensor_parallel_size: {self.size} is no multiple of the {count} key and value "
                "heads"
            )
        head = self.rank * count // self.size
        return slice(head, head + 1)


WHOLE = Share()


def check_share(spec: DecoderSpec, size: int) -> None:
    """Refuse a number of ranks that a decoder cannot be divided by.

    Raises:
        ValueError: names what it does not divide.
    """
    share = Share(rank=0, size=size)
    share.part(spec.vocab_size, "tokens of the vocabulary")
    for layer in spec.layers:
        share.part(layer.num_attention_heads, "attention heads")
        share.key_value_heads(layer.num_key_value_heads)
        share.part(layer.intermediate_size, "middle channels of an MLP")


def shard(
    name: str, weight: Weight, bias: Tensor | None, layer: LayerSpec, share: Share
) -> tuple[Weight, Tensor | None]:
    """Take a rank's part of a linear.

    Inputs of "o" and "down" are divided, so that the ranks' results are to be added; outputs of the
    others are.

    Args:
        name: canonical: "q", "k", "v", "o", "gate", "up" or "down".
        weight: (out_features, in_features).
        bias: (out_features,), or None; of a sum the first rank's part is all of it.
        layer: the widths of the whole layer.
        share: the rank's part.
    """
    if share.size == 1:
        return weight, bias
    heads = {"q": layer.num_attention_heads, "o": layer.num_attention_heads}
    if name in ("k", "v"):
        part = _widened(share.key_value_heads(layer.num_key_value_heads), layer.head_dim)
    elif name in heads:
        part = _widened(share.part(heads[name], "attention heads"), layer.head_dim)
    else:
        part = share.part(layer.intermediate_size, "middle channels of an MLP")
    if name in ("o", "down"):
        return select_columns(weight, part), bias if share.rank == 0 else None
    rows = torch.arange(part.start, part.stop)
    if isinstance(weight, LowRank):
        sharded: Weight = replace(weight, left=select_rows(weight.left, rows))
    else:
        sharded = select_rows(weight, rows)
    return sharded, None if bias is None else bias[part]


def _widened(part: slice, width: int) -> slice:
    return slice(part.start * width, part.stop * width)


def select_columns(weight: Weight, part: slice) -> Weight:
    """Take a run of a matrix's columns, exactly; dense where the format's blocks straddle its ends.

    Args:
        weight: (out_features, in_features).
        part: the columns.
    """
    if isinstance(weight, LowRank):
        right = select_columns(weight.right, part)
        assert not isinstance(right, LowRank)
        return replace(weight, right=right)
    if isinstance(weight, Tensor):
        return weight[:, part]
    rows, columns = weight.shape
    if isinstance(weight, Quantized8Bit):
        group = columns // weight.scales.shape[1]
        if _is_aligned(part, group):
            scales = weight.scales[:, part.start // group : part.stop // group]
            return Quantized8Bit(codes=weight.codes[:, part], scales=scales)
    elif isinstance(weight, Quantized4Bit):
        block = weight.block_size
        if columns % block == 0 and _is_aligned(part, block):
            packed = weight.packed.view(rows, -1)[:, part.start // 2 : part.stop // 2]
            absmax = weight.absmax.view(rows, -1)[:, part.start // block : part.stop // block]
            return replace(
                weight, packed=packed.flatten(), absmax=absmax.flatten(),
                shape=(rows, part.stop - part.start),
            )  # fmt: skip
    else:
        values, size = BLOCK_FORMATS[weight.kind]
        if _is_aligned(part, values):
            first, last = (bound // values * size for bound in (part.start, part.stop))
            return replace(weight, data=weight.data[:, first:last].contiguous())
    return dense(weight)[:, part]


def _is_aligned(part: slice, step: int) -> bool:
    return part.start % step == 0 and part.stop % step == 0


class PackedLinear(nn.Module):
    """Matrices that share their input, as one linear of a layer.

    A pruned one reads some channels of its input, and adds to some of its output.

    Args:
        weights: (out_features, in_features) each; their outputs stand side by side.
        biases: one for each matrix, or None.
        make_multiply: prepares matrices for computing.
        kept_inputs: which input channels it reads; None: all.
        kept_outputs: to which output channels its results go; None: all.
        width: output channels, those without a result included.
        dtype, device: of its input and output.
    """

    def __init__(
        self,
        weights: Sequence[Weight],
        biases: Sequence[Tensor | None],
        make_multiply: MakeMultiply,
        *,
        kept_inputs: Sequence[int] | None = None,
        kept_outputs: Sequence[int] | None = None,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self._bias: Tensor | None
        self._inputs: Tensor | None
        self._outputs: Tensor | None
        self._width = width
        self._dtype = dtype
        # Of each run: what makes its inputs, if they are a factor's, and what follows.
        self._runs = [
            (None if right is None else make_multiply([right]), make_multiply(matrices))
            for right, matrices in _runs(weights)
        ]
        bias = None
        if any(one is not None for one in biases):
            parts = [
                torch.zeros(weight.shape[0]) if one is None else one.float()
                for weight, one in zip(weights, biases, strict=True)
            ]
            bias = torch.cat(parts).to(device, dtype)
        self.register_buffer("_bias", bias, persistent=False)
        self.register_buffer("_inputs", _index(kept_inputs, device), persistent=False)
        self.register_buffer("_outputs", _index(kept_outputs, device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., width) of (..., in_features)."""
        if self._inputs is not None:
            x = x.index_select(-1, self._inputs)
        outs = []
        for right, multiply in self._runs:
            outs.append(multiply(x if right is None else right(x)))
        out = (outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)).to(self._dtype)
        if self._bias is not None:
            out = out + self._bias
        if self._outputs is not None:
            out = out.new_zeros(*out.shape[:-1], self._width).index_copy_(-1, self._outputs, out)
        return out


def _runs(weights: Sequence[Weight]) -> list[tuple[Matrix | None, list[Matrix]]]:
    """Group neighbours that multiply the same: the input itself, or one right factor's result."""
    runs: list[tuple[Matrix | None, list[Matrix]]] = []
    keyed = (
        (weight.right, weight.left) if isinstance(weight, LowRank) else (None, weight)
        for weight in weights
    )
    for _, group in itertools.groupby(keyed, key=lambda item: id(item[0])):
        members = list(group)
        runs.append((members[0][0], [matrix for _, matrix in members]))
    return runs


def _index(kept: Sequence[int] | None, device: torch.device) -> Tensor | None:
    return None if kept is None else torch.tensor(kept, device=device)


def make_dense_multiply(dtype: torch.dtype, device: torch.device) -> MakeMultiply:
    """Return what multiplies with dense matrices, made of whatever format."""

    def make(matrices: Sequence[Matrix]) -> Multiply:
        matrix = torch.cat([dense(one).to(device, dtype) for one in matrices])
        return lambda x: F.linear(x.to(dtype), matrix)

    return make


def make_cuda_multiply(dtype: torch.dtype, device: torch.device) -> MakeMultiply:
    """Return what multiplies with 4-bit matrices by bitsandbytes' kernels, with others dense."""
    from models.kernels.cuda.four_bit import make_multiply_4bit

    make_dense = make_dense_multiply(dtype, device)

    def make(matrices: Sequence[Matrix]) -> Multiply:
        if not all(isinstance(one, Quantized4Bit) for one in matrices):
            return make_dense(matrices)
        products = [
            make_multiply_4bit(one, dtype, device)
            for one in matrices
            if isinstance(one, Quantized4Bit)
        ]
        return lambda x: torch.cat([product(x) for product in products], dim=-1)

    return make
