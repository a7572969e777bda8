"""What the sampler does with whole rows of logits: edits, filters and the draw.

`decoding.torch_picker` is the definition, and runs on every device; faster ones take the same
tokens.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from decoding.row import Row


class Picker(Protocol):
    """Takes a token from each row; a row's token depends on that row only."""

    def pick(
        self, logits: Tensor, rows: Sequence[Row], temperatures: Sequence[float]
    ) -> list[int | None]:
        """Return the next token of each row, None where its logits are not numbers.

        Args:
            logits: (B, V) float32, contiguous, raw model output; not changed.
            rows: B rows; not changed.
            temperatures: B temperatures; 0 takes the first of the largest logits, without a draw.
        """

    def measure(self, logits: Tensor, rows: Sequence[Row] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the fields of `decoding.spread.Spread`.

        Args:
            logits: as for `pick`.
            rows: whose bias, penalties and bans come first; None: the logits as they are.
        """
