"""The sampler: logits of a batch of sequences to one token for each."""

import math
import sys
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from decoding.draw import draw_dense
from decoding.filters import draw_filtered
from decoding.logprobs import LogitsError, TopLogprobs, entropies, token_logprobs
from decoding.params import SamplingParams
from decoding.penalties import apply_edits
from decoding.row import Row
from decoding.rows import BLOCK_SIZE, argmax_rows
from decoding.strategies import Controller, Strategy
from decoding.tables import TokenTables

# Logits worked on at a time on a CPU, so that what they need stays in its caches.
_MAX_LOGITS_CPU = 2**19
# Below it, a division could overflow; the draw is the argmax long before.
MIN_TEMPERATURE = 1e-5
_MAX_CONTROLLERS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """One token for each row, and what the rows asked to be told about it.

    Attributes:
        token_ids: the tokens.
        logprobs: natural log probability of each token under the unscaled, unedited logits; None
            for a row that asks for neither `logprobs` nor a trace.
        top: the `params.logprobs` most likely (token id, logprob) pairs, most likely first.
        temperatures: temperature each token was drawn with; 0 is greedy.
        entropies: entropy in nats of the model's distribution at temperature 1; None for a row
            that is not traced.
        classes: class of each token's text, one of `TOKEN_CLASSES`.
    """

    token_ids: list[int]
    logprobs: list[float | None]
    top: list[TopLogprobs]
    temperatures: list[float]
    entropies: list[float | None]
    classes: list[str]


class Sampler:
    """Chooses tokens for batches whose rows each have their own parameters.

    A row's token depends on that row only: not on the others, nor on their number or order. One
    thread at a time may call `sample`.
    """

    def __init__(
        self,
        tables: TokenTables,
        *,
        eos_token_ids: Sequence[int] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        """Prepare for a vocabulary.

        Args:
            tables: one entry for each logit.
            eos_token_ids: end-of-sequence tokens, which `min_tokens` holds back; those that have
                no logits are never drawn.
            device: where the logits are.
        """
        self._tables = tables
        self._eos_token_ids = frozenset(i for i in eos_token_ids if i < tables.vocab_size)
        self._device = torch.device(device)
        self._controllers: OrderedDict[Strategy, Controller] = OrderedDict()
        num_blocks = -(-tables.vocab_size // BLOCK_SIZE)
        self._scaled = torch.empty(0, num_blocks * BLOCK_SIZE, device=self._device)
        self._probs = torch.empty_like(self._scaled)
        self._max_rows = sys.maxsize
        if self._device.type == "cpu":
            self._max_rows = max(1, _MAX_LOGITS_CPU // self._scaled.shape[1])

    def _bind(self, strategy: Strategy) -> Controller:
        """Return the strategy's controller, one of those used last or a new one."""
        controller = self._controllers.pop(strategy, None)
        if controller is None:
            controller = strategy.bind(self._tables)
        self._controllers[strategy] = controller
        if len(self._controllers) > _MAX_CONTROLLERS:
            self._controllers.popitem(last=False)
        return controller

    def start(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        *,
        seed: int,
        prompt_is_template: bool = False,
        is_traced: bool = False,
    ) -> Row:
        """Begin a sequence.

        Args:
            params: sampling parameters; `params.seed` is not read.
            prompt_token_ids: the prompt, which penalties and strategies look at.
            seed: of the random numbers, an int64; see `derive_seed`.
            prompt_is_template: the prompt ends in a chat template's header, so that the generated
                text starts afresh. Strategies then do not look at the prompt.
            is_traced: report class, temperature and entropy of each token.

        Raises:
            ParameterError: a token id among the parameters is not in the vocabulary, or no token
                of it may be drawn before `min_tokens`.
        """
        params.check_vocabulary(self._tables.vocab_size, self._eos_token_ids)
        return Row(
            params,
            self._bind(params.strategy),
            prompt_token_ids,
            seed=seed,
            prompt_is_template=prompt_is_template,
            is_traced=is_traced,
            banned_token_ids=sorted(params.held_back_ids(self._eos_token_ids)),
        )

    def sample(self, logits: Tensor, rows: Sequence[Row]) -> Sampled:
        """Choose the next token of each row; the rows are not changed.

        Args:
            logits: (B, V) float32, raw model output; not changed.
            rows: B rows.

        Raises:
            LogitsError: a row's logits are not numbers.
        """
        assert logits.shape == (len(rows), self._tables.vocab_size), logits.shape
        if logits.dtype != torch.float32 or not logits.is_contiguous():
            logits = logits.float().contiguous()
        token_ids = [0] * len(rows)
        temperatures = [0.0] * len(rows)
        greedy: list[int] = []
        dense: list[int] = []
        filtered: list[int] = []
        for index, row in enumerate(rows):
            kind = greedy if row.params.is_greedy else filtered if row.is_filtered else dense
            kind.append(index)
        for part in self._split(greedy):
            taken = self._take(logits, rows, part)
            columns = argmax_rows(taken)
            # What is not a number counts as the largest value, so this one tells of the whole row.
            if not all(map(math.isfinite, taken.gather(1, columns[:, None])[:, 0].tolist())):
                raise LogitsError
            for index, token_id in zip(part, columns.tolist(), strict=True):
                token_ids[index] = token_id
        for drawn in (dense, filtered):
            for part in self._split(drawn):
                ids, used = self._draw(logits, rows, part)
                for index, token_id, temperature in zip(part, ids, used, strict=True):
                    token_ids[index] = token_id
                    temperatures[index] = temperature
        return self._report(logits, rows, token_ids, temperatures)

    def _split(self, indices: list[int]) -> list[list[int]]:
        """Split rows into parts that are worked on together."""
        size = self._max_rows
        if len(indices) <= size:
            return [indices] if indices else []
        return [indices[start : start + size] for start in range(0, len(indices), size)]

    def _take(self, logits: Tensor, rows: Sequence[Row], part: list[int]) -> Tensor:
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
        scratch = self._scratch(len(part))[0]
        taken = scratch[:, : self._tables.vocab_size]
        if is_run:
            taken.copy_(logits[first : last + 1])
        else:
            torch.index_select(logits, 0, torch.tensor(part, device=self._device), out=taken)
        if changes:
            apply_edits(scratch, changes)
        return taken

    def _scratch(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """Return two (num_rows, W) float32 tensors that the next call reuses.

        W is the vocabulary's size rounded up to whole blocks; the columns on top of it hold -inf
        in the first tensor.
        """
        if num_rows > self._scaled.shape[0]:
            self._scaled = self._scaled.new_full((num_rows, self._scaled.shape[1]), -torch.inf)
            self._probs = torch.empty_like(self._scaled)
        return self._scaled[:num_rows], self._probs[:num_rows]

    def _draw(
        self, logits: Tensor, rows: Sequence[Row], part: list[int]
    ) -> tuple[list[int], list[float]]:
        """Draw a token of each row of a part, whose rows are all filtered or all not.

        Returns:
            token ids and temperatures.
        """
        members = [rows[index] for index in part]
        taken = self._take(logits, rows, part)
        temperatures = self._temperatures(members, taken).clamp_min(MIN_TEMPERATURE)
        scaled, probs = self._scratch(len(part))
        torch.div(taken, temperatures[:, None], out=scaled[:, : self._tables.vocab_size])
        torch.softmax(scaled, dim=-1, out=probs)
        # One logit that is not a number makes every probability of its row so.
        if any(map(math.isnan, probs[:, 0].tolist())):
            raise LogitsError
        uniforms = torch.tensor([[row.uniform()] for row in members], dtype=torch.float64)
        uniforms = uniforms.to(self._device)
        if members[0].is_filtered:
            drawn = draw_filtered(probs, [row.params for row in members], uniforms)
        else:
            drawn = draw_dense(probs, uniforms)
        return drawn.tolist(), temperatures.tolist()

    def _temperatures(self, members: Sequence[Row], logits: Tensor) -> Tensor:
        """Return (P,) float32 temperatures; rows of the same strategy are handled together."""
        groups: dict[Controller, list[int]] = {}
        for position, row in enumerate(members):
            groups.setdefault(row.controller, []).append(position)
        base = torch.tensor([row.params.temperature for row in members])
        if len(groups) == 1:
            return self._group_temperatures(members, base, logits)
        temperatures = torch.empty_like(base, device=self._device)
        for positions in groups.values():
            index = torch.tensor(positions)
            part = logits
            if members[positions[0]].controller.reads_logits:
                part = logits.index_select(0, index.to(self._device))
            group = [members[position] for position in positions]
            values = self._group_temperatures(group, base[index], part)
            temperatures[index.to(self._device)] = values
        return temperatures

    def _group_temperatures(self, members: Sequence[Row], base: Tensor, logits: Tensor) -> Tensor:
        """Return (P,) float32 temperatures of rows that share a controller."""
        controller = members[0].controller
        states = None
        if controller.automaton is not None:
            states = torch.tensor([row.state for row in members])
        if controller.reads_logits:
            return controller.temperatures(states, base.to(self._device), logits)
        return controller.temperatures(states, base, None).to(self._device)

    def _report(
        self,
        logits: Tensor,
        rows: Sequence[Row],
        token_ids: list[int],
        temperatures: list[float],
    ) -> Sampled:
        """Add what the rows ask to know about their tokens."""
        logprobs: list[float | None] = [None] * len(rows)
        top: list[TopLogprobs] = [()] * len(rows)
        entropy: list[float | None] = [None] * len(rows)
        groups: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            if row.is_traced or row.params.logprobs is not None:
                groups.setdefault(row.params.logprobs or 0, []).append(index)
        for num_top, members in groups.items():
            for part in self._split(members):
                taken = logits.index_select(0, torch.tensor(part, device=self._device))
                found = token_logprobs(taken, [token_ids[i] for i in part], num_top=num_top)
                for index, (logprob, alternatives) in zip(part, found, strict=True):
                    logprobs[index], top[index] = logprob, alternatives
        traced = [index for index, row in enumerate(rows) if row.is_traced]
        for part in self._split(traced):
            taken = logits.index_select(0, torch.tensor(part, device=self._device))
            for index, value in zip(part, entropies(taken).tolist(), strict=True):
                entropy[index] = value
        return Sampled(
            token_ids=token_ids,
            logprobs=logprobs,
            top=top,
            temperatures=temperatures,
            entropies=entropy,
            classes=[self._tables.class_name(token_id) for token_id in token_ids],
        )
