"""A temperature from a hidden state: a small network that is learned for one model."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TemperatureHead:
    """T = least + (most - least) * sigmoid(second . silu(first @ state + bias) + offset).

    Attributes:
        first: (K, D) float32.
        bias: (K,) float32.
        second: (K,) float32.
        offset: of the sigmoid's argument.
        least, most: bounds of the temperature.
    """

    first: Tensor
    bias: Tensor
    second: Tensor
    offset: float
    least: float
    most: float

    def temperature(self, state: Tensor) -> float:
        """Return the temperature for the token after a (D,) float32 final state."""
        middle = F.silu(self.first @ state + self.bias)
        share = (middle @ self.second + self.offset).sigmoid()
        return self.least + (self.most - self.least) * float(share)
