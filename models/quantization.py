"""Round matrices to bitsandbytes' 4-bit format."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from models.weights import Quantized4Bit

# The 16 quantiles of a normal distribution of QLoRA (Dettmers et al. 2023, appendix E).
NF4_CODEBOOK = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Scales that a search tries, as shares of the largest magnitude in the block.
_FACTORS = tuple(0.6 + 0.04 * i for i in range(16))
_MAX_REFITS = 8
_TABLE_STEPS = 4096  # from 0 to the largest value of a codebook
_BLOCKS_AT_A_TIME = 1 << 12  # bounds the float32 copies, and keeps them in a core's cache
# Of the mean importance, added to each: a channel that a short text leaves silent still counts.
_DAMPING = 0.01


def quantize_4bit(matrix: Tensor, block_size: int = 64) -> Quantized4Bit:
    """Round a dense (out_features, in_features) matrix to NF4, blocks over the flattened matrix."""
    codebook = torch.tensor(NF4_CODEBOOK)
    boundaries = (codebook[1:] + codebook[:-1]) / 2
    flat = matrix.detach().reshape(-1)
    num_blocks = -(-flat.numel() // block_size)
    absmax = torch.empty(num_blocks)
    packed = torch.empty(num_blocks * block_size // 2, dtype=torch.uint8)
    step = 1 << 16  # blocks at a time: bounds the float32 copies
    for first in range(0, num_blocks, step):
        values = flat[first * block_size : (first + step) * block_size].float()
        count = -(-values.numel() // block_size)
        values = F.pad(values, (0, count * block_size - values.numel()))
        blocks = values.view(count, block_size)
        absmax[first : first + count] = scales = blocks.abs().amax(1)
        inverse = torch.where(scales > 0, 1 / scales, 0)
        codes = torch.bucketize(blocks * inverse[:, None], boundaries).to(torch.uint8)
        pairs = codes.view(-1, 2)
        start = first * block_size // 2
        packed[start : start + len(pairs)] = pairs[:, 0] << 4 | pairs[:, 1]
    return Quantized4Bit(
        packed=packed[: (flat.numel() + 1) // 2],
        absmax=absmax,
        codebook=codebook,
        shape=(matrix.shape[0], matrix.shape[1]),
        block_size=block_size,
    )


def search_scales(
    matrix: Tensor,
    codebook: Tensor,
    *,
    is_signed: bool,
    importance: Tensor | None = None,
    block_size: int = 64,
) -> Tensor:
    """Find the scale of each block at which a matrix loses least when it is rounded to 4 bits.

    What is lost is the sum over the block of importance * (value - rounded value) ** 2. From a
    grid of scales the best one is fitted to its codes by least squares, and the codes to it, until
    that gains no more. A negative scale mirrors the codebook, whose halves differ.

    Args:
        matrix: (out_features, in_features), floating point and finite.
        codebook: (16,) float32, in any order, the largest magnitude 1.
        is_signed: whether scales may be negative.
        importance: (in_features,) float32, >= 0, of the input channels; None: all count alike.
        block_size: values per scale, over the flattened matrix.

    Returns:
        (ceil(out_features * in_features / block_size),) float32; blocks of zeros have a zero.
    """
    table = _nearest_values(codebook)
    signs = (1.0, -1.0) if is_signed else (1.0,)
    scales = []
    for _, blocks, weights in _weighted_blocks(matrix, importance, block_size):
        largest = blocks.abs().amax(1, keepdim=True)
        units = torch.where(largest > 0, blocks / largest, 0)
        best, gain = torch.ones_like(largest), torch.zeros_like(largest)

        def refit(scale: Tensor, units: Tensor = units, weights: Tensor = weights) -> None:
            nonlocal best, gain
            steps = (units * (_TABLE_STEPS / scale)).add_(_TABLE_STEPS + 0.5)
            steps = steps.clamp_(0, 2 * _TABLE_STEPS).int()
            rounded = table.index_select(0, steps.view(-1)).view_as(units)
            weighted = weights * rounded
            product = (weighted * units).sum(1, keepdim=True)
            square = (weighted * rounded).sum(1, keepdim=True)
            # By the fitted scale, product / square, the loss falls from that of zeros by this much.
            found = torch.where(square > 0, product * product / square, 0)
            best = torch.where(found > gain, product / square, best)
            gain = torch.maximum(found, gain)

        for factor in _FACTORS:
            for sign in signs:
                refit(torch.full_like(best, factor * sign))
        for _ in range(_MAX_REFITS):
            before = gain
            refit(best)
            if torch.equal(before, gain):
                break
        scales.append((best * largest).flatten())
    return torch.cat(scales)


def round_to_scales(
    matrix: Tensor, scales: Tensor, start: Quantized4Bit, *, importance: Tensor | None = None
) -> tuple[Quantized4Bit, Tensor]:
    """Round a matrix to 4 bits with given scales, where that loses less than it has lost already.

    Args:
        matrix: (out_features, in_features), floating point and finite.
        scales: (N,) float32 of the blocks, of either sign.
        start: the matrix in 4 bits; its blocks stay where the new ones are no better.
        importance: as for `search_scales`.

    Returns:
        The matrix in 4 bits, and (N,) bool: which of its blocks are new.
    """
    codebook, order = start.codebook.sort()
    boundaries = (codebook[1:] + codebook[:-1]) / 2
    packed, absmax = start.packed.clone(), start.absmax.clone()
    is_new = torch.zeros(len(absmax), dtype=torch.bool)
    size = start.block_size
    for first, blocks, weights in _weighted_blocks(matrix, importance, size):
        part = slice(first, first + len(blocks))
        scale = scales[part, None]
        codes = order[torch.bucketize(blocks / torch.where(scale == 0, 1, scale), boundaries)]
        bytes_ = slice(first * size // 2, (first + len(blocks)) * size // 2)
        old = torch.stack((packed[bytes_] >> 4, packed[bytes_] & 15), dim=1).flatten()
        old = F.pad(old, (0, codes.numel() - old.numel())).view_as(codes)
        before = _loss(blocks, start.codebook[old.long()] * start.absmax[part, None], weights)
        better = _loss(blocks, start.codebook[codes] * scale, weights) < before
        pairs = torch.where(better[:, None], codes.to(torch.uint8), old).view(-1, 2)
        merged = pairs[:, 0] << 4 | pairs[:, 1]
        packed[bytes_] = merged[: len(packed[bytes_])]
        absmax[part] = torch.where(better, scales[part], absmax[part])
        is_new[part] = better
    rounded = Quantized4Bit(
        packed=packed, absmax=absmax, codebook=start.codebook, shape=start.shape, block_size=size
    )
    return rounded, is_new


def _loss(blocks: Tensor, rounded: Tensor, weights: Tensor) -> Tensor:
    """Return what each block loses, in units of its largest value: squares of tiny ones vanish."""
    units = (blocks.double() - rounded) / blocks.abs().amax(1, keepdim=True)
    return (weights * units.square()).sum(1)


def _weighted_blocks(
    matrix: Tensor, importance: Tensor | None, block_size: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield the first block's index, (n, block_size) float32 values and what each counts for."""
    flat, width = matrix.detach().reshape(-1), matrix.shape[1]
    if importance is not None:
        mean = importance.double().mean()
        importance = (importance / torch.where(mean > 0, mean, 1) + _DAMPING).float()
    for first in range(0, -(-flat.numel() // block_size), _BLOCKS_AT_A_TIME):
        start = first * block_size
        values = flat[start : start + _BLOCKS_AT_A_TIME * block_size].float()
        padding = (0, -len(values) % block_size)
        weights = torch.ones(1, 1)
        if importance is not None:
            weights = importance[torch.arange(start, start + len(values)) % width]
            weights = F.pad(weights, padding).view(-1, block_size)
        yield first, F.pad(values, padding).view(-1, block_size), weights


def _nearest_values(codebook: Tensor) -> Tensor:
    """Return the codebook's nearest value to each of 2 * _TABLE_STEPS + 1 numbers from -1 to 1."""
    values = codebook.sort().values
    grid = torch.arange(-_TABLE_STEPS, _TABLE_STEPS + 1) / _TABLE_STEPS
    return values[torch.bucketize(grid, (values[1:] + values[:-1]) / 2)]
