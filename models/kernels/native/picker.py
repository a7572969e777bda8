"""Take the next tokens of a batch with the native CPU kernels.

What a token is taken by is defined in `decoding`, which is not imported here: the protocols below
name what is read of its rows.
"""

import ctypes
from array import array
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from models.kernels.native.threads import ThreadPool

_NO_EDITS = (0,) * 9


class Params(Protocol):
    """What is read of a row's sampling parameters."""

    @property
    def top_k(self) -> int: ...
    @property
    def typical_p(self) -> float: ...
    @property
    def top_p(self) -> float: ...
    @property
    def min_p(self) -> float: ...
    @property
    def repetition_penalty(self) -> float: ...
    @property
    def frequency_penalty(self) -> float: ...
    @property
    def presence_penalty(self) -> float: ...


class Counts(Protocol):
    """Tokens that penalties act on."""

    @property
    def token_ids(self) -> Tensor: ...
    @property
    def counts(self) -> Tensor: ...
    @property
    def in_prompt(self) -> Tensor: ...


class Edits(Protocol):
    """Changes to a row's logits."""

    @property
    def bias(self) -> tuple[Tensor, Tensor] | None: ...
    @property
    def counts(self) -> Counts | None: ...
    @property
    def banned(self) -> Tensor | None: ...


class PickedRow(Protocol):
    """What is read of a row."""

    @property
    def params(self) -> Params: ...
    def uniform(self) -> float: ...
    def edits(self, row: int) -> Edits | None: ...


class NativePicker:
    """Takes tokens as `decoding.picker.Picker` says; the same tokens as `TorchPicker`."""

    def __init__(self, library: ctypes.CDLL, pool: ThreadPool, kernels: str) -> None:
        """Hold the threads.

        Args:
            library: of the extension.
            pool: the threads that rows are divided among.
            kernels: "avx2" or "avx512".
        """
        self._library = library
        self._pool = pool
        self._kernels = kernels.encode()

    def pick(
        self, logits: Tensor, rows: Sequence[PickedRow], temperatures: Sequence[float]
    ) -> list[int | None]:
        """Return the next token of each row, see `Picker`."""
        numbers = array("d")
        for row, temperature in zip(rows, temperatures, strict=True):
            p = row.params
            uniform = row.uniform() if temperature else 0.0
            numbers.extend((temperature, uniform, p.top_k, p.typical_p, p.top_p, p.min_p))
        token_ids = array("q", bytes(8 * len(rows)))
        self._call(self._library.proa_sample, logits, rows, _address(numbers), _address(token_ids))
        return [None if token_id < 0 else token_id for token_id in token_ids]

    def measure(
        self, logits: Tensor, rows: Sequence[PickedRow] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return entropies, log masses and numbers of possible tokens, see `Picker`."""
        entropies, log_masses = torch.empty(2, len(logits), dtype=torch.float64)
        num_possible = torch.empty(len(logits), dtype=torch.int64)
        self._call(
            self._library.proa_measure, logits, rows or [],
            entropies.data_ptr(), log_masses.data_ptr(), num_possible.data_ptr(),
        )  # fmt: skip
        return entropies, log_masses, num_possible

    def _call(
        self,
        function: Callable[..., None],
        logits: Tensor,
        rows: Sequence[PickedRow],
        *addresses: int,
    ) -> None:
        """Call a function of the extension; where no row has edits, it gets none."""
        edits = [row.edits(index) for index, row in enumerate(rows)]
        strengths, places = array("f"), array("q")
        if any(edit is not None for edit in edits):
            for row, edit in zip(rows, edits, strict=True):
                p = row.params
                strengths.extend((p.repetition_penalty, p.frequency_penalty, p.presence_penalty))
                places.extend(_NO_EDITS if edit is None else _locate(edit))
        function(
            self._pool.handle, self._kernels, logits.data_ptr(), *logits.shape,
            _address(strengths), _address(places) if places else None, *addresses,
        )  # fmt: skip


def _address(values: array) -> int:
    return values.buffer_info()[0]


def _locate(edits: Edits) -> tuple[int, ...]:
    """Return what the extension reads of a row's edits: addresses and lengths."""
    bias, counts, banned = edits.bias, edits.counts, edits.banned
    return (
        *((0, 0, 0) if bias is None else (bias[0].data_ptr(), bias[1].data_ptr(), len(bias[0]))),
        *(
            (0, 0, 0, 0)
            if counts is None
            else (
                counts.token_ids.data_ptr(), counts.counts.data_ptr(), counts.in_prompt.data_ptr(),
                len(counts.token_ids),
            )
        ),
        *((0, 0) if banned is None else (banned.data_ptr(), len(banned))),
    )  # fmt: skip
