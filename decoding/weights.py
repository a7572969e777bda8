"""Weights: how likely tokens are, as whole numbers, the same on every machine.

The most likely token of a row weighs 2**32, the others in proportion, rounded. The exponential is
made of single products and sums in float32, each rounded by itself, and sums of weights in float64
are exact in any order: so every implementation of the filters and the draw takes the same token.
"""

import math

import torch
from torch import Tensor

LARGEST_WEIGHT = 2.0**32
_SHIFT = 32
# Its exponential is a normal float32, and far below the least weight.
_LEAST_DISTANCE = -87.0
# ln 2 in two parts; the first has so few bits that its product with an exponent is exact.
_LN2 = (0.693359375, -2.12194440e-4)
_FLOAT32_BIAS, _FLOAT32_MANTISSA_BITS = 127, 23
_TAYLOR = [1.0 / math.factorial(k) for k in range(7, -1, -1)]


def distances(logits: Tensor, inverse_temperatures: Tensor) -> Tensor:
    """Return how far below its row's largest logit each logit is, over the temperature.

    Args:
        logits: (B, V) float32.
        inverse_temperatures: (B,) float32, > 0.

    Returns:
        (B, V) float32 from -87 to 0, a new tensor. Where a row's logits are not numbers, or all
        impossible, some are NaN.
    """
    away = logits - logits.amax(-1, keepdim=True)
    return away.mul_(inverse_temperatures[:, None]).clamp_min_(_LEAST_DISTANCE)


def exponentials(values: Tensor, *, shift: int = 0) -> Tensor:
    """Return exp(value) * 2**shift, with a relative error below 4e-7.

    Args:
        values: float32 from -87 to 0; what is not a number gives what is none.
        shift: >= 0.
    """
    exponents = (values * (1.0 / math.log(2.0))).round_()
    rest = values - exponents * _LN2[0]
    rest.sub_(exponents * _LN2[1])
    series = torch.full_like(values, _TAYLOR[0])
    for coefficient in _TAYLOR[1:]:
        series.mul_(rest).add_(coefficient)
    bits = exponents.int().add_(_FLOAT32_BIAS + shift) << _FLOAT32_MANTISSA_BITS
    return series.mul_(bits.view(torch.float32))


def weights_of(values: Tensor) -> Tensor:
    """Return the weights of tokens at these distances.

    Args:
        values: (B, V) float32, see `distances`.

    Returns:
        (B, V) float32, whole numbers from 0 to 2**32.
    """
    return exponentials(values, shift=_SHIFT).round_()
