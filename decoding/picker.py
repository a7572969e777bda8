"""What the sampler does with whole rows of logits: edits, filters and the draw.

`decoding.torch_picker` is the definition, and runs on every device; faster ones take the same
tokens.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from decoding.params import SamplingParams
from decoding.penalties import Edits


class PickedRow(Protocol):
    """What a picker reads of a row: `decoding.row.Row`, or one that its strategy has shaped."""

    @property
    def params(self) -> SamplingParams: ...
    @property
    def is_filtered(self) -> bool: ...
    def uniform(self) -> float: ...
    def edits(self, row: int) -> Edits | None: ...


class Picker(Protocol):
    """Takes a token from each row; a row's token depends on that row only."""

    def pick(
        self, logits: Tensor, rows: Sequence[PickedRow], temperatures: Sequence[float]
    ) -> list[int | None]:
        """Return the next token of each row, None where its logits are not numbers.

        Args:
            logits: (B, V) float32, contiguous, raw model output; not changed.
            rows: B rows; not changed.
            temperatures: B temperatures; 0 takes the first of the largest logits, without a draw.
        """

    def measure(
        self, logits: Tensor, rows: Sequence[PickedRow] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the fields of `decoding.spread.Spread`.

        Args:
            logits: as for `pick`.
            rows: whose bias, penalties and bans come first; None: the logits as they are.
        """
