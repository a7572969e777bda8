"""Look ahead at hard tokens: try several, keep the one that goes on best."""

from dataclasses import dataclass
from typing import ClassVar

from decoding.options import option
from decoding.strategies.base import CheckedStrategy, LookAhead, PlainController
from decoding.tables import TokenTables


@dataclass(frozen=True, kw_only=True, slots=True)
class LookAheadStrategy(CheckedStrategy):
    """Where the model is unsure, try its likeliest tokens, each with a few greedy tokens after it.

    A token is hard where the entropy of the model's distribution, after bias, penalties and bans,
    is above the threshold. Then the likeliest candidates fork over the cache blocks of the text so
    far, each goes on greedily, and the one whose tokens have the highest mean log probability is
    taken; the first of equals. All other tokens are drawn at the request's temperature, 0 by
    default a greedy one. A trace has the candidates with their scores.

    After AdaDec: He et al., "Towards better code generation: adaptive decoding with uncertainty
    guidance" (2025), which learns the threshold of each model; there, tokens where programs went
    wrong had a median entropy of 1.26 nats, all others 0.03.
    """

    name: ClassVar[str] = "look_ahead"

    threshold: float = option(
        1.0,
        "Entropy in nats above which a token is hard.",
        "number",
        minimum=0.0,
        maximum=20.0,
    )
    candidates: int = option(
        3, "Likeliest tokens that are tried at a hard one.", "integer", minimum=2, maximum=8
    )
    tokens: int = option(
        5, "How many greedy tokens after each are looked at.", "integer", minimum=1, maximum=32
    )

    @property
    def look_ahead(self) -> LookAhead:
        """When several tokens are tried before one is taken."""
        return LookAhead(self.threshold, self.candidates, self.tokens)

    def bind(self, tables: TokenTables) -> PlainController:
        """Return the controller for a vocabulary."""
        return PlainController()
