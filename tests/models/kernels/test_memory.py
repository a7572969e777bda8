"""Memory for weights and caches."""

import pytest
import torch

from models.kernels.native.memory import lazy_zeros, on_huge_pages


@pytest.mark.parametrize("shape", [(3,), (16, 5), (1100, 700)], ids=str)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32], ids=str)
def test_on_huge_pages_copies(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    source = torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)
    copy = on_huge_pages(source)
    assert torch.equal(copy, source)
    copy.zero_()
    assert source.any()


def test_on_huge_pages_makes_a_transposed_tensor_contiguous() -> None:
    source = torch.arange(6.0).view(2, 3).T
    copy = on_huge_pages(source)
    assert copy.is_contiguous()
    assert torch.equal(copy, source)


def test_lazy_zeros_are_zeros_that_can_be_written() -> None:
    zeros = lazy_zeros(3, 4, dtype=torch.float16)
    assert torch.equal(zeros, torch.zeros(3, 4, dtype=torch.float16))
    zeros[1, 2] = 7
    assert zeros.sum() == 7


def test_lazy_zeros_take_no_memory_until_written() -> None:
    def resident_bytes() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    before = resident_bytes()
    zeros = lazy_zeros(1 << 28, dtype=torch.uint8)
    assert resident_bytes() - before < 1 << 25
    assert zeros.nbytes == 1 << 28
