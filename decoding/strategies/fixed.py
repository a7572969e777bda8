"""The same temperature for every token."""

from dataclasses import dataclass
from typing import ClassVar

from decoding.strategies.base import CheckedStrategy, PlainController
from decoding.tables import TokenTables


@dataclass(frozen=True, kw_only=True, slots=True)
class Fixed(CheckedStrategy):
    """Draw every token at the request's temperature."""

    name: ClassVar[str] = "fixed"

    def bind(self, tables: TokenTables) -> PlainController:
        """Return the controller for a vocabulary."""
        return PlainController()
