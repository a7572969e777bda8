"""Turn a program's operations into the structures that the native kernels read."""

import ctypes
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from operator import itemgetter

import torch
from torch import Tensor

from models.kernels.native.memory import on_huge_pages
from models.kernels.native.panels import Panels, kernel_inputs, pack
from models.kernels.native.structs import (
    ACTIVATIONS,
    OP_KINDS,
    PROLOGUES,
    NativeOp,
    NativePiece,
    float_format,
)
from models.program import LOGITS, Activate, AttentionOp, EmbedOp, LinearOp, Norm, Op, Piece
from models.weights import Matrix, QuantizedBlocks


class Lowering:
    """Lowers operations over one set of buffers, and owns the memory they point to.

    Args:
        library: the extension.
        widths: of the buffers, by name.
        place: copies a tensor to where the kernels read it.
        base: lowered already; what `lower` meets again of its tables, norms, biases and matrices,
            the same objects, is shared with it.

    Attributes:
        num_bytes: memory that it owns, without what it shares with the base.
        places: (operation, piece) of each linear that has a name.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        widths: Mapping[str, int],
        place: Callable[[Tensor], Tensor] = on_huge_pages,
        base: "Lowering | None" = None,
    ) -> None:
        self._base: Lowering | None = base
        self._library = library
        self._place = place
        self._buffers = {name: i for i, name in enumerate(widths)}
        self._precise: set[int] = set()  # ids of linears
        self._keep: list[object] = []
        # By id of what operations hold, so good for as long as those live.
        self._tensors: dict[int, Tensor] = {}
        self._panels: dict[int, Panels] = {}
        self.num_bytes = 0
        self.places: dict[str, tuple[int, int]] = {}

    def lower(self, ops: Iterable[Op]) -> list[NativeOp]:
        """Lower operations; a linear whose pieces differ in their input format becomes several."""
        lowered: list[NativeOp] = []
        ops = tuple(ops)
        self._precise = _find_precise(ops)
        for op in ops:
            if isinstance(op, EmbedOp):
                lowered.append(self._lower_embed(op))
            elif isinstance(op, LinearOp):
                lowered += self._lower_linear(op, len(lowered))
            elif isinstance(op, AttentionOp):
                lowered.append(self._lower_attention(op))
            else:
                src = self._buffers[op.src]
                lowered.append(NativeOp(kind=OP_KINDS["tap"], src=src, layer=op.index))
        self._base = None  # the rest of it may leave memory
        return lowered

    def norm_op(self, norm: Norm | None) -> NativeOp:
        """Make an operation that only normalises."""
        native = NativeOp(kind=OP_KINDS["linear"])
        if norm is not None:
            self._set_norm(native, norm)
        return native

    def keep(self, item: object) -> int:
        """Keep a ctypes array; return its address."""
        self._keep.append(item)
        return ctypes.addressof(item)  # type: ignore[arg-type]

    def pointer(self, tensor: Tensor | None) -> int | None:
        """Keep a copy of a tensor, free of the file it may be mapped from; return its address."""
        return None if tensor is None else self._copy(tensor).data_ptr()

    def _copy(self, tensor: Tensor) -> Tensor:
        copy = self._place(tensor)
        self._keep.append(copy)
        self.num_bytes += copy.nbytes
        return copy

    def _shared(self, tensor: Tensor | None) -> int | None:
        """Do as `pointer` for a tensor of an operation, which the base may have copied already."""
        if tensor is None:
            return None
        copy = None if self._base is None else self._base._tensors.get(id(tensor))
        if copy is None:
            copy = self._copy(tensor)
        self._tensors[id(tensor)] = copy
        return copy.data_ptr()

    def _pack(self, weight: Matrix) -> Panels:
        """Repack a matrix of an operation, or take the panels that the base made of it."""
        panels = None
        if isinstance(weight, QuantizedBlocks):  # a table that is the head too
            panels = self._panels.get(id(weight))
        if panels is None and self._base is not None:
            panels = self._base._panels.get(id(weight))
        if panels is None:
            panels = pack(weight, self._library)
            if isinstance(weight, QuantizedBlocks):  # packed where it stays
                self._keep.append(panels.data)
                self.num_bytes += panels.data.nbytes
            else:
                panels = replace(panels, data=self._copy(panels.data))
            if panels.codebook is not None:
                panels = replace(panels, codebook=self._copy(panels.codebook))
        self._panels[id(weight)] = panels
        return panels

    def _lower_embed(self, op: EmbedOp) -> NativeOp:
        native = NativeOp(kind=OP_KINDS["embed"], dst=self._buffers[op.dst])
        if isinstance(op.table, QuantizedBlocks):
            panels = self._pack(op.table)  # often the head's
            native.table, native.table_format = panels.data.data_ptr(), panels.format
        elif isinstance(op.table, Tensor):
            native.table = self._shared(op.table)
            native.table_format = float_format(op.table.dtype)
        else:
            native.table = self.pointer(op.table.dequantize())
            native.table_format = float_format(torch.float32)
        if op.positions_table is not None:
            native.position_table = self._shared(op.positions_table)
            native.position_format = float_format(op.positions_table.dtype)
            native.position_offset = op.positions_offset
        return native

    def _lower_linear(self, op: LinearOp, index: int) -> list[NativeOp]:
        """Make one native operation for each input format among the pieces.

        Args:
            op: what to lower.
            index: of the first native operation.
        """
        names = dict(zip(map(id, op.pieces), op.names, strict=False))
        by_inputs: dict[tuple[int, int], list[Piece]] = {}
        for piece in op.pieces:
            inputs = kernel_inputs(piece.weight, is_precise=id(op) in self._precise)
            by_inputs.setdefault(inputs, []).append(piece)
        ordered = sorted(by_inputs.items(), key=itemgetter(0))
        for i, (_, pieces) in enumerate(ordered, index):
            for p, piece in enumerate(pieces):
                if id(piece) in names:
                    self.places[names[id(piece)]] = i, p
        return [self._lower_pieces(op, inputs, pieces) for inputs, pieces in ordered]

    def _lower_pieces(self, op: LinearOp, inputs: tuple[int, int], pieces: list[Piece]) -> NativeOp:
        lowered = []
        for piece in pieces:
            panels = self._pack(piece.weight)
            lowered.append(
                NativePiece(
                    data=panels.data.data_ptr(),
                    bias=self._shared(piece.bias),
                    codebook=None if panels.codebook is None else panels.codebook.data_ptr(),
                    format=panels.format,
                    outputs=panels.outputs,
                    dst_offset=piece.offset,
                )
            )
        native = NativeOp(
            kind=OP_KINDS["linear"],
            pieces=self.keep((NativePiece * len(lowered))(*lowered)),
            num_pieces=len(lowered),
            input_kind=inputs[0],
            group=inputs[1],
            src=self._buffers[op.src],
            dst=-1 if op.dst == LOGITS else self._buffers[op.dst],
            inputs=op.in_features,
            accumulate=op.accumulate,
            select_rows=op.selects_rows,
            scatter=self.pointer(op.scatter),
        )
        if isinstance(op.prologue, Norm):
            self._set_norm(native, op.prologue)
        elif isinstance(op.prologue, Activate):
            kind = "gated_activation" if op.prologue.is_gated else "activation"
            native.prologue = PROLOGUES[kind]
            native.activation = ACTIVATIONS[op.prologue.kind]
        return native

    def _set_norm(self, native: NativeOp, norm: Norm) -> None:
        native.prologue = PROLOGUES["rms_norm" if norm.bias is None else "layer_norm"]
        native.norm_weight = self._shared(norm.weight)
        native.norm_bias = self._shared(norm.bias)
        native.norm_width = len(norm.weight)
        native.gather = self.pointer(norm.indices)
        native.eps = norm.eps

    def _lower_attention(self, op: AttentionOp) -> NativeOp:
        return NativeOp(
            kind=OP_KINDS["attention"],
            src=self._buffers[op.src],
            dst=self._buffers[op.dst],
            layer=op.layer,
            num_heads=op.num_heads,
            num_kv_heads=op.num_kv_heads,
            head_dim=op.head_dim,
            rotary_dim=op.rotary_dim,
            q_norm=self._shared(op.q_norm),
            k_norm=self._shared(op.k_norm),
            eps=op.eps,
            scale=op.scale,
        )


def _find_precise(ops: Sequence[Op]) -> set[int]:
    """Return the ids of linears that 8-bit activations would cost quality.

    Measured: they cost perplexity, except where the MLP begins. Two factors are one linear.
    """
    attentions = [op for op in ops if isinstance(op, AttentionOp)]
    attended = {name for op in attentions for name in (op.src, op.dst)}
    found = {
        id(op)
        for op in ops
        if isinstance(op, LinearOp)
        and (
            op.selects_rows
            or isinstance(op.prologue, Activate)
            or not attended.isdisjoint((op.src, op.dst))
        )
    }
    for right, left in pairwise(ops):
        is_pair = isinstance(right, LinearOp) and isinstance(left, LinearOp) and (
            left.src == right.dst and left.prologue is None)  # fmt: skip
        if is_pair and not found.isdisjoint((id(right), id(left))):
            found |= {id(right), id(left)}
    return found
