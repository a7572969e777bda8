"""A strategy in one file: the first token at the request's temperature, the others cooler."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from decoding.automaton import Automaton
from decoding.options import option
from decoding.spread import Spread
from decoding.strategies import CheckedStrategy, PlainController
from decoding.tables import TokenTables


@dataclass(frozen=True, kw_only=True, slots=True)
class Fading(CheckedStrategy):
    """Draw the first token at the request's temperature and all others at a share of it."""

    name: ClassVar[str] = "fading"

    share: float = option(
        0.5, "What is left of the temperature.", "number", minimum=0.0, maximum=1.0
    )

    def bind(self, tables: TokenTables) -> "FadingController":
        """Return the controller for a vocabulary."""
        return FadingController(self.share, tables.vocab_size)


class FadingController(PlainController):
    """See `Fading`; state 0 is the first token, 1 any later one."""

    def __init__(self, share: float, vocab_size: int) -> None:
        self.automaton = Automaton([bytes([1, 1])], [0] * vocab_size)
        self._shares = torch.tensor([1.0, share])

    def temperatures(self, states: Tensor | None, base: Tensor, spread: Spread | None) -> Tensor:
        """Return the temperature for the next token of each row, see `Controller`."""
        assert states is not None
        return base * self._shares[states]
