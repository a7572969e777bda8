"""What a decoding strategy is."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

from torch import Tensor

from decoding.automaton import Automaton
from decoding.spread import Spread
from decoding.strategies.shaping import Shaper
from decoding.tables import TokenTables


class Controller(Protocol):
    """A strategy bound to a vocabulary: gives each row its temperature.

    A row's state is a small integer and a pure function of its token ids; rows are independent.
    """

    @property
    def automaton(self) -> Automaton | None:
        """Advances the state by each generated token; None when the state is always 0."""

    @property
    def reads_spread(self) -> bool:
        """Whether `temperatures` needs the spread."""

    @property
    def shaper(self) -> Shaper | None:
        """Has a say in more than the temperature; None: nothing has."""

    def start(self, prompt_token_ids: Sequence[int], *, prompt_is_template: bool) -> int:
        """Return the state for the first generated token.

        Args:
            prompt_token_ids: the prompt.
            prompt_is_template: the prompt ends in a chat template's header, which is no part of
                the text that follows.
        """

    def temperatures(self, states: Tensor | None, base: Tensor, spread: Spread | None) -> Tensor:
        """Return the temperature for the next token of each row.

        Args:
            states: (B,) int64, state of each row; None without an automaton.
            base: (B,) float32, the requests' temperatures, > 0.
            spread: of the rows' logits after bias, penalties and bans, if `reads_spread`.

        Returns:
            (B,) float32, >= 0; 0 takes the most likely token.
        """


class Strategy(Protocol):
    """The parameters of a strategy: a frozen dataclass whose fields are made with `option`."""

    name: ClassVar[str]

    def token_ids(self) -> Mapping[str, tuple[int, ...]]:
        """Return the token ids among the parameters by field, to be checked with a vocabulary."""

    def __hash__(self) -> int: ...

    def bind(self, tables: TokenTables) -> Controller:
        """Return the controller for a vocabulary."""
