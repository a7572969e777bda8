"""Changes to single logits: bias, penalties and tokens that may not be drawn yet."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from decoding.params import SamplingParams

_MIN_CAPACITY = 256
# A tiny repetition penalty makes logits no larger: divided by the least temperature it is finite.
_MAX_LOGIT = 1e30


class TokenCounts:
    """The tokens that one row's penalties act on, updated as the row grows.

    Attributes:
        params: where the penalties are.
    """

    def __init__(self, params: SamplingParams, prompt_token_ids: Sequence[int]) -> None:
        self.params = params
        in_prompt = set(prompt_token_ids) if params.repetition_penalty != 1.0 else set()
        self._slots: dict[int, int] = {}
        self._ids = array("q")
        self._counts = array("f")
        self._in_prompt = array("f")
        self._reserve(max(_MIN_CAPACITY, 2 * len(in_prompt)))
        for token_id in in_prompt:
            self._add_slot(token_id, in_prompt=1.0)

    def _reserve(self, capacity: int) -> None:
        """Make room; the tensors share memory with the arrays, which are quick to change."""
        num_new = capacity - len(self._ids)
        self._ids = self._ids + array("q", bytes(8 * num_new))
        self._counts = self._counts + array("f", bytes(4 * num_new))
        self._in_prompt = self._in_prompt + array("f", bytes(4 * num_new))
        self._ids_tensor = torch.frombuffer(self._ids, dtype=torch.int64)
        self._counts_tensor = torch.frombuffer(self._counts, dtype=torch.float32)
        self._in_prompt_tensor = torch.frombuffer(self._in_prompt, dtype=torch.float32)

    def _add_slot(self, token_id: int, *, in_prompt: float) -> int:
        slot = len(self._slots)
        if slot == len(self._ids):
            self._reserve(2 * slot)
        self._slots[token_id] = slot
        self._ids[slot] = token_id
        self._in_prompt[slot] = in_prompt
        return slot

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def token_ids(self) -> Tensor:
        """(n,) int64, distinct ids; some may have left the row again."""
        return self._ids_tensor[: len(self._slots)]

    @property
    def counts(self) -> Tensor:
        """(n,) float32, how often each id was generated."""
        return self._counts_tensor[: len(self._slots)]

    @property
    def in_prompt(self) -> Tensor:
        """(n,) float32, 1 where the prompt has the id."""
        return self._in_prompt_tensor[: len(self._slots)]

    def add(self, token_id: int) -> None:
        """Count a generated token."""
        slot = self._slots.get(token_id)
        if slot is None:
            slot = self._add_slot(token_id, in_prompt=0.0)
        self._counts[slot] += 1.0

    def remove(self, token_id: int) -> None:
        """Take back an `add`."""
        self._counts[self._slots[token_id]] -= 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Edits:
    """Changes to one row's logits at one step.

    Attributes:
        row: row of the logits.
        bias: the row's `logit_bias` as (n,) int64 ids and (n,) float32 biases, or None.
        counts: the row's penalties, or None.
        banned: (n,) int64 ids that may not be drawn, or None.
    """

    row: int
    bias: tuple[Tensor, Tensor] | None
    counts: TokenCounts | None
    banned: Tensor | None


def apply_edits(logits: Tensor, edits: Sequence[Edits]) -> None:
    """Change single logits in place: bias, then penalties, then bans.

    Only the entries concerned are touched. The repetition penalty divides positive and multiplies
    negative logits of the tokens in prompt and output; the frequency penalty is subtracted for each
    occurrence in the output, the presence penalty once.

    Args:
        logits: (B, W) float32, contiguous, W at least the vocabulary's size.
        edits: at most one for each row.
    """
    flat = logits.view(-1)
    width = logits.shape[1]

    def locate(row: int, token_ids: Tensor) -> Tensor:
        return token_ids + row * width

    biased = [(edit.row, *edit.bias) for edit in edits if edit.bias is not None]
    if biased:
        where = torch.cat([locate(row, token_ids) for row, token_ids, _ in biased])
        values = torch.cat([biases for _, _, biases in biased])
        flat.index_add_(0, where.to(flat.device), values.to(flat.device))
    counted = [(edit.row, edit.counts) for edit in edits if edit.counts]
    if counted:
        where = torch.cat([locate(row, counts.token_ids) for row, counts in counted])
        where = where.to(flat.device)
        flat[where] = _penalise(flat[where], [counts for _, counts in counted])
    banned = [locate(edit.row, edit.banned) for edit in edits if edit.banned is not None]
    if banned:
        flat.index_fill_(0, torch.cat(banned).to(flat.device), -torch.inf)


def _penalise(values: Tensor, rows: Sequence[TokenCounts]) -> Tensor:
    """Return penalised logits of the rows' tokens, one row's after the other's."""
    strengths = torch.tensor(
        [
            (p.repetition_penalty, p.frequency_penalty, p.presence_penalty)
            for p in (counts.params for counts in rows)
        ],
        dtype=torch.float32,
    )
    lengths = torch.tensor([len(counts) for counts in rows])
    repetition, frequency, presence = (
        strengths.repeat_interleave(lengths, dim=0).to(values.device).unbind(1)
    )
    counts = torch.cat([row.counts for row in rows]).to(values.device)
    in_prompt = torch.cat([row.in_prompt for row in rows]).to(values.device)
    is_generated = counts > 0.0
    scaled = torch.where(values > 0.0, values / repetition, values * repetition)
    scaled = scaled.clamp_(-_MAX_LOGIT, _MAX_LOGIT)
    is_scaled = (is_generated | (in_prompt > 0.0)) & values.isfinite()
    values = torch.where(is_scaled, scaled, values)
    return values - frequency * counts - presence * is_generated
