"""Learned: a temperature from the model's own hidden state."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from decoding.options import option
from decoding.spread import Spread
from decoding.strategies.base import CheckedStrategy, PlainController
from decoding.tables import TokenTables


@dataclass(frozen=True, kw_only=True, slots=True)
class Learned(CheckedStrategy):
    """Draw each token at the temperature that a small network reads off the model's hidden state.

    The network is an attachment: the model id names it (`base:name`), `proa train temperature`
    makes one from programs that passed their tests and programs that failed. The request's own
    `temperature` has no part in it, except that 0 stays greedy.

    After the AdaptiveDecoder of Dhuliawala et al., "Adaptive decoding via latent preference
    optimization" (2024), which chooses among a few temperatures; here it is any within bounds.
    """

    name: ClassVar[str] = "learned"
    reads_head: ClassVar[bool] = True

    scale: float = option(
        1.0,
        "Multiplies the temperature that is read.",
        "number",
        minimum=0.0,
        maximum=10.0,
    )

    def bind(self, tables: TokenTables) -> "LearnedController":
        """Return the controller for a vocabulary."""
        return LearnedController(self.scale)


class LearnedController(PlainController):
    """See `Learned`."""

    def __init__(self, scale: float) -> None:
        self._scale = scale

    def temperatures(self, states: Tensor | None, base: Tensor, spread: Spread | None) -> Tensor:
        """Return what the heads read, which stands in `base` here, times the scale."""
        return base * self._scale
