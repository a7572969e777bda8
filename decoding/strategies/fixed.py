"""The same temperature for every token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from decoding.spread import Spread
from decoding.tables import TokenTables


@dataclass(frozen=True, kw_only=True, slots=True)
class Fixed:
    """Draw every token at the request's temperature."""

    name: ClassVar[str] = "fixed"

    def token_ids(self) -> Mapping[str, tuple[int, ...]]:
        """Return the token ids among the parameters, see `Strategy`."""
        return {}

    def bind(self, tables: TokenTables) -> "FixedController":
        """Return the controller for a vocabulary."""
        return FixedController()


class FixedController:
    """See `Fixed`."""

    automaton = None
    reads_spread = False
    shaper = None

    def start(self, prompt_token_ids: Sequence[int], *, prompt_is_template: bool) -> int:
        """Return the state for the first generated token, see `Controller`."""
        return 0

    def temperatures(self, states: Tensor | None, base: Tensor, spread: Spread | None) -> Tensor:
        return base
