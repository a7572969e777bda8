"""Run whole steps with the torch operations beside this file, over plain caches."""

import dataclasses
from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from models.batch import PackedBatch
from models.fork import AttachedFork, ForkNetwork, ForkProgram
from models.kernels.plain_cache import attend_sequences, make_plain_cache
from models.kernels.reference.operations import (
    Linear,
    apply_head,
    apply_linear,
    apply_prologue,
    blend_side,
    run_fork,
    run_program,
    run_side,
    walk_layers,
)
from models.kernels.tensors import count_bytes, map_tensors
from models.kv_cache import KVCache
from models.program import AttentionOp, Program
from models.side import AttachedSide, SideProgram
from models.spec import DecoderSpec


class ReferenceExecutor:
    """Plain torch executor.

    Args:
        program: what to run; its tensors must be on `device`.
        device: where to compute.
        base: runs a program that may share tensors with this one.

    Attributes:
        program: what it runs.
        num_bytes: see `Decoder.num_bytes`.
    """

    name = "reference"

    def __init__(
        self, program: Program, device: str = "cpu", *, base: "ReferenceExecutor | None" = None
    ) -> None:
        self.program = program
        self._device = torch.device(device)
        self.num_bytes = count_bytes(program, None if base is None else base.program)

    def make_cache(
        self, spec: DecoderSpec, num_blocks: int, block_size: int, dtype: torch.dtype
    ) -> KVCache:
        """Return an empty cache; see `make_plain_cache`."""
        return make_plain_cache(spec, num_blocks, block_size, dtype, self._device)

    def forward(
        self,
        batch: PackedBatch,
        cache: KVCache,
        taps: Tensor | None = None,
        states: Tensor | None = None,
    ) -> Tensor:
        """Run one step; see `Decoder.forward`."""
        return forward_batch(
            self.program, batch, cache, taps=taps, states=states, device=self._device
        )

    def hidden_states(self, batch: PackedBatch) -> Iterator[Tensor]:
        """See `Decoder.hidden_states`."""
        return walk_whole_sequences(self.program, batch, device=self._device)

    def apply_final_norm(self, states: Tensor) -> Tensor:
        """See `Decoder.apply_final_norm`."""
        return apply_prologue(self.program.head, states)

    def apply_head(self, states: Tensor) -> Tensor:
        """See `Decoder.logits`."""
        return apply_head(self.program, states)

    def attach(self, program: SideProgram) -> AttachedSide:
        """See `Decoder.attach`."""
        return attach_plain(program, self._device)

    def attach_fork(self, program: ForkProgram) -> AttachedFork:
        """See `Decoder.attach`."""
        return attach_plain_fork(program, self._device)


def forward_batch(
    program: Program,
    batch: PackedBatch,
    cache: KVCache,
    *,
    device: torch.device,
    taps: Tensor | None = None,
    states: Tensor | None = None,
    linear: Linear = apply_linear,
) -> Tensor:
    """Run one step over plain caches, side networks included; see `Decoder.forward`."""
    token_ids, positions, rows = (
        t.to(device).long() for t in (batch.token_ids, batch.positions, batch.output_rows)
    )

    def attend(op: AttentionOp, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_sequences(op, q, k, v, batch, cache)

    if batch.side is None and batch.forks is None:
        return run_program(
            program, token_ids, positions, rows, attend=attend, linear=linear, taps=taps,
            states=states,
        )  # fmt: skip
    hidden = list(walk_layers(program, token_ids, positions, attend=attend, linear=linear))
    if taps is not None:
        torch.stack(hidden, out=taps)
    normed = apply_prologue(program.head, hidden[-1][rows])
    if batch.forks is not None:
        _blend_forks(program, batch, cache, hidden, normed, linear)
    if batch.side is not None:
        _blend_sides(batch, hidden, normed, rows)
    if states is not None:
        states.copy_(normed)
    return apply_head(program, normed, linear=linear)


def _blend_forks(
    program: Program,
    batch: PackedBatch,
    cache: KVCache,
    hidden: list[Tensor],
    normed: Tensor,
    linear: Linear,
) -> None:
    """Put what forks make of their tokens in place of the base's (L, D) normed final states."""
    forks = batch.forks
    assert forks is not None
    for f, (o, b) in enumerate(zip(forks.outputs.tolist(), forks.sequences.tolist(), strict=True)):
        fork, row = forks.networks[f].lowered, int(batch.output_rows[o])
        assert isinstance(fork, ForkProgram)
        position = batch.positions[row : row + 1]
        alone = PackedBatch(
            token_ids=batch.token_ids[row : row + 1],
            positions=position,
            query_starts=torch.tensor([0, 1], dtype=torch.int32),
            context_lens=position + 1,
            block_tables=batch.block_tables[b : b + 1],
            output_rows=batch.output_rows[:0],
            write_starts=position + 1,
        )

        def attend(
            op: AttentionOp, q: Tensor, k: Tensor, v: Tensor, alone: PackedBatch = alone
        ) -> Tensor:
            return attend_sequences(op, q, k, v, alone, cache)

        states = hidden[fork.first_layer][row : row + 1]
        at = position.to(states.device).long()
        forked = run_fork(fork, states, at, attend=attend, linear=linear)
        normed[o : o + 1].lerp_(apply_prologue(program.head, forked), float(forks.scales[f]))


def _blend_sides(batch: PackedBatch, hidden: list[Tensor], normed: Tensor, rows: Tensor) -> None:
    """Blend what side networks make of their tokens into the (L, D) normed final states."""
    assert batch.side is not None
    starts = batch.query_starts.tolist()
    for s, b in enumerate(batch.side.sequences.tolist()):
        tokens = slice(starts[b], starts[b + 1])
        side_states = _run_attached(batch, s, b, tokens, [state[tokens] for state in hidden])
        scale = float(batch.side.scales[s])
        chosen = (rows >= tokens.start) & (rows < tokens.stop)
        if scale and chosen.any():
            side_program = batch.side.networks[s].lowered
            assert isinstance(side_program, SideProgram)
            side = side_states[rows[chosen] - tokens.start]
            normed[chosen] = blend_side(side_program, normed[chosen], side, scale)


def _run_attached(
    batch: PackedBatch, s: int, b: int, tokens: slice, hidden: list[Tensor]
) -> Tensor:
    """Run side network s on the tokens of sequence b."""
    assert batch.side is not None
    alone = PackedBatch(
        token_ids=batch.token_ids[tokens],
        positions=batch.positions[tokens],
        query_starts=torch.tensor([0, tokens.stop - tokens.start], dtype=torch.int32),
        context_lens=batch.context_lens[b : b + 1],
        block_tables=batch.side.block_tables[s : s + 1],
        output_rows=batch.output_rows[:0],
        write_starts=batch.side.write_starts[s : s + 1],
    )
    cache, program = batch.side.caches[s], batch.side.networks[s].lowered
    assert isinstance(program, SideProgram)

    def attend(op: AttentionOp, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_sequences(op, q, k, v, alone, cache)

    positions = alone.positions.to(hidden[0].device).long()
    return run_side(program, hidden, positions, attend=attend)


def walk_whole_sequences(
    program: Program, batch: PackedBatch, *, device: torch.device, linear: Linear = apply_linear
) -> Iterator[Tensor]:
    """Yield hidden states of sequences that start at 0; see `Decoder.hidden_states`."""
    starts = batch.query_starts.tolist()

    def attend(op: AttentionOp, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = []
        for first, last in pairwise(starts):
            heads = [x[first:last].transpose(0, 1)[None] for x in (q, k, v)]
            attended = F.scaled_dot_product_attention(
                heads[0], heads[1], heads[2], is_causal=True, scale=op.scale, enable_gqa=True
            )
            out.append(attended[0].transpose(0, 1).flatten(1))
        return torch.cat(out)

    token_ids, positions = (t.to(device).long() for t in (batch.token_ids, batch.positions))
    return walk_layers(program, token_ids, positions, attend=attend, linear=linear)


def attach_plain(program: SideProgram, device: torch.device) -> AttachedSide:
    """Copy a side network to where it is computed."""
    moved, size = _copy_tensors(program, device)
    assert isinstance(moved, SideProgram)
    return AttachedSide(moved.network.spec, size, moved)


def attach_plain_fork(program: ForkProgram, device: torch.device) -> AttachedFork:
    """Copy a fork's differences to where they are computed, beside the base's operations."""
    network, size = _copy_tensors(program.network, device)
    assert isinstance(network, ForkNetwork)
    return AttachedFork(size, dataclasses.replace(program, network=network))


def _copy_tensors(item: object, device: torch.device) -> tuple[object, int]:
    """Return an item with all of its tensors copied to a device, and their bytes."""
    copies: list[Tensor] = []

    def copy(tensor: Tensor) -> Tensor:
        copies.append(tensor.detach().to(device, copy=True))
        return copies[-1]

    return map_tensors(item, copy), sum(tensor.nbytes for tensor in copies)
