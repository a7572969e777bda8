"""XTC: exclude top choices."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from decoding.options import option
from decoding.strategies.base import CheckedStrategy, PlainController
from decoding.strategies.shaping import Shape, ShapedText
from decoding.tables import TokenTables


@dataclass(frozen=True, kw_only=True, slots=True)
class Xtc(CheckedStrategy):
    """Now and then leave out all of the likely tokens but the least likely of them.

    With the given probability at each token: of the tokens at least as probable as the threshold,
    only the least probable stays. Where fewer than two are, nothing changes. The probabilities are
    those at temperature 1, after bias, penalties and bans, before the request's own filters.

    Source: p-e-w, "Exclude Top Choices (XTC): a sampler that boosts creativity" (2024); llama.cpp,
    `llama_sampler_xtc_apply` (MIT), followed as a definition.
    """

    name: ClassVar[str] = "xtc"

    probability: float = option(0.5, "How often it acts.", "number", minimum=0.0, maximum=1.0)
    threshold: float = option(
        0.1,
        "Tokens at least this probable are the likely ones; above 0.5 there is one at most.",
        "number",
        minimum=0.0,
        maximum=1.0,
        is_minimum_excluded=True,
    )

    def bind(self, tables: TokenTables) -> PlainController:
        """Return the controller for a vocabulary."""
        return PlainController(shaper=_Shaper(self.probability, self.threshold))


class _Shaper:
    shapes_greedy = False
    learn = None

    def __init__(self, probability: float, threshold: float) -> None:
        self._probability = probability
        self._threshold = threshold

    def shape(self, logits: Tensor, text: ShapedText, temperature: float) -> Shape:
        if text.second_uniform() >= self._probability:
            return Shape()
        probs = logits.double().softmax(0)
        likely = torch.nonzero(probs >= self._threshold)[:, 0]
        if len(likely) < 2:
            return Shape()
        # Of equal ones the first stays, as everywhere.
        keep = int(probs[likely].argmin())
        return Shape(banned=torch.cat([likely[:keep], likely[keep + 1 :]]).cpu())
