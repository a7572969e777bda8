"""Random numbers, and drawing a token by its weight with one.

The numbers are counter-based, a pure function of (seed, position). SplitMix64: the seed is mixed
into the start of a Weyl sequence and the position picks its element, in wrapping 64-bit integers,
so that every device gives the same bits.

Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
"""

import torch
from torch import Tensor

from decoding.rows import BLOCK_SIZE, block_sums

_WORD = 2**64
_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)
# A target of at most this share of a sum stays below it when rounded.
_BELOW_ONE = 1.0 - 2.0**-52


def _signed(value: int) -> int:
    """Return the int64 with the same 64 bits."""
    value %= _WORD
    return value - _WORD if value >= _WORD // 2 else value


def _shift_right(words: Tensor, bits: int) -> Tensor:
    return torch.bitwise_and(words >> bits, 2 ** (64 - bits) - 1)


def _mix(words: Tensor) -> Tensor:
    words = (words ^ _shift_right(words, _SHIFTS[0])) * _signed(_MULTIPLIERS[0])
    words = (words ^ _shift_right(words, _SHIFTS[1])) * _signed(_MULTIPLIERS[1])
    return words ^ _shift_right(words, _SHIFTS[2])


def _mix_int(word: int) -> int:
    for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS, strict=False):
        word = (word ^ (word >> shift)) * multiplier % _WORD
    return word ^ (word >> _SHIFTS[2])


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """Return one random number for each (seed, position).

    Args:
        seeds: int64, any value.
        positions: int64, >= 0, broadcast with `seeds`.

    Returns:
        float64 in [0, 1), multiples of 2**-52.
    """
    start = _mix(seeds ^ _signed(_GAMMA))
    words = _mix(start + (positions + 1) * _signed(_GAMMA))
    return _shift_right(words, 12).double() * 2.0**-52


def derive_seed(seed: int, sequence_index: int) -> int:
    """Return the seed of one of a request's sequences.

    Args:
        seed: the request's seed, an int64.
        sequence_index: >= 0; index 0 gives `seed` itself.
    """
    if sequence_index == 0:
        return seed
    return _signed(_mix_int((_mix_int(seed % _WORD) + sequence_index * _GAMMA) % _WORD))


def draw_dense(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draw a token of each row by inverting the cumulative distribution in token-id order.

    A row's token depends on that row only, and always has a weight above 0.

    Args:
        weights: (B, V) float32, see `decoding.weights`; contiguous.
        uniforms: (B, 1) float64 in [0, 1).

    Returns:
        (B,) int64 token ids.
    """
    masses = block_sums(weights)
    edges = masses.cumsum(1)
    targets = uniforms * edges[:, -1:]
    blocks = _invert(edges, targets)
    starts = edges.gather(1, blocks).sub_(masses.gather(1, blocks))
    inside = torch.arange(BLOCK_SIZE, device=weights.device) + blocks * BLOCK_SIZE
    last = weights.shape[1] - 1
    taken = weights.gather(1, inside.clamp_max(last)).masked_fill_(inside > last, 0.0)
    columns = _invert(taken.cumsum(1, dtype=torch.float64), targets.sub_(starts).clamp_min_(0.0))
    return columns.add_(blocks, alpha=BLOCK_SIZE)[:, 0]


def draw_few(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draw a column of each row like `draw_dense`, without the division into blocks.

    Args:
        weights: (B, C) float32, >= 0.
        uniforms: (B, 1) float64 in [0, 1).

    Returns:
        (B, 1) int64 columns.
    """
    edges = weights.cumsum(1, dtype=torch.float64)
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
