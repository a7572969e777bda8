"""Forks as the native kernels read them."""

import ctypes
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any, TypeAlias

from torch import Tensor

from models.batch import ForkBatch
from models.fork import AttachedFork, ForkProgram
from models.kernels.native.lowering import Lowering
from models.kernels.native.panels import pack
from models.kernels.native.structs import FORK_PIECES, NativeDelta, NativeFork, NativeStep

Array: TypeAlias = "ctypes.Array[Any]"


@dataclass(frozen=True, slots=True)
class _LoweredFork:
    fork: NativeFork
    memory: Lowering


def lower_fork(
    program: ForkProgram,
    library: ctypes.CDLL,
    *,
    places: Mapping[str, tuple[int, int]],
    first_ops: Sequence[int],
    num_ops: int,
) -> AttachedFork:
    """Copy a fork's differences into panels.

    Args:
        program: what to lower.
        library: the extension.
        places: native operation and piece of the base's linears, by name.
        first_ops: native operation that each layer of the base begins with.
        num_ops: native operations of the base.
    """
    lowering = Lowering(library, {})
    first = first_ops[program.first_layer]
    deltas = (NativeDelta * ((num_ops - first) * FORK_PIECES))()

    def panels(matrix: Tensor) -> int | None:
        return lowering.pointer(pack(matrix.detach().float().contiguous(), library).data)

    for name, delta in program.network.deltas.items():
        op, piece = places[name]
        deltas[(op - first) * FORK_PIECES + piece] = NativeDelta(
            right=panels(delta.right), left=panels(delta.left), rank=delta.right.shape[0]
        )
    fork = NativeFork(
        deltas=lowering.keep(deltas), first_op=first,
        max_rank=max(delta.rank for delta in deltas),
    )  # fmt: skip
    return AttachedFork(lowering.num_bytes, _LoweredFork(fork, lowering))


class ForkEntries:
    """The kernels' list of a step's forks, kept for steps that repeat it."""

    def __init__(self) -> None:
        self._networks: list[weakref.ref[AttachedFork]] = []  # one that left memory is not held
        self._entries: Array | None = None

    def set(self, step: NativeStep, batch: ForkBatch) -> None:
        """Point a step to a batch of forks, which must outlive it."""
        known = [reference() for reference in self._networks]
        if len(known) != len(batch.networks) or not all(map(is_, batch.networks, known)):
            self._lower(batch)
        step.forks = ctypes.addressof(self._entries)  # type: ignore[arg-type]
        step.num_forks = len(batch.networks)
        step.fork_outputs = batch.outputs.data_ptr()
        step.fork_sequences = batch.sequences.data_ptr()
        step.fork_scales = batch.scales.data_ptr()

    def _lower(self, batch: ForkBatch) -> None:
        self._networks = [*map(weakref.ref, batch.networks)]
        self._entries = (ctypes.c_void_p * len(batch.networks))()
        for i, network in enumerate(batch.networks):
            assert isinstance(network.lowered, _LoweredFork)
            self._entries[i] = ctypes.addressof(network.lowered.fork)
