"""Side networks as the native kernels read them."""

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any, TypeAlias

import torch
from torch import Tensor

from models.batch import SideBatch
from models.kernels.native.lowering import Lowering
from models.kernels.native.memory import Arena
from models.kernels.native.structs import (
    PANEL,
    POOLS,
    NativeOp,
    NativeSide,
    NativeSideEntry,
    NativeStep,
)
from models.kernels.tensors import map_tensors
from models.kv_cache import KVCache
from models.program import Activate, LinearOp, Norm, Piece
from models.side import AttachedSide, Downsample, SideProgram

Array: TypeAlias = "ctypes.Array[Any]"


@dataclass(frozen=True, slots=True)
class _LoweredSide:
    side: NativeSide
    memory: Lowering


def lower_side(program: SideProgram, library: ctypes.CDLL) -> AttachedSide:
    """Copy a side network into the panels and structures of the native kernels."""
    network = program.network
    width, hidden = network.spec.hidden_size, len(network.base_share)
    # In one piece and in the order of use: in a batch of many, each is read once a step.
    arena = Arena(_padded_bytes(program))
    widths = {**program.widths, "narrow": width, "up": hidden}
    lowering = Lowering(library, widths, place=arena.place)
    downs = _lower_down(network.downsamples[0], lowering)
    ops: list[NativeOp] = []
    starts = [0]
    for down, layer in zip(network.downsamples[1:], program.layers, strict=True):
        downs += _lower_down(down, lowering)
        ops += lowering.lower(layer)
        starts.append(len(ops))
    up = lowering.lower([_linear(network.up, network.up_bias, program.final_norm, src="x")])

    def array(items: Sequence[NativeOp]) -> int:
        return lowering.keep((NativeOp * len(items))(*items))

    def ints(values: Sequence[int]) -> int | None:
        return lowering.pointer(torch.tensor(values, dtype=torch.int32))

    buffers = list(program.widths.values())
    side = NativeSide(
        downs=array(downs), ops=array(ops), op_starts=ints(starts), up=array(up),
        gates=lowering.pointer(network.gates.detach().float()),
        base_share=lowering.pointer(network.base_share.detach().float()),
        inv_freq=lowering.pointer(program.inv_freq), widths=ints(buffers), num_buffers=len(buffers),
        num_layers=len(program.layers), width=width, hidden=hidden,
        pool=POOLS[network.downsamples[0].pool], rotary_dim=2 * len(program.inv_freq),
        max_inputs=max(hidden, *buffers, *(op.inputs for op in downs)),
        rotary_scale=program.rotary_scale,
    )  # fmt: skip
    return AttachedSide(network.spec, lowering.num_bytes, _LoweredSide(side, lowering))


def _padded_bytes(program: SideProgram) -> int:
    """Bound what a side network takes in panels, each of its tensors as often as it is used."""
    sizes: list[int] = []

    def add(tensor: Tensor) -> Tensor:
        rows = tensor.shape[0] if tensor.ndim else 1
        sizes.append((rows + PANEL) * max(1, tensor.numel() // max(1, rows)) * 4 + 64)
        return tensor

    network = program.network
    for part in (*network.downsamples, program, network):
        map_tensors(part, add)
    return sum(sizes) + 64 * PANEL * len(program.layers)


class SideEntries:
    """The kernels' list of a step's side networks, kept for steps that repeat it."""

    def __init__(self) -> None:
        self._networks: list[weakref.ref[AttachedSide]] = []  # one that left memory is not held
        self._caches: tuple[KVCache, ...] = ()
        self._entries: Array | None = None

    def set(self, step: NativeStep, batch: SideBatch) -> None:
        """Point a step to a batch of side networks, which must outlive it."""
        known = [reference() for reference in self._networks]
        if batch.caches is not self._caches or not all(map(is_, batch.networks, known)):
            self._lower(batch)
        step.sides = ctypes.addressof(self._entries)  # type: ignore[arg-type]
        step.num_sides = len(batch.networks)
        step.side_sequences = batch.sequences.data_ptr()
        step.side_block_tables = batch.block_tables.data_ptr()
        step.side_block_table_stride = batch.block_tables.stride(0)
        step.side_write_starts = batch.write_starts.data_ptr()
        step.side_scales = batch.scales.data_ptr()

    def _lower(self, batch: SideBatch) -> None:
        self._networks, self._caches = [*map(weakref.ref, batch.networks)], batch.caches
        self._entries = (NativeSideEntry * len(batch.networks))()
        for i, (network, cache) in enumerate(zip(batch.networks, batch.caches, strict=True)):
            lowered = network.lowered
            assert isinstance(lowered, _LoweredSide)
            keys, values = (ctypes.addressof(array) for array in cache.addresses)
            side = ctypes.addressof(lowered.side)
            self._entries[i] = NativeSideEntry(side=side, k_cache=keys, v_cache=values)


def _linear(
    weight: Tensor, bias: Tensor | None, prologue: Norm | Activate | None, *, src: str = "narrow"
) -> LinearOp:
    piece = Piece(weight=weight.detach(), bias=None if bias is None else bias.detach(), offset=0)
    return LinearOp(
        src=src, dst="up", prologue=prologue, in_features=weight.shape[1], pieces=(piece,)
    )


def _lower_down(down: Downsample, lowering: Lowering) -> list[NativeOp]:
    """Return the first matrix, the second one and the norm; empty where there is none."""
    ops = [lowering.norm_op(None), lowering.norm_op(None), lowering.norm_op(down.norm)]
    act = None if down.activation is None else Activate(kind=down.activation, is_gated=False)
    if down.first is not None:
        ops[:1] = lowering.lower([_linear(down.first, None, None)])
    if down.second is not None:
        ops[1:2] = lowering.lower([_linear(down.second, None, act)])
    return ops
