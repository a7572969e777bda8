"""How much memory a training run takes, and what for."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.weights import (
    LowRank,
    Quantized4Bit,
    Quantized8Bit,
    QuantizedBlocks,
    Weight,
    iterate_matrices,
)

_PROCESS = Path("/proc/self")


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryBreakdown:
    """Bytes of a run.

    Attributes:
        base_weights: of the base as stored, LM head included.
        side_network: parameters and their gradients.
        optimizer: AdamW's two moments.
        activations: everything else that came on top at the fullest moment, measured; -1 where the
            system does not tell.
        peak: of the process (on a GPU: allocated there), measured; -1 likewise.
    """

    base_weights: int
    side_network: int
    optimizer: int
    activations: int
    peak: int

    def as_fields(self) -> dict[str, int]:
        """Return the bytes by name."""
        return asdict(self)

    def describe(self) -> str:
        """Return one line for people."""
        parts = []
        for name, size in self.as_fields().items():
            text = f"{size / 1e6:.1f} MB" if size >= 0 else "not known"
            parts.append(f"{name.replace('_', ' ')} {text}")
        return "memory: " + ", ".join(parts)


class PeakMemory:
    """Measures how far memory rises above where it was."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0
        self.restart()

    def restart(self) -> None:
        """Measure from now on."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
            return
        with suppress(OSError):
            (_PROCESS / "clear_refs").write_text("5")  # resets the kernel's own peak
        self._before = _status_bytes("VmRSS")

    def read(self) -> tuple[int, int]:
        """Return the peak and how far it is above the start, in bytes; -1, -1 if unknown."""
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
        else:
            peak = _status_bytes("VmHWM")
        return (peak, peak - self._before) if peak >= 0 and self._before >= 0 else (-1, -1)


def measure(
    memory: PeakMemory, weights: Iterable[Weight], parameters: Iterable[Tensor], state: int
) -> MemoryBreakdown:
    """Divide the peak between what is known to take memory and activations.

    Args:
        memory: started when the parameters were there, gradients and optimiser state were not.
        weights: of the base.
        parameters: of the side network.
        state: bytes of the optimiser's state.
    """
    size = sum(parameter.nbytes for parameter in parameters)
    peak, above = memory.read()
    return MemoryBreakdown(
        base_weights=sum(map(weight_bytes, iterate_matrices(weights))),
        side_network=2 * size,
        optimizer=state,
        activations=-1 if above < 0 else max(0, above - size - state),
        peak=peak,
    )


def weight_bytes(weight: Weight) -> int:
    """Return the bytes of a weight as it is stored."""
    if isinstance(weight, LowRank):
        return weight_bytes(weight.left) + weight_bytes(weight.right)
    if isinstance(weight, Quantized4Bit):
        return weight.packed.nbytes + weight.absmax.nbytes + weight.codebook.nbytes
    if isinstance(weight, Quantized8Bit):
        return weight.codes.nbytes + weight.scales.nbytes
    return weight.data.nbytes if isinstance(weight, QuantizedBlocks) else weight.nbytes


def _status_bytes(field: str) -> int:
    with suppress(OSError, ValueError):
        for line in (_PROCESS / "status").read_text(encoding="utf-8").splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return -1
