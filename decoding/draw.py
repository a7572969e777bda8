"""Drawing a token from probabilities with one random number."""

import torch
from torch import Tensor

from decoding.rows import BLOCK_SIZE

# A target of at most this share of a sum stays below it when rounded.
_BELOW_ONE = 1.0 - 2.0**-52


def draw_dense(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Draw a token of each row by inverting the cumulative distribution in token-id order.

    A row's token depends on that row only, and always has a probability above 0.

    Args:
        probs: (B, V) float32, >= 0, contiguous, V a multiple of `BLOCK_SIZE`; need not sum to 1.
        uniforms: (B, 1) float64 in [0, 1).

    Returns:
        (B,) int64 token ids.
    """
    num_rows, width = probs.shape
    num_blocks = width // BLOCK_SIZE
    blocks_of = probs.view(num_rows * num_blocks, BLOCK_SIZE)
    masses = blocks_of.sum(-1).view(num_rows, num_blocks)
    edges = masses.cumsum(1, dtype=torch.float64)
    targets = uniforms * edges[:, -1:]
    blocks = _invert(edges, targets)
    rows = blocks
    if num_rows > 1:
        rows = blocks + torch.arange(0, len(blocks_of), num_blocks, device=probs.device)[:, None]
    inside = blocks_of.index_select(0, rows[:, 0])
    starts = edges.gather(1, blocks).sub_(masses.gather(1, blocks))
    columns = _invert(inside.cumsum(1, dtype=torch.float64), targets.sub_(starts).clamp_min_(0.0))
    return columns.add_(blocks, alpha=BLOCK_SIZE)[:, 0]


def draw_few(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Draw a column of each row like `draw_dense`, without the division into blocks.

    Args:
        probs: (B, C) float32, >= 0.
        uniforms: (B, 1) float64 in [0, 1).

    Returns:
        (B, 1) int64 columns.
    """
    edges = probs.cumsum(1, dtype=torch.float64)
    return _invert(edges, uniforms * edges[:, -1:])


def _invert(edges: Tensor, targets: Tensor) -> Tensor:
    """Return the first column whose edge exceeds the target.

    A column that adds nothing is never the first to exceed, as long as the target is below the
    last edge: rounding may have brought it there.

    Args:
        edges: (B, C) float64, not decreasing.
        targets: (B, 1) float64, >= 0.

    Returns:
        (B, 1) int64 columns.
    """
    targets = torch.minimum(targets, edges[:, -1:] * _BELOW_ONE)
    return torch.searchsorted(edges, targets, right=True).clamp_max_(edges.shape[1] - 1)
