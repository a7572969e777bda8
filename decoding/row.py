"""What the sampler remembers of one sequence."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from decoding.draw import derive_seed, uniforms
from decoding.params import SamplingParams
from decoding.penalties import Edits, TokenCounts
from decoding.strategies import Controller, Shape
from decoding.temperature_head import TemperatureHead

_NUM_UNIFORMS_AHEAD = 64
# Beyond the numbers of a request's sequences.
_SECOND_STREAM = 2**40


class Row:
    """One sequence as the sampler sees it, made by `Sampler.start`.

    A pure function of (parameters, prompt, seed, generated token ids): a row that was truncated
    and grown again equals one that was grown at once.

    Attributes:
        params: sampling parameters.
        controller: the strategy bound to the vocabulary.
        is_traced: report class, temperature and entropy.
        prompt_token_ids: the prompt.
        is_filtered: top-k, typical-p, top-p or min-p drop tokens.
        temperature_head: gives its temperatures, if the strategy reads one.
    """

    def __init__(
        self,
        params: SamplingParams,
        controller: Controller,
        prompt_token_ids: Sequence[int],
        *,
        seed: int,
        prompt_is_template: bool,
        is_traced: bool,
        banned_token_ids: Sequence[int],
        temperature_head: TemperatureHead | None = None,
    ) -> None:
        self.params = params
        self.controller = controller
        self.is_traced = is_traced
        self.temperature_head = temperature_head
        self.prompt_token_ids = prompt_token_ids
        self.is_filtered = is_filtered(params)
        self._notes: list[float | None] = []
        self._seed = seed
        self._token_ids: list[int] = []
        self._automaton = controller.automaton
        self._states = [controller.start(prompt_token_ids, prompt_is_template=prompt_is_template)]
        self._uniforms: list[float] = []
        self._uniforms_start = 0
        is_penalised = (
            params.repetition_penalty != 1.0
            or params.frequency_penalty != 0.0
            or params.presence_penalty != 0.0
        )
        self._counts = TokenCounts(params, prompt_token_ids) if is_penalised else None
        self._bias: tuple[Tensor, Tensor] | None = None
        if params.logit_bias:
            ids, biases = zip(*params.logit_bias.items(), strict=True)
            self._bias = (torch.tensor(ids), torch.tensor(biases, dtype=torch.float32))
        self._banned = torch.tensor(sorted(banned_token_ids)) if banned_token_ids else None

    @property
    def num_generated(self) -> int:
        """How many tokens were appended."""
        return len(self._token_ids)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens that were appended."""
        return tuple(self._token_ids)

    @property
    def state(self) -> int:
        """State of the strategy for the next token."""
        return self._states[-1]

    @property
    def last_note(self) -> float | None:
        """What was noted of the last token."""
        return self._notes[len(self._token_ids) - 1] if self._token_ids and self._notes else None

    def note(self, value: float | None) -> None:
        """Keep what is to be remembered of the token that is appended next."""
        del self._notes[len(self._token_ids) :]
        self._notes.append(value)

    def append(self, token_id: int) -> None:
        """Add a generated token."""
        self._token_ids.append(token_id)
        if self._automaton is not None:
            self._states.append(self._automaton.next_state(self._states[-1], token_id))
        if self._counts is not None:
            self._counts.add(token_id)

    def truncate(self, num_generated: int) -> None:
        """Forget the tokens after the first `num_generated`.

        Raises:
            ValueError: there are fewer tokens than that.
        """
        if not 0 <= num_generated <= len(self._token_ids):
            raise ValueError(
                f"num_generated must be from 0 to {len(self._token_ids)}, got {num_generated}"
            )
        if self._counts is not None:
            for token_id in self._token_ids[num_generated:]:
                self._counts.remove(token_id)
        del self._token_ids[num_generated:]
        del self._states[num_generated + 1 :]

    def uniform(self) -> float:
        """Return the random number in [0, 1) for the next token: of (seed, position)."""
        offset = len(self._token_ids) - self._uniforms_start
        if not 0 <= offset < len(self._uniforms):
            offset = len(self._token_ids) % _NUM_UNIFORMS_AHEAD
            self._uniforms_start = len(self._token_ids) - offset
            ahead = torch.arange(self._uniforms_start, self._uniforms_start + _NUM_UNIFORMS_AHEAD)
            self._uniforms = uniforms(torch.tensor(self._seed), ahead).tolist()
        return self._uniforms[offset]

    def second_uniform(self) -> float:
        """Return another random number in [0, 1) for the next token."""
        seed = derive_seed(self._seed, _SECOND_STREAM)
        return float(uniforms(torch.tensor(seed), torch.tensor(len(self._token_ids))))

    def edits(self, row: int) -> Edits | None:
        """Return the changes to the logits for the next token, if any.

        Args:
            row: row of the logits that they are for.
        """
        is_early = self._banned is not None and len(self._token_ids) < self.params.min_tokens
        if self._bias is None and not self._counts and not is_early:
            return None
        banned = self._banned if is_early else None
        return Edits(row=row, bias=self._bias, counts=self._counts, banned=banned)


class ShapedRow:
    """A row as the picker sees it once its strategy has had its say, at one step.

    Args:
        row: the row.
        shape: what becomes of its distribution.
    """

    def __init__(self, row: Row, shape: Shape) -> None:
        self.params = row.params
        if shape.min_p > row.params.min_p:
            self.params = replace(row.params, min_p=min(1.0, shape.min_p))
        self.is_filtered = is_filtered(self.params)
        self._row = row
        self._shape = shape

    def uniform(self) -> float:
        """Return the random number of the draw, see `Row`."""
        return self._row.uniform()

    def edits(self, row: int) -> Edits | None:
        """Return the changes to the logits, see `Row`, and the strategy's own."""
        bias, banned = self._shape.bias, self._shape.banned
        own = self._row.edits(row)
        if bias is None and banned is None:
            return own
        if own is None:
            return Edits(row=row, bias=bias, counts=None, banned=banned)
        if bias is not None and own.bias is not None:
            bias = (torch.cat([own.bias[0], bias[0]]), torch.cat([own.bias[1], bias[1]]))
        if banned is not None and own.banned is not None:
            banned = torch.cat([own.banned, banned])
        return Edits(
            row=row,
            bias=own.bias if bias is None else bias,
            counts=own.counts,
            banned=own.banned if banned is None else banned,
        )


def is_filtered(params: SamplingParams) -> bool:
    """Return whether top-k, typical-p, top-p or min-p drop tokens."""
    return params.top_k > 0 or params.typical_p < 1.0 or params.top_p < 1.0 or params.min_p > 0.0
