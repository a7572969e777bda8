"""EDT: a temperature from the entropy, after Zhang et al."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from decoding.options import option
from decoding.spread import Spread
from decoding.strategies.base import CheckedStrategy, PlainController
from decoding.tables import TokenTables


@dataclass(frozen=True, kw_only=True, slots=True)
class Edt(CheckedStrategy):
    """Lower the temperature where the model is sure: T = temperature * base ** (theta / entropy).

    The entropy is in nats, of the model's distribution after bias, penalties and bans. Where it is
    0 the likeliest token is taken; where it is large the request's temperature holds.

    Source: Zhang, Bao and Huang, "EDT: Improving large language models' generation by
    entropy-based dynamic temperature sampling" (2024), equation 4; the base is 0.8 there.
    """

    name: ClassVar[str] = "edt"

    theta: float = option(
        0.1,
        "How strongly sureness cools; 0 keeps the temperature fixed.",
        "number",
        minimum=0.0,
        maximum=10.0,
    )
    base: float = option(
        0.8,
        "What is raised to theta / entropy; 1 keeps the temperature fixed.",
        "number",
        minimum=0.0,
        maximum=1.0,
        is_minimum_excluded=True,
    )

    def bind(self, tables: TokenTables) -> "EdtController":
        """Return the controller for a vocabulary."""
        return EdtController(self.theta, self.base)


class EdtController(PlainController):
    """See `Edt`."""

    reads_spread = True

    def __init__(self, theta: float, base: float) -> None:
        self._theta = theta
        self._base = base

    def temperatures(self, states: Tensor | None, base: Tensor, spread: Spread | None) -> Tensor:
        assert spread is not None
        if self._theta == 0.0 or self._base == 1.0:
            return base
        # An entropy of 0 gives an exponent without bound, and a temperature of 0.
        cooled = base.double() * self._base ** (self._theta / spread.entropies)
        return torch.nan_to_num(cooled, nan=0.0).float()
