"""What gives a row its temperature from the model's own hidden state."""

from typing import Protocol

from torch import Tensor


class TemperatureHead(Protocol):
    """A small network that was learned for one model."""

    def temperature(self, state: Tensor) -> float:
        """Return the temperature, >= 0, for the token after a (D,) float32 final state."""
