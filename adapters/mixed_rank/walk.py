"""Two decoders in step, one linear after the other: as it was, and as it has been compressed.

What a compressed linear reads has drifted, since those before it are compressed already. So each is
fitted when all of its inputs are known: every linear runs over all texts before the next one does.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from adapters.packed_attention import PackedAttention
from models.kernels.reference.operations import (
    apply_embed,
    apply_prologue,
    rotary_angles,
    run_ops,
)
from models.program import AttentionOp, LinearOp, Op, Program
from models.weights import Matrix, dense


def layer_matrices(program: Program, layer: int) -> dict[int, Tensor]:
    """Return the dense matrices of a layer's linears, by the id of the weights they are of."""
    return {
        id(piece.weight): dense(piece.weight)
        for op in program.layers[layer]
        if isinstance(op, LinearOp)
        for piece in op.pieces
    }


def run_layer(
    program: Program, layer: int, stream: Tensor, matrices: Mapping[int, Tensor]
) -> Tensor:
    """Compute a layer of one text; differentiable in stream and matrices.

    Args:
        program: of the decoder.
        layer: its number.
        stream: (S, D) residual stream before it.
        matrices: as from `layer_matrices`.

    Returns:
        (S, D), after it.
    """
    buffers = {"x": stream}
    positions = torch.arange(len(stream), device=stream.device)
    run_ops(
        program.layers[layer], buffers, program.widths,
        rotary_angles(program.inv_freq, program.rotary_scale, positions),
        attend=PackedAttention(torch.tensor([0, len(stream)]), stream.device),
        linear=lambda x, weight: x @ matrices[id(weight)].T,
    )  # fmt: skip
    return buffers["x"]


class _Decoder:
    """One of the two: its rows, text by text, and what is still to be computed of them."""

    def __init__(
        self, program: Program, texts: Sequence[Tensor], streams: Sequence[Tensor]
    ) -> None:
        self._program = program
        self._buffers: list[dict[str, Tensor]] = [{"x": stream} for stream in streams]
        self._attend = [
            PackedAttention(torch.tensor([0, len(text)]), stream.device)
            for text, stream in zip(texts, streams, strict=True)
        ]
        self._angles = [
            rotary_angles(
                program.inv_freq,
                program.rotary_scale,
                torch.arange(len(text), device=stream.device),
            )
            for text, stream in zip(texts, streams, strict=True)
        ]
        self._matrices: dict[int, Tensor] = {}
        self._pending: list[Op] = []

    @property
    def streams(self) -> list[Tensor]:
        """(S, D) residual stream of each text, between layers."""
        return [buffers["x"] for buffers in self._buffers]

    def rows(self, op: LinearOp) -> Iterator[Tensor]:
        """Yield what a linear reads, (S, in_features) for each text."""
        for number in range(len(self._buffers)):
            buffers = dict(self._buffers[number])
            self._run(number, buffers)
            yield apply_prologue(op, buffers[op.src])

    def advance(self, op: Op, later: Sequence[Op], replaced: Mapping[int, Tensor]) -> None:
        """Compute an operation, at once or when what it makes is needed.

        What a linear makes may be many times the stream; where it is not added to the stream it is
        made again for each of its readers rather than kept for all texts.

        Args:
            op: the next of the layer.
            later: those of the layer that follow.
            replaced: matrices of `op` in place of its own, by the id of these.
        """
        if isinstance(op, LinearOp):
            for piece in op.pieces:
                matrix = replaced.get(id(piece.weight))
                self._matrices[id(piece.weight)] = dense(piece.weight) if matrix is None else matrix
        self._pending.append(op)
        if isinstance(op, LinearOp) and not op.accumulate:
            return
        needed = {"x"} | {o.src for o in later if isinstance(o, (LinearOp, AttentionOp))}
        for number, buffers in enumerate(self._buffers):
            self._run(number, buffers)
            for name in set(buffers) - needed:
                del buffers[name]
        self._pending.clear()
        if not later:
            self._matrices.clear()

    def _run(self, number: int, buffers: dict[str, Tensor]) -> None:
        run_ops(
            self._pending, buffers, self._program.widths, self._angles[number],
            attend=self._attend[number], linear=self._multiply,
        )  # fmt: skip

    def _multiply(self, x: Tensor, weight: Matrix) -> Tensor:
        return x @ self._matrices[id(weight)].T


class Walk:
    """The layers of a decoder over some texts, before and after compression.

    Args:
        program: of the decoder as it was, on any device.
        texts: (S,) int64 token ids each; each is an observation.
        streams: the residual streams to start from, of the decoder as it was and of the compressed
            one: those after the layers that are done. None: the embeddings, alike for both.
        has_drift: walk the compressed decoder too.
    """

    @torch.no_grad()
    def __init__(
        self,
        program: Program,
        texts: Sequence[Tensor],
        *,
        has_drift: bool,
        streams: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
    ) -> None:
        device = program.inv_freq.device
        if streams is None:
            embedded = [
                apply_embed(program.embed, text.to(device), torch.arange(len(text), device=device))
                for text in texts
            ]
            streams = embedded, embedded
        self._program = program
        self._plain = _Decoder(program, texts, streams[0])
        self._compressed = _Decoder(program, texts, streams[1]) if has_drift else None

    @property
    def streams(self) -> tuple[list[Tensor], list[Tensor]]:
        """Those of both decoders, between layers."""
        compressed = self._plain if self._compressed is None else self._compressed
        return self._plain.streams, compressed.streams

    def linears(self, layer: int) -> Iterator[LinearOp]:
        """Yield the linears of a layer in their order.

        When the next one is asked for, `replace` must have been called for the one before, if it
        is compressed. Layers must be walked in order, each to its end.
        """
        ops = self._program.layers[layer]
        for number, op in enumerate(ops):
            self._replaced: dict[int, Tensor] = {}
            if isinstance(op, LinearOp):
                yield op
            with torch.no_grad():
                self._plain.advance(op, ops[number + 1 :], {})
                if self._compressed is not None:
                    self._compressed.advance(op, ops[number + 1 :], self._replaced)

    @torch.no_grad()
    def inputs(self, op: LinearOp) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield what the linear that is current reads: (S, in_features) rows of each text.

        Yields:
            Those of the decoder as it was, and those of the compressed one if it is walked.
        """
        plain = self._plain.rows(op)
        drifted = None if self._compressed is None else self._compressed.rows(op)
        for rows in plain:
            yield rows, None if drifted is None else next(drifted)

    def replace(self, op: LinearOp, matrices: Sequence[Tensor]) -> None:
        """Give the compressed decoder other matrices for the linear that is current.

        Args:
            op: the linear.
            matrices: (out_features, in_features) for each of its pieces.
        """
        for piece, matrix in zip(op.pieces, matrices, strict=True):
            assert matrix.shape == piece.weight.shape
            self._replaced[id(piece.weight)] = matrix.float()
