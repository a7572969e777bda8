"""Top-n-sigma: keep the logits that stand out of the noise."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from decoding.options import option
from decoding.strategies.base import CheckedStrategy, PlainController
from decoding.strategies.shaping import Shape, ShapedText
from decoding.tables import TokenTables


@dataclass(frozen=True, kw_only=True, slots=True)
class TopNSigma(CheckedStrategy):
    """Keep tokens whose logit is at most n standard deviations below the largest.

    The standard deviation is over the logits of all tokens that bias, penalties and masks leave
    possible. What is kept does not depend on the temperature, so that it may be high.

    Source: Tang et al., "Top-n-sigma: not all logits are you need" (2024); llama.cpp,
    `llama_sampler_top_n_sigma_apply` (MIT), followed as a definition.
    """

    name: ClassVar[str] = "top_n_sigma"

    n: float = option(
        1.0,
        "How many standard deviations below the largest logit a token may be.",
        "number",
        minimum=0.0,
        maximum=100.0,
        is_minimum_excluded=True,
    )

    def bind(self, tables: TokenTables) -> PlainController:
        """Return the controller for a vocabulary."""
        return PlainController(shaper=_Shaper(self.n))


class _Shaper:
    shapes_greedy = False
    learn = None

    def __init__(self, n: float) -> None:
        self._n = n

    def shape(self, logits: Tensor, text: ShapedText, temperature: float) -> Shape:
        possible = logits[logits.isfinite()]
        if len(possible) < 2:
            return Shape()
        deviation = float(possible.double().std(correction=0))
        # A distance between logits is a ratio of probabilities at a temperature.
        return Shape(min_p=math.exp(-self._n * deviation / temperature))
