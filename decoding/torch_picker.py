"""Edits, filters and the draw with torch operations."""

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from decoding.draw import draw_dense
from decoding.filters import draw_filtered
from decoding.penalties import apply_edits
from decoding.picker import PickedRow
from decoding.rows import argmax_rows
from decoding.spread import Spread, measure_spread
from decoding.weights import distances, weights_of

# Logits worked on at a time on a CPU, so that what they need stays in its caches.
_MAX_LOGITS_CPU = 2**17


class TorchPicker:
    """See `decoding.picker.Picker`."""

    def __init__(self, vocab_size: int, *, device: torch.device) -> None:
        self._device = device
        self._scratch = torch.empty(0, vocab_size, device=device)
        self._max_rows = sys.maxsize
        if device.type == "cpu":
            self._max_rows = max(1, _MAX_LOGITS_CPU // vocab_size)

    def pick(
        self, logits: Tensor, rows: Sequence[PickedRow], temperatures: Sequence[float]
    ) -> list[int | None]:
        token_ids: list[int | None] = [None] * len(rows)
        greedy: list[int] = []
        dense: list[int] = []
        filtered: list[int] = []
        for index, (row, temperature) in enumerate(zip(rows, temperatures, strict=True)):
            kind = filtered if row.is_filtered else dense
            (greedy if temperature == 0.0 else kind).append(index)
        for part in self._split(greedy):
            taken = self._take(logits, rows, part)
            columns = argmax_rows(taken)
            # What is not a number counts as the largest value, so this one tells of the whole row.
            values = taken.gather(1, columns[:, None])[:, 0].tolist()
            for index, token_id, value in zip(part, columns.tolist(), values, strict=True):
                token_ids[index] = token_id if math.isfinite(value) else None
        for drawn in (dense, filtered):
            for part in self._split(drawn):
                used = torch.tensor([temperatures[index] for index in part])
                ids = self._draw(logits, rows, part, used)
                for index, token_id in zip(part, ids, strict=True):
                    token_ids[index] = token_id
        return token_ids

    def measure(self, logits: Tensor, rows: Sequence[PickedRow] | None) -> Spread:
        parts = [
            measure_spread(
                logits[part[0] : part[-1] + 1] if rows is None else self._take(logits, rows, part)
            )
            for part in self._split(list(range(len(logits))))
        ]
        return Spread(*(torch.cat(fields) for fields in zip(*parts, strict=True)))

    def _split(self, indices: list[int]) -> list[list[int]]:
        """Split rows into parts that are worked on together."""
        size = self._max_rows
        return [indices[start : start + size] for start in range(0, len(indices), size)]

    def _take(self, logits: Tensor, rows: Sequence[PickedRow], part: list[int]) -> Tensor:
        """Return (P, V) logits of some rows after bias, penalties and bans.

        Args:
            logits: (B, V), all rows.
            rows: all rows.
            part: indices of the P rows.

        Returns:
            a view of `logits`, or scratch memory where something changes them.
        """
        edits = [rows[index].edits(position) for position, index in enumerate(part)]
        changes = [edit for edit in edits if edit is not None]
        first, last = part[0], part[-1]
        is_run = last - first + 1 == len(part)
        if is_run and not changes:
            return logits if len(part) == len(rows) else logits[first : last + 1]
        if len(part) > self._scratch.shape[0]:
            self._scratch = self._scratch.new_empty(len(part), self._scratch.shape[1])
        taken = self._scratch[: len(part)]
        if is_run:
            taken.copy_(logits[first : last + 1])
        else:
            torch.index_select(logits, 0, torch.tensor(part, device=self._device), out=taken)
        if changes:
            apply_edits(taken, changes)
        return taken

    def _draw(
        self, logits: Tensor, rows: Sequence[PickedRow], part: list[int], temperatures: Tensor
    ) -> list[int | None]:
        """Draw a token of each row of a part, whose rows are all filtered or all not."""
        members = [rows[index] for index in part]
        taken = self._take(logits, rows, part)
        away = distances(taken, temperatures.reciprocal().to(self._device))
        weights = weights_of(away)
        # One logit that is not a number, or none that is possible, makes the sum none.
        is_sound = weights.sum(1).isfinite()
        weights.masked_fill_(~is_sound[:, None], 1.0)
        uniforms = torch.tensor([[row.uniform()] for row in members], dtype=torch.float64)
        uniforms = uniforms.to(self._device)
        if members[0].is_filtered:
            drawn = draw_filtered(weights, away, [row.params for row in members], uniforms)
        else:
            drawn = draw_dense(weights, uniforms)
        pairs = zip(drawn.tolist(), is_sound.tolist(), strict=True)
        return [token_id if is_sound else None for token_id, is_sound in pairs]
