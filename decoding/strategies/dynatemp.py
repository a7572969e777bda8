"""Entropy-based dynamic temperature, as llama.cpp defines it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from decoding.options import option
from decoding.spread import Spread
from decoding.strategies.base import CheckedStrategy, PlainController
from decoding.tables import TokenTables


@dataclass(frozen=True, kw_only=True, slots=True)
class DynaTemp(CheckedStrategy):
    """Raise the temperature with the entropy of the model's distribution.

    T = low + (high - low) * (entropy / maximum entropy) ** exponent, between
    low = max(0, temperature - range) and high = temperature + range. A request's temperature of 0
    stays greedy. The entropy is over all tokens that bias, penalties and masks leave possible: here
    the temperature comes before top_k and top_p, while llama.cpp's default chain puts it last.

    Source: llama.cpp, `llama_sampler_temp_ext_apply` (MIT), followed as a definition.
    """

    name: ClassVar[str] = "dynatemp"

    range: float = option(
        0.5,
        "How far below and above the request's temperature it may go; 0 keeps it fixed.",
        "number",
        minimum=0.0,
        maximum=2.0,
    )
    exponent: float = option(
        1.0,
        "Power applied to the normalised entropy; above 1 keeps more tokens cool.",
        "number",
        minimum=0.0,
        maximum=10.0,
    )

    def bind(self, tables: TokenTables) -> "DynaTempController":
        """Return the controller for a vocabulary."""
        return DynaTempController(self.range, self.exponent)


class DynaTempController(PlainController):
    """See `DynaTemp`."""

    reads_spread = True

    def __init__(self, spread: float, exponent: float) -> None:
        self._spread = spread
        self._exponent = exponent

    def temperatures(self, states: Tensor | None, base: Tensor, spread: Spread | None) -> Tensor:
        assert spread is not None
        if self._spread == 0.0:
            return base
        # In double precision, so that the result does not depend on the number of rows.
        low = (base.double() - self._spread).clamp_min(0.0)
        high = base.double() + self._spread
        share = (spread.entropies / spread.num_possible.double().log()).clamp(0.0, 1.0)
        moved = low + (high - low) * share**self._exponent
        return torch.where(spread.num_possible > 1, moved.float(), base)
