"""What a side network in training makes of a batch: the states that the LM head reads.

The base runs forward only, one layer at a time and in its own precision (`base_states.py`), and the
side network right after each layer; of the base's states nothing is kept but what a gradient needs.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.format import AdapterError
from adapters.packed_attention import PackedAttention
from adapters.qst.base_states import BaseStates
from adapters.qst.examples import TrainingBatch
from adapters.qst.network import QstNetwork
from models.decoder import Decoder
from models.fork import ForkNetwork, ForkProgram
from models.kernels.reference.operations import (
    blend_side,
    rotary_angles,
    run_fork_layer,
    run_ops,
    run_side,
)
from models.program import AttentionOp, LinearOp, Op
from models.spec import SpecError
from models.weights import dense

Precision = Callable[[], AbstractContextManager[object]]


class States(NamedTuple):
    """Of the rows of a batch that a loss term reads.

    Attributes:
        adapted: (L, D) float32, with the side network; differentiable.
        base: (L, D) float32, of the base alone; both are normed.
    """

    adapted: Tensor
    base: Tensor


class NarrowForward:
    """Runs a narrow decoder beside the base.

    Args:
        decoder: the base.
        states: its states, from the embedding on.
        network: in training, on the decoder's device.
        precision: entered for the side network's products.
    """

    def __init__(
        self, decoder: Decoder, states: BaseStates, network: QstNetwork, precision: Precision
    ) -> None:
        self._decoder, self._states = decoder, states
        self._network, self._precision = network, precision

    def __call__(self, batch: TrainingBatch, device: torch.device) -> States:
        """Compute a batch; its sequences begin at position 0."""
        packed, rows = batch.packed, batch.rows.to(device)
        last: list[Tensor] = []

        def hidden() -> Iterator[Tensor]:
            for state in self._states(batch):
                last[:] = [state]
                yield state

        attend = PackedAttention(packed.query_starts, device)
        program, positions = self._network.program(), packed.positions.to(device).long()
        with self._precision():
            side = run_side(program, hidden(), positions, attend=attend)
        normed = self._decoder.apply_final_norm(last[0][rows])
        return States(blend_side(program, normed, side.float().index_select(0, rows)), normed)


class ForkForward:
    """Runs a fork behind the base: only the rows that a loss term reads, over the base's keys.

    Holds the forked layers' matrices in float32.

    Args:
        decoder, network, precision: as for `NarrowForward`.
        states: of the decoder, from the first forked layer's input on.

    Raises:
        AdapterError: a linear that it differs in cannot be forked.
    """

    def __init__(
        self, decoder: Decoder, states: BaseStates, network: QstNetwork, precision: Precision
    ) -> None:
        self._decoder, self._states = decoder, states
        self._network, self._precision = network, precision
        fork = network.side_network()
        assert isinstance(fork, ForkNetwork)
        try:
            laid_out = decoder.fork_program(fork)
        except SpecError as error:
            raise AdapterError(f"{error}; side_attention own does") from error
        layers = tuple(tuple(map(_unpack, ops)) for ops in laid_out.layers)
        self._program = dataclasses.replace(laid_out, layers=layers)

    def __call__(self, batch: TrainingBatch, device: torch.device) -> States:
        """Compute a batch; its sequences begin at position 0."""
        packed, rows = batch.packed, batch.rows.to(device)
        fork = self._network.side_network()
        assert isinstance(fork, ForkNetwork)
        program = dataclasses.replace(self._program, network=fork)
        positions = packed.positions.to(device).long()
        inv_freq = program.inv_freq.to(device)
        angles = rotary_angles(inv_freq, program.rotary_scale, positions)
        row_angles = angles[0][rows], angles[1][rows]
        attention = _RowAttention(packed.query_starts.tolist(), batch.rows.tolist(), device)
        stream: Tensor | None = None
        for i, state in enumerate(self._states(batch)):
            if stream is None:
                stream = state[rows]
            if i < len(program.layers):
                ops = program.layers[i]
                attention.keys, attention.values = _keys_and_values(program, ops, state, angles)
                with self._precision():
                    stream = run_fork_layer(program, ops, stream, row_angles, attend=attention)
                stream = stream.float()
        assert stream is not None
        apply_norm = self._decoder.apply_final_norm
        return States(apply_norm(stream), apply_norm(state[rows]))


class _RowAttention:
    """Attention of chosen rows of packed sequences over all keys that each may see."""

    def __init__(self, starts: list[int], rows: list[int], device: torch.device) -> None:
        self.keys = self.values = torch.empty(0)
        self._parts: list[tuple[slice, slice, Tensor]] = []
        first = 0
        for start, stop in pairwise(starts):
            chosen = [row for row in rows[first:] if row < stop] if first < len(rows) else []
            if chosen:
                seen = torch.arange(start, stop) <= torch.tensor(chosen)[:, None]
                queries = slice(first, first + len(chosen))
                self._parts.append((queries, slice(start, stop), seen.to(device)))
                first += len(chosen)

    def __call__(self, op: AttentionOp, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = []
        for queries, tokens, seen in self._parts:
            heads = [x.to(v.dtype).transpose(0, 1)[None] for x in (
                q[queries], self.keys[tokens], self.values[tokens])]  # fmt: skip
            attended = F.scaled_dot_product_attention(
                heads[0], heads[1], heads[2], attn_mask=seen, scale=op.scale,
                enable_gqa=op.num_heads != op.num_kv_heads,
            )  # fmt: skip
            out.append(attended[0].transpose(0, 1).flatten(1))
        return torch.cat(out)


@torch.no_grad()
def _keys_and_values(
    program: ForkProgram, ops: tuple[Op, ...], state: Tensor, angles: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the base's (T, K, E) keys and values of a layer."""
    found: list[Tensor] = []

    def attend(op: AttentionOp, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found[:] = k, v
        return q.flatten(1)

    attention = next(i for i, op in enumerate(ops) if isinstance(op, AttentionOp))
    run_ops(ops[: attention + 1], {"x": state}, program.widths, angles, attend=attend)
    return found[0], found[1]


def _unpack(op: Op) -> Op:
    """Give an operation its matrices in float32."""
    if not isinstance(op, LinearOp):
        return op
    pieces = (dataclasses.replace(piece, weight=dense(piece.weight).float()) for piece in op.pieces)
    return dataclasses.replace(op, pieces=tuple(pieces))
