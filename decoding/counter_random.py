"""Counter-based random numbers: a pure function of (seed, position).

SplitMix64: the seed is mixed into the start of a Weyl sequence and the position picks its element,
in wrapping 64-bit integers, so that every device gives the same bits.

Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
"""

import torch
from torch import Tensor

_WORD = 2**64
_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)


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
