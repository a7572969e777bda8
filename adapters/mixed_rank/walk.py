"""Two decoders in step, one linear after the other: as it was, and as it has been compressed.

What a compressed linear reads has drifted, since those before it are compressed already. So each is
fitted when all of its inputs are known: every linear runs over all texts before the next one does.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from adapters.packed_attention import PackedAttention
from models.kernels.reference.operations import (
    Hook,
    apply_embed,
    apply_prologue,
    rotary_angles,
    run_ops,
)
from models.program import AttentionOp, LinearOp, Op, Program
from models.weights import Matrix, dense

Product: TypeAlias = Tensor | tuple[Tensor, Tensor]
"""A matrix, or its left and right factor."""
Products: TypeAlias = Mapping[int, Product]
"""What linears are computed with, by the id of the weights that they have in the program."""


def layer_matrices(program: Program, layer: int) -> dict[int, Product]:
    """Return the dense matrices of a layer's linears, by the id of the weights they are of."""
    return {
        id(piece.weight): dense(piece.weight)
        for op in program.layers[layer]
        if isinstance(op, LinearOp)
        for piece in op.pieces
    }


class _Multiplier:
    """Multiplies with matrices or factors; pieces that share a right factor compute it once."""

    def __init__(self, products: Products) -> None:
        self._products = products
        self._input: Tensor | None = None
        self._right: Tensor | None = None
        self._inner: Tensor | None = None

    def __call__(self, x: Tensor, weight: Matrix) -> Tensor:
        product = self._products[id(weight)]
        if isinstance(product, Tensor):
            return x @ product.T
        left, right = product
        if self._inner is None or self._input is not x or self._right is not right:
            self._input, self._right, self._inner = x, right, x @ right.T
        return self._inner @ left.T


def run_layer(
    program: Program, layer: int, stream: Tensor, products: Products, hook: Hook | None = None
) -> Tensor:
    """Compute a layer of one text; differentiable in stream and products.

    Args:
        program: of the decoder.
        layer: its number.
        stream: (S, D) residual stream before it.
        products: for all linears of the layer.
        hook: called around each linear.

    Returns:
        (S, D), after it.
    """
    buffers = {"x": stream}
    positions = torch.arange(len(stream), device=stream.device)
    run_ops(
        program.layers[layer], buffers, program.widths,
        rotary_angles(program.inv_freq, program.rotary_scale, positions),
        attend=PackedAttention(torch.tensor([0, len(stream)]), stream.device),
        linear=_Multiplier(products), hook=hook,
    )  # fmt: skip
    return buffers["x"]


@torch.no_grad()
def run_all(
    program: Program, layer: int, streams: Sequence[Tensor], products: Products
) -> list[Tensor]:
    """Compute a layer of several texts; see `run_layer`."""
    return [run_layer(program, layer, stream, products) for stream in streams]


class Watch:
    """A hook that keeps what the linears of a layer read and, after `backward`, the gradients.

    Attributes:
        rows: (S, in_features) each read, by the id of the linear.
        gradients: (S, outputs) of what it made; none where nothing was differentiated.
    """

    def __init__(self) -> None:
        self.rows: dict[int, Tensor] = {}
        self.gradients: dict[int, Tensor] = {}

    def before(self, op: LinearOp, x: Tensor) -> Tensor:
        """Keep what it reads."""
        self.rows[id(op)] = x.detach()
        return x

    def after(self, op: LinearOp, out: Tensor) -> Tensor:
        """Ask for the gradient."""

        def keep(gradient: Tensor) -> None:
            self.gradients[id(op)] = gradient

        if out.requires_grad:
            out.register_hook(keep)
        return out


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
        self._multiply = _Multiplier({})
        self._pending: list[Op] = []
        self._num_ahead = 0

    @property
    def streams(self) -> list[Tensor]:
        """(S, D) residual stream of each text, between layers."""
        return [buffers["x"] for buffers in self._buffers]

    def begin(self, products: Products) -> None:
        """Enter a layer that is computed with these."""
        self._multiply = _Multiplier(products)
        self._pending.clear()

    def rows(self, op: LinearOp) -> Iterator[Tensor]:
        """Yield what a linear reads, (S, in_features) for each text."""
        for number in range(len(self._buffers)):
            buffers = dict(self._buffers[number])
            self._run(number, self._pending, buffers)
            yield apply_prologue(op, buffers[op.src])

    def rows_and_advance(self, op: LinearOp, later: Sequence[Op]) -> Iterator[Tensor]:
        """Yield the same, and compute at once what `advance` would compute."""
        if not op.accumulate:
            yield from self.rows(op)
            return
        for number, buffers in enumerate(self._buffers):
            self._run(number, self._pending, buffers)
            yield apply_prologue(op, buffers[op.src])
            self._run(number, (op,), buffers)
            _drop(buffers, later)
            self._num_ahead = number + 1

    def advance(self, op: Op, later: Sequence[Op]) -> None:
        """Compute an operation, at once or when what it makes is needed.

        What a linear makes may be many times the stream; where it is not added to the stream it is
        made again for each of its readers rather than kept for all texts.

        Args:
            op: the next of the layer.
            later: those of the layer that follow.
        """
        self._pending.append(op)
        if isinstance(op, LinearOp) and not op.accumulate:
            return
        for number, buffers in enumerate(self._buffers):
            if number >= self._num_ahead:
                self._run(number, self._pending, buffers)
                _drop(buffers, later)
        self._num_ahead = 0
        self._pending.clear()

    def _run(self, number: int, ops: Sequence[Op], buffers: dict[str, Tensor]) -> None:
        run_ops(
            ops, buffers, self._program.widths, self._angles[number],
            attend=self._attend[number], linear=self._multiply,
        )  # fmt: skip


def _drop(buffers: dict[str, Tensor], later: Sequence[Op]) -> None:
    """Forget what no later operation of the layer reads."""
    needed = {"x"} | {op.src for op in later if isinstance(op, (LinearOp, AttentionOp))}
    for name in set(buffers) - needed:
        del buffers[name]


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
        self._later: Sequence[Op] = ()
        self._plain = _Decoder(program, texts, streams[0])
        self._compressed = _Decoder(program, texts, streams[1]) if has_drift else None

    @property
    def streams(self) -> list[Tensor]:
        """Those of the decoder as it was, between layers."""
        return self._plain.streams

    def linears(self, layer: int, matrices: Products) -> Iterator[LinearOp]:
        """Yield the linears of a layer in their order.

        When the next one is asked for, `replace` must have been called for the one before, if it
        is compressed. The compressed decoder is walked up to the last one's inputs: a layer's
        factors are not final until all of them are known, see `run_layer`.

        Args:
            layer: its number.
            matrices: as from `layer_matrices`.
        """
        ops = self._program.layers[layer]
        self._replaced = dict(matrices)
        self._plain.begin(dict(matrices))
        if self._compressed is not None:
            self._compressed.begin(self._replaced)
        for number, op in enumerate(ops):
            self._later = ops[number + 1 :]
            if isinstance(op, LinearOp):
                yield op
            with torch.no_grad():
                self._plain.advance(op, self._later)
                if self._compressed is not None and self._later:
                    self._compressed.advance(op, self._later)

    @torch.no_grad()
    def inputs(self, op: LinearOp) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield what the linear that is current reads, once: (S, in_features) rows of each text.

        Yields:
            Those of the decoder as it was, and those of the compressed one if it is walked.
        """
        plain = self._plain.rows_and_advance(op, self._later)
        drifted = None if self._compressed is None else self._compressed.rows(op)
        for rows in plain:
            yield rows, None if drifted is None else next(drifted)

    def replace(self, op: LinearOp, products: Sequence[Product]) -> None:
        """Give the compressed decoder other matrices for the linear that is current.

        Args:
            op: the linear.
            products: for each of its pieces.
        """
        self._replaced |= products_of(op, products)


def products_of(op: LinearOp, products: Sequence[Product]) -> dict[int, Product]:
    """Return matrices or factors for the pieces of a linear as `run_layer` takes them."""
    return {id(piece.weight): product for piece, product in zip(op.pieces, products, strict=True)}
