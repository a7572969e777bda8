"""What a decoding strategy is."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor

from decoding.automaton import Automaton
from decoding.options import check_options
from decoding.spread import Spread
from decoding.strategies.shaping import Shaper
from decoding.tables import TokenTables


class LookAhead(NamedTuple):
    """When a row stops to look ahead, and how far.

    Attributes:
        threshold: entropy in nats, of the model's distribution after bias, penalties and bans,
            above which it does.
        num_candidates: likeliest tokens that are tried.
        num_tokens: how many likeliest tokens after each are looked at.
    """

    threshold: float
    num_candidates: int
    num_tokens: int


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

    @property
    def stages(self) -> Sequence[str] | None:
        """Name of each state for a trace; None: they have none."""

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
            base: (B,) float32, the requests' temperatures, > 0, or what the rows' heads read.
            spread: of the rows' logits after bias, penalties and bans, if `reads_spread`.

        Returns:
            (B,) float32, >= 0; 0 takes the most likely token.
        """


class PlainController:
    """A controller that changes nothing: each strategy's own differs from it.

    Args:
        shaper: see `Controller`.
    """

    automaton: Automaton | None = None
    reads_spread = False
    shaper: Shaper | None = None
    stages: Sequence[str] | None = None

    def __init__(self, *, shaper: Shaper | None = None) -> None:
        self.shaper = shaper

    def start(self, prompt_token_ids: Sequence[int], *, prompt_is_template: bool) -> int:
        """Return the state for the first generated token, see `Controller`."""
        return 0

    def temperatures(self, states: Tensor | None, base: Tensor, spread: Spread | None) -> Tensor:
        """Return the temperature for the next token of each row, see `Controller`."""
        return base


class Strategy(Protocol):
    """The parameters of a strategy: a frozen dataclass whose fields are made with `option`."""

    name: ClassVar[str]

    @property
    def reads_head(self) -> bool:
        """Whether a row needs a temperature head, which replaces the request's temperature."""

    @property
    def look_ahead(self) -> LookAhead | None:
        """When several tokens are tried before one is taken; None: never."""

    def token_ids(self) -> Mapping[str, tuple[int, ...]]:
        """Return the token ids among the parameters by field, to be checked with a vocabulary."""

    def __hash__(self) -> int: ...

    def bind(self, tables: TokenTables) -> Controller:
        """Return the controller for a vocabulary."""


class CheckedStrategy:
    """What most strategies share: checked fields, no token ids, no head, no looking ahead."""

    __slots__ = ()
    reads_head: ClassVar[bool] = False

    @property
    def look_ahead(self) -> LookAhead | None:
        """When several tokens are tried before one is taken; None: never."""
        return None

    def __post_init__(self) -> None:
        check_options(self, prefix="decoding.")

    def token_ids(self) -> Mapping[str, tuple[int, ...]]:
        """Return the token ids among the parameters, see `Strategy`."""
        return {}
