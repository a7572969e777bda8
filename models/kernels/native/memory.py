"""Memory for what the native kernels read: weights on huge pages, caches that start empty."""

import math
import mmap

import torch
from torch import Tensor

_HUGE_PAGE_BYTES = 2 << 20


def on_huge_pages(tensor: Tensor) -> Tensor:
    """Copy a tensor to memory that the system may back with huge pages.

    Weights are read from end to end at every step; large pages save most of the address
    translation that costs.
    """
    return room_for(tensor.nbytes).view(tensor.dtype).view(tensor.shape).copy_(tensor)


def room_for(num_bytes: int) -> Tensor:
    """Return (num_bytes,) uint8 of memory for weights, at a multiple of 64 bytes."""
    if num_bytes >= _HUGE_PAGE_BYTES:
        return _map(num_bytes, is_huge=True)
    return torch.empty(num_bytes, dtype=torch.uint8)


def lazy_zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return zeros that take no memory until they are written."""
    num_bytes = math.prod(shape) * dtype.itemsize
    return _map(num_bytes, is_huge=False).view(dtype).view(shape)


def _map(num_bytes: int, is_huge: bool) -> Tensor:
    slack = _HUGE_PAGE_BYTES if is_huge else 0
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    region = mmap.mmap(-1, num_bytes + slack, flags=flags)
    data = torch.frombuffer(region, dtype=torch.uint8)
    start = -data.data_ptr() % _HUGE_PAGE_BYTES if is_huge else 0
    if is_huge and hasattr(mmap, "MADV_HUGEPAGE"):
        region.madvise(mmap.MADV_HUGEPAGE)
    return data[start : start + num_bytes]


class Arena:
    """Memory in which tensors lie one after the other, as they are read.

    Args:
        num_bytes: most that it will hold; what is never used takes no memory.
    """

    def __init__(self, num_bytes: int) -> None:
        self._region = _map(num_bytes, is_huge=False)
        self._end = 0

    def place(self, tensor: Tensor) -> Tensor:
        """Copy a tensor to the next free place, at a multiple of 64 bytes."""
        start = -(-self._end // 64) * 64
        self._end = start + tensor.nbytes
        copy = self._region[start : self._end].view(tensor.dtype).view(tensor.shape)
        return copy.copy_(tensor)
