"""Turn a program's operations into the structures that the native kernels read."""

import ctypes
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from models.kernels.memory import on_huge_pages
from models.kernels.native_program import (
    ACTIVATIONS,
    OP_KINDS,
    PROLOGUES,
    NativeOp,
    NativePiece,
)
from models.kernels.panels import float_format, kernel_group, pack
from models.program import LOGITS, Activate, AttentionOp, EmbedOp, LinearOp, Norm, Op, Piece


class Lowering:
    """Lowers operations over one set of buffers, and owns the memory they point to.

    Args:
        library: the extension.
        widths: of the buffers, by name.
        place: copies a tensor to where the kernels read it.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        widths: Mapping[str, int],
        place: Callable[[Tensor], Tensor] = on_huge_pages,
    ) -> None:
        self._library = library
        self._place = place
        self._buffers = {name: i for i, name in enumerate(widths)}
        self._keep: list[object] = []
        self.num_bytes = 0

    def lower(self, ops: Iterable[Op]) -> list[NativeOp]:
        """Lower operations; a linear whose pieces differ in their input format becomes several."""
        lowered: list[NativeOp] = []
        for op in ops:
            if isinstance(op, EmbedOp):
                lowered.append(self._lower_embed(op))
            elif isinstance(op, LinearOp):
                lowered += self._lower_linear(op)
            elif isinstance(op, AttentionOp):
                lowered.append(self._lower_attention(op))
            else:
                src = self._buffers[op.src]
                lowered.append(NativeOp(kind=OP_KINDS["tap"], src=src, layer=op.index))
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
        if tensor is None:
            return None
        tensor = self._place(tensor)
        self._keep.append(tensor)
        self.num_bytes += tensor.nbytes
        return tensor.data_ptr()

    def _lower_embed(self, op: EmbedOp) -> NativeOp:
        native = NativeOp(kind=OP_KINDS["embed"], dst=self._buffers[op.dst])
        native.table = self.pointer(op.table)
        native.table_format = float_format(op.table.dtype)
        if op.positions_table is not None:
            native.position_table = self.pointer(op.positions_table)
            native.position_format = float_format(op.positions_table.dtype)
            native.position_offset = op.positions_offset
        return native

    def _lower_linear(self, op: LinearOp) -> list[NativeOp]:
        """Make one native operation for each input format among the pieces."""
        groups = sorted({kernel_group(piece.weight) for piece in op.pieces})
        return [
            self._lower_pieces(op, [p for p in op.pieces if kernel_group(p.weight) == group], group)
            for group in groups
        ]

    def _lower_pieces(self, op: LinearOp, pieces: list[Piece], group: int) -> NativeOp:
        lowered = []
        for piece in pieces:
            panels = pack(piece.weight, self._library)
            lowered.append(
                NativePiece(
                    data=self.pointer(panels.data),
                    bias=self.pointer(piece.bias),
                    codebook=self.pointer(panels.codebook),
                    format=panels.format,
                    outputs=panels.outputs,
                    dst_offset=piece.offset,
                )
            )
        native = NativeOp(
            kind=OP_KINDS["linear"],
            pieces=self.keep((NativePiece * len(lowered))(*lowered)),
            num_pieces=len(lowered),
            group=group,
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
        native.norm_weight = self.pointer(norm.weight)
        native.norm_bias = self.pointer(norm.bias)
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
            q_norm=self.pointer(op.q_norm),
            k_norm=self.pointer(op.k_norm),
            eps=op.eps,
            scale=op.scale,
        )
