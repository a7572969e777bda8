"""Reductions along a row, fast on a CPU, whose result never depends on the other rows.

torch splits a reduction over threads when there is only one row, and then adds in another order
than for many rows. Sums of short blocks, added up in sequence, do not.
"""

import math

import torch
from torch import Tensor

BLOCK_SIZE = 256


def block_sums(values: Tensor) -> Tensor:
    """Sum each run of `BLOCK_SIZE` columns; the last run may be shorter.

    Args:
        values: (B, V) float32 or float64, each row contiguous.

    Returns:
        (B, ceil(V / BLOCK_SIZE)) float64.
    """
    num_full = values.shape[1] // BLOCK_SIZE
    split = num_full * BLOCK_SIZE
    full, rest = values[:, :split].view(len(values), num_full, BLOCK_SIZE), values[:, split:]
    sums = full.sum(-1, dtype=torch.float64)
    if not rest.shape[1]:
        return sums
    return torch.cat([sums, rest.sum(-1, keepdim=True, dtype=torch.float64)], dim=1)


def sum_rows(values: Tensor) -> Tensor:
    """Sum each row.

    Args:
        values: (B, V) float32 or float64.

    Returns:
        (B,) float64.
    """
    return block_sums(values).cumsum(1)[:, -1]


def argmax_rows(values: Tensor) -> Tensor:
    """Return the first column of each row's largest value.

    NumPy's argmax is ten times as fast as torch's on a CPU, where torch does not vectorise it.

    Args:
        values: (B, V) float32, each row contiguous.

    Returns:
        (B,) int64.
    """
    if values.is_cpu:
        return torch.from_numpy(values.numpy().argmax(-1))
    return values.argmax(-1)


def find_largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest values of each row.

    The columns are dealt into groups, and the largest values lie in the groups with the largest
    maxima: that leaves a small part of the row to rank.

    Args:
        values: (B, V).
        count: how many, >= 1; all if the row has fewer.

    Returns:
        (B, C) values, largest first, and (B, C) int64 columns.
    """
    num_rows, width = values.shape
    # Makes the two rankings about equally long.
    group_size = math.isqrt(width // count)
    if group_size < 2:
        largest, columns = values.topk(min(count, width), dim=1)
        return largest, columns
    num_groups = width // group_size
    split = num_groups * group_size
    dealt = values[:, :split].view(num_rows, group_size, num_groups)
    groups = dealt.amax(1).topk(count, dim=1, sorted=False).indices
    members = torch.arange(0, split, num_groups, device=values.device)[:, None]
    columns = (groups[:, None, :] + members).flatten(1)
    if split < width:
        left_over = torch.arange(split, width, device=values.device).expand(num_rows, -1)
        columns = torch.cat([columns, left_over], dim=1)
    largest, order = values.gather(1, columns).topk(count, dim=1)
    return largest, columns.gather(1, order)
