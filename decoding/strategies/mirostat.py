"""Mirostat 2: a target for the surprise of the text."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from decoding.options import option
from decoding.strategies.base import CheckedStrategy, PlainController
from decoding.strategies.shaping import Shape, ShapedText
from decoding.tables import TokenTables


@dataclass(frozen=True, kw_only=True, slots=True)
class Mirostat2(CheckedStrategy):
    """Keep the surprise of the text near a target, by leaving out tokens that surprise too much.

    Tokens whose surprise (-log2 of the probability at the request's temperature) is above a bound
    are left out, the likeliest never is. The bound begins at twice the target; after each token it
    falls by the rate times what the token's surprise, among those kept, was above the target.

    Source: Basu et al., "Mirostat: a neural text decoding algorithm that directly controls
    perplexity", ICLR 2021; llama.cpp, `llama_sampler_mirostat_v2_apply` (MIT), followed as a
    definition.
    """

    name: ClassVar[str] = "mirostat2"

    tau: float = option(
        5.0,
        "The target, in bits a token.",
        "number",
        minimum=0.0,
        maximum=100.0,
        is_minimum_excluded=True,
    )
    eta: float = option(
        0.1, "The rate at which the bound follows.", "number", minimum=0.0, maximum=1.0
    )

    def bind(self, tables: TokenTables) -> PlainController:
        """Return the controller for a vocabulary."""
        return PlainController(shaper=_Shaper(self.tau, self.eta))


class _Shaper:
    shapes_greedy = False

    def __init__(self, tau: float, eta: float) -> None:
        self._tau = tau
        self._eta = eta

    def _bound(self, text: ShapedText) -> float:
        note = text.last_note
        return 2 * self._tau if note is None else note

    def shape(self, logits: Tensor, text: ShapedText, temperature: float) -> Shape:
        largest = float((logits.double() / temperature).log_softmax(0).amax())
        # The likeliest token stays however small the bound.
        return Shape(min_p=math.exp(min(0.0, -self._bound(text) * math.log(2) - largest)))

    def learn(self, logits: Tensor, text: ShapedText, temperature: float, token_id: int) -> float:
        logprobs = (logits.double() / temperature).log_softmax(0)
        bound = self._bound(text)
        kept = logprobs >= min(-bound * math.log(2), float(logprobs.amax()))
        mass = torch.logsumexp(logprobs[kept], 0)
        surprise = float(mass - logprobs[token_id]) / math.log(2)
        return bound - self._eta * (surprise - self._tau)
