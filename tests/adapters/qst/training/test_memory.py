"""What memory is counted as."""

import mmap

import torch

from adapters.qst.memory import MemoryBreakdown, PeakMemory, measure, weight_bytes
from models.quantization import quantize_4bit
from models.weights import LowRank, quantize_8bit


def test_weights_are_counted_as_stored() -> None:
    matrix = torch.randn(8, 64)
    assert weight_bytes(matrix) == 8 * 64 * 4
    assert weight_bytes(quantize_4bit(matrix)) == 8 * 64 // 2 + 8 * 4 + 16 * 4
    assert weight_bytes(quantize_8bit(matrix)) == 8 * 64 + 8 * 4
    assert weight_bytes(LowRank(left=matrix, right=matrix.half())) == 8 * 64 * 6


def test_peak_is_seen_after_it_has_passed() -> None:
    memory = PeakMemory(torch.device("cpu"))
    held = mmap.mmap(-1, 40 << 20)  # memory that no earlier test has left to this process
    torch.frombuffer(held, dtype=torch.uint8).fill_(1)
    held = None
    peak, above = memory.read()
    assert above == -1 or (peak > above > 30 << 20)


def test_peak_is_divided() -> None:
    memory = PeakMemory(torch.device("cpu"))
    memory.read = lambda: (5000, 1000)  # type: ignore[method-assign]
    found = measure(memory, [torch.zeros(10)], [torch.zeros(25)], 200)
    assert found == MemoryBreakdown(
        base_weights=40, side_network=200, optimizer=200, activations=700, peak=5000
    )


def test_unknown_peak_is_said_to_be_unknown() -> None:
    found = MemoryBreakdown(
        base_weights=1_000_000, side_network=0, optimizer=0, activations=-1, peak=-1
    )
    assert found.describe().startswith("memory: base weights 1.0 MB, side network 0.0 MB")
    assert found.describe().endswith("activations not known, peak not known")
