"""A strategy in one file: the first token at the request's temperature, the others cooler."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from decoding.automaton import Automaton
from decoding.options import check_options, option
from decoding.spread import Spread
from decoding.tables import TokenTables


@dataclass(frozen=True, kw_only=True, slots=True)
class Fading:
    """Draw the first token at the request's temperature and all others at a share of it."""

    name: ClassVar[str] = "fading"

    share: float = option(
        0.5, "What is left of the temperature.", "number", minimum=0.0, maximum=1.0
    )

    def __post_init__(self) -> None:
        check_options(self, prefix="decoding.")

    def token_ids(self) -> Mapping[str, tuple[int, ...]]:
        """Return the token ids among the parameters, see `Strategy`."""
        return {}

    def bind(self, tables: TokenTables) -> "FadingController":
        """Return the controller for a vocabulary."""
        return FadingController(self.share, tables.vocab_size)


class FadingController:
    """See `Fading`; state 0 is the first token, 1 any later one."""

    reads_spread = False
    shaper = None

    def __init__(self, share: float, vocab_size: int) -> None:
        self.automaton = Automaton([bytes([1, 1])], [0] * vocab_size)
        self._shares = torch.tensor([1.0, share])

    def start(self, prompt_token_ids: Sequence[int], *, prompt_is_template: bool) -> int:
        """Return the state for the first generated token, see `Controller`."""
        return 0

    def temperatures(self, states: Tensor | None, base: Tensor, spread: Spread | None) -> Tensor:
        """Return the temperature for the next token of each row, see `Controller`."""
        assert states is not None
        return base * self._shares[states]
