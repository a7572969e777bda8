"""The sampler: logits of a batch of sequences to one token for each."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from decoding.logprobs import MAX_ROWS, LogitsError, TopLogprobs, token_logprobs
from decoding.options import ParameterError
from decoding.params import SamplingParams
from decoding.penalties import apply_edits
from decoding.picker import PickedRow, Picker
from decoding.row import Row, ShapedRow
from decoding.spread import Spread
from decoding.strategies import Controller, Strategy
from decoding.tables import TokenTables
from decoding.temperature_head import TemperatureHead
from decoding.torch_picker import TorchPicker

MIN_TEMPERATURE = 1e-5
"""Below it, the draw is the argmax long before."""

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
        stages: the strategy's name of where each token stands, if it has one.
        candidates: of a row that is to look ahead, what it tries, (token id, logprob) pairs, most
            likely first; its token is not drawn yet, and the first of them stands for it. Empty
            of all others.
    """

    token_ids: list[int]
    logprobs: list[float | None]
    top: list[TopLogprobs]
    temperatures: list[float]
    entropies: list[float | None]
    classes: list[str]
    stages: list[str | None]
    candidates: list[TopLogprobs]


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
        picker: Picker | None = None,
    ) -> None:
        """Prepare for a vocabulary.

        Args:
            tables: one entry for each logit.
            eos_token_ids: end-of-sequence tokens, which `min_tokens` holds back; those that have
                no logits are never drawn.
            device: where the logits are.
            picker: None: the definition, on that device.
        """
        self._tables = tables
        self._eos_token_ids = frozenset(i for i in eos_token_ids if i < tables.vocab_size)
        self._controllers: OrderedDict[Strategy, Controller] = OrderedDict()
        self._picker: Picker = picker or TorchPicker(tables.vocab_size, device=torch.device(device))

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
        temperature_head: TemperatureHead | None = None,
    ) -> Row:
        """Begin a sequence.

        Args:
            params: sampling parameters; `params.seed` is not read.
            prompt_token_ids: the prompt, which penalties and strategies look at.
            seed: of the random numbers, an int64; see `derive_seed`.
            prompt_is_template: the prompt ends in a chat template's header, so that the generated
                text starts afresh. Strategies then do not look at the prompt.
            is_traced: report class, temperature and entropy of each token.
            temperature_head: for a strategy that reads one.

        Raises:
            ParameterError: a token id among the parameters is not in the vocabulary, or no token
                of it may be drawn before `min_tokens`, or the strategy lacks its head.
        """
        params.check_vocabulary(self._tables.vocab_size, self._eos_token_ids)
        controller = self._bind(params.strategy)
        if params.strategy.reads_head and temperature_head is None:
            raise ParameterError(
                f"decoding.strategy {params.strategy.name} needs a temperature head",
                param="decoding.strategy",
            )
        return Row(
            params,
            controller,
            prompt_token_ids,
            seed=seed,
            prompt_is_template=prompt_is_template,
            is_traced=is_traced,
            banned_token_ids=sorted(params.held_back_ids(self._eos_token_ids)),
            temperature_head=temperature_head,
        )

    def sample(self, logits: Tensor, rows: Sequence[Row], states: Tensor | None = None) -> Sampled:
        """Choose the next token of each row; the rows are not changed, but for their notes.

        Args:
            logits: (B, V) float32, raw model output; not changed.
            rows: B rows.
            states: (B, D) float32, what the LM head read; needed by rows with a temperature head.

        Raises:
            LogitsError: a row's logits are not numbers.
        """
        assert logits.shape == (len(rows), self._tables.vocab_size), logits.shape
        if logits.dtype != torch.float32 or not logits.is_contiguous():
            logits = logits.float().contiguous()
        temperatures = self._temperatures(logits, rows, states)
        # Most steps have none of these rows, and taking a row out of the logits costs.
        shapers = [(i, s) for i, row in enumerate(rows) if (s := row.controller.shaper) is not None]
        shaped: list[PickedRow] = list(rows)
        for index, shaper in shapers:
            if temperatures[index] or shaper.shapes_greedy:
                edited = _edited(logits[index], rows[index])
                shape = shaper.shape(edited, rows[index], temperatures[index])
                shaped[index] = ShapedRow(rows[index], shape)
        token_ids: list[int] = []
        for token_id in self._picker.pick(logits, shaped, temperatures):
            if token_id is None:
                raise LogitsError
            token_ids.append(token_id)
        for index, shaper in shapers:
            if shaped[index] is not rows[index] and shaper.learn is not None:
                row, edited = rows[index], _edited(logits[index], rows[index])
                row.note(shaper.learn(edited, row, temperatures[index], token_ids[index]))
        candidates = self._find_candidates(logits, rows)
        for index, tried in enumerate(candidates):
            if tried:
                token_ids[index] = tried[0][0]
        return self.report(logits, rows, token_ids, temperatures, candidates)

    def _find_candidates(self, logits: Tensor, rows: Sequence[Row]) -> list[TopLogprobs]:
        """Return what rows try before they take their next token; none where that is easy."""
        found: list[TopLogprobs] = [()] * len(rows)
        strategies = [row.params.strategy for row in rows]
        ahead = {i: each for i, of in enumerate(strategies) if (each := of.look_ahead) is not None}
        if not ahead:
            return found
        indices = list(ahead)
        taken = _select_rows(logits, indices)
        spread = Spread(*self._picker.measure(taken, [rows[index] for index in indices]))
        for position, entropy in enumerate(spread.entropies.tolist()):
            index = indices[position]
            if entropy > ahead[index].threshold:
                edited = _edited(logits[index], rows[index])
                count = min(ahead[index].num_candidates, int(spread.num_possible[position]))
                # Of tokens with equal logits the first counts, everywhere.
                bound = edited.topk(count).values[-1]
                likely = torch.nonzero(edited >= bound)[:, 0]
                likely = likely[edited[likely].argsort(descending=True, stable=True)][:count].cpu()
                logprobs = edited.cpu()[likely].double() - spread.log_masses[position]
                found[index] = tuple(zip(likely.tolist(), logprobs.tolist(), strict=True))
        return found

    def score(
        self, logits: Tensor, token_ids: Sequence[int], *, num_top: int
    ) -> list[tuple[float, TopLogprobs]]:
        """Return what `token_logprobs` does, with the bits that `sample` reports."""
        found: list[tuple[float, TopLogprobs]] = []
        for start in range(0, len(token_ids), MAX_ROWS):
            rows = slice(start, start + MAX_ROWS)
            spread = Spread(*self._picker.measure(logits[rows], None))
            found += token_logprobs(
                logits[rows], token_ids[rows], num_top=num_top, log_masses=spread.log_masses
            )
        return found

    def _temperatures(
        self, logits: Tensor, rows: Sequence[Row], hidden: Tensor | None
    ) -> list[float]:
        """Return the temperature of each row; rows of the same strategy are handled together."""
        groups: dict[Controller, list[int]] = {}
        for index, row in enumerate(rows):
            if not row.params.is_greedy:
                groups.setdefault(row.controller, []).append(index)
        temperatures = [0.0] * len(rows)
        for controller, indices in groups.items():
            members = [rows[index] for index in indices]
            base = torch.tensor([row.params.temperature for row in members])
            if members[0].params.strategy.reads_head:
                base = torch.tensor([_read_head(rows[index], hidden, index) for index in indices])
            states = spread = None
            if controller.automaton is not None:
                states = torch.tensor([row.state for row in members])
            if controller.reads_spread:
                chosen = _select_rows(logits, indices)
                spread = Spread(*self._picker.measure(chosen, members))
            values = controller.temperatures(states, base, spread).clamp_min(MIN_TEMPERATURE)
            for index, value in zip(indices, values.tolist(), strict=True):
                temperatures[index] = value
        return temperatures

    def report(
        self,
        logits: Tensor,
        rows: Sequence[Row],
        token_ids: list[int],
        temperatures: list[float],
        candidates: list[TopLogprobs],
    ) -> Sampled:
        """Add what the rows ask to know about their tokens, drawn by `sample` or otherwise."""
        logprobs: list[float | None] = [None] * len(rows)
        top: list[TopLogprobs] = [()] * len(rows)
        entropy: list[float | None] = [None] * len(rows)
        stages: list[str | None] = [None] * len(rows)
        told = [i for i, row in enumerate(rows) if row.is_traced or row.params.logprobs is not None]
        if told:
            taken = _select_rows(logits, told)
            spread = Spread(*self._picker.measure(taken, None))
            entropies = spread.entropies.tolist()
            groups: dict[int, list[int]] = {}
            for position, index in enumerate(told):
                groups.setdefault(rows[index].params.logprobs or 0, []).append(position)
                if rows[index].is_traced:
                    entropy[index], stages[index] = entropies[position], _stage(rows[index])
            for num_top, positions in groups.items():
                found = token_logprobs(
                    _select_rows(taken, positions),
                    [token_ids[told[position]] for position in positions],
                    num_top=num_top,
                    log_masses=spread.log_masses[positions],
                )
                for position, (logprob, alternatives) in zip(positions, found, strict=True):
                    logprobs[told[position]], top[told[position]] = logprob, alternatives
        return Sampled(
            token_ids=token_ids,
            logprobs=logprobs,
            top=top,
            temperatures=temperatures,
            entropies=entropy,
            classes=[self._tables.class_name(token_id) for token_id in token_ids],
            stages=stages,
            candidates=candidates,
        )


def _read_head(row: Row, hidden: Tensor | None, index: int) -> float:
    assert row.temperature_head is not None
    assert hidden is not None, "rows with a temperature head need the hidden states"
    return row.temperature_head.temperature(hidden[index].float().cpu())


def _stage(row: Row) -> str | None:
    stages = row.controller.stages
    return None if stages is None else stages[row.state]


def _edited(logits: Tensor, row: Row) -> Tensor:
    """Return (V,) logits of a row after bias, penalties and bans."""
    edits = row.edits(0)
    if edits is None:
        return logits
    changed = logits.clone()[None]
    apply_edits(changed, [edits])
    return changed[0]


def _select_rows(logits: Tensor, indices: list[int]) -> Tensor:
    """Return (P, V) logits of some rows, in order; the logits themselves if these are all."""
    if len(indices) == len(logits):
        return logits
    return logits.index_select(0, torch.tensor(indices, device=logits.device))
