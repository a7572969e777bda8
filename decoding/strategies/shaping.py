"""What strategies may do to a distribution beside its temperature, row by row."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class Shape(NamedTuple):
    """What becomes of one row's distribution at one step.

    Attributes:
        min_p: keep tokens at least this fraction as likely as the most likely one, at the
            temperature that is drawn with; 0 keeps all.
        bias: (n,) int64 token ids and (n,) float32 numbers added to their logits, or None.
        banned: (n,) int64 token ids that may not be drawn, or None.
    """

    min_p: float = 0.0
    bias: tuple[Tensor, Tensor] | None = None
    banned: Tensor | None = None


class ShapedText(Protocol):
    """What a shaper knows of a row: its text so far, its random number, its notes."""

    @property
    def prompt_token_ids(self) -> Sequence[int]: ...

    @property
    def token_ids(self) -> Sequence[int]: ...

    @property
    def state(self) -> int:
        """State of the strategy for the next token."""

    @property
    def last_note(self) -> float | None:
        """What `learn` returned for the last token; None before the first."""

    def second_uniform(self) -> float:
        """Return a random number in [0, 1) for the next token, beside the one it is drawn with."""


Learn = Callable[[Tensor, ShapedText, float, int], float]
"""Of logits, text and temperature as for `Shaper.shape`, and the token that was drawn."""


class Shaper(Protocol):
    """Shapes the distributions of rows; a pure function of the row and its logits."""

    @property
    def shapes_greedy(self) -> bool:
        """Whether it has a say at temperature 0."""

    def shape(self, logits: Tensor, text: ShapedText, temperature: float) -> Shape:
        """Return what becomes of a row's distribution for its next token.

        Args:
            logits: (V,) float32, after bias, penalties and bans; not to be changed.
            text: of the row.
            temperature: of the draw; 0 is greedy.
        """

    @property
    def learn(self) -> Learn | None:
        """Gives what is to be remembered once a token was drawn; None: nothing ever is."""
