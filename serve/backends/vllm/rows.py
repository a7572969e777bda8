"""Our sampler's rows over a batch whose tokens somebody else appends."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from adapters.format import Host, StoredAdapter
from adapters.methods import HeadMethod, Method, SideMethod, method_of
from decoding import Sampler
from decoding.logprobs import LogitsError
from decoding.row import Row
from decoding.sampler import Sampled
from decoding.temperature_head import TemperatureHead
from serve.backends.vllm.addresses import parse_address
from serve.backends.vllm.asked import Asked

_MAX_PARKED = 4096

Record = dict[str, Any]
"""What is reported of a draw: `key`, `position`, and what was asked for of `token_class`,
`temperature`, `entropy`, `stage`, `scores`; or `error`."""
Send = Callable[[list[Record]], None]


@dataclass(slots=True, eq=False)
class LiveRow:
    """A sequence in the batch.

    Attributes:
        asked: what it wants.
        row: the sampler's.
        output_ids: its tokens so far; whoever runs the batch appends to it, -1 for one whose value
            has not arrived there yet.
        drawn: the last token that was drawn; it may have been thrown away.
    """

    asked: Asked
    row: Row
    output_ids: Sequence[int]
    drawn: int | None = None

    def sync(self) -> None:
        """Bring the row to the tokens that were really appended."""
        row, count = self.row, len(self.output_ids)
        if row.num_generated > count:
            row.truncate(count)
        while row.num_generated < count:
            token_id = self.output_ids[row.num_generated]
            if token_id < 0:
                assert self.drawn is not None
                assert row.num_generated == count - 1, "a token that nobody here has drawn"
                token_id = self.drawn
            row.append(token_id)


def _nothing() -> Host:
    raise AssertionError("adapters need a host")


class RowKeeper:
    """Starts, parks and draws rows.

    Args:
        sampler: for the model's vocabulary.
        send: takes what is reported of a step; None: nobody wants it.
        states: gives (L, D), what the LM head has read for the rows of logits.
        host: gives what the model is to adapters.
    """

    def __init__(
        self,
        sampler: Sampler,
        *,
        send: Send | None,
        states: Callable[[], Tensor | None] = lambda: None,
        host: Callable[[], Host] = _nothing,
    ) -> None:
        self._sampler = sampler
        self._send = send
        self._states = states
        self._host = host
        self._parked: OrderedDict[str, LiveRow] = OrderedDict()
        self._heads: dict[str, TemperatureHead] = {}
        self._classifiers: dict[str, Tensor] = {}

    def start(
        self, asked: Asked, prompt_token_ids: Sequence[int], output_ids: Sequence[int]
    ) -> LiveRow:
        """Begin a sequence, or go on with one that has left the batch and come back.

        Raises:
            ParameterError: the parameters do not go with the vocabulary.
            AdapterError: a head or classifier cannot be read.
        """
        known = self._parked.pop(asked.key, None) if asked.key else None
        if known is not None:
            known.output_ids = output_ids
            return known
        row = self._sampler.start(
            asked.params, prompt_token_ids, seed=asked.seed,
            prompt_is_template=asked.prompt_is_template, is_traced=asked.is_traced,
            temperature_head=None if asked.head is None else self._head(asked.head),
        )  # fmt: skip
        return LiveRow(asked, row, output_ids)

    def park(self, live: LiveRow) -> None:
        """Keep a row that leaves the batch: it may have been pre-empted only."""
        if live.asked.key:
            self._parked[live.asked.key] = live
            if len(self._parked) > _MAX_PARKED:
                self._parked.popitem(last=False)

    def draw(self, logits: Tensor, live: Mapping[int, LiveRow]) -> None:
        """Draw the next token of some rows, and leave no other one possible.

        Args:
            logits: (B, V) float32; rows that are drawn are changed.
            live: by row of the logits.
        """
        indices = list(live)
        for one in live.values():
            one.sync()
        rows = [one.row for one in live.values()]
        taken = logits if indices == list(range(len(logits))) else logits[indices]
        reads_states = any(one.asked.head or one.asked.classifier for one in live.values())
        states = self._states() if reads_states else None
        chosen = None if states is None else states[indices].float()
        try:
            sampled = self._sampler.sample(taken, rows, chosen)
        except LogitsError:
            # Some row's numbers are none. The others' tokens depend on their own only.
            for position, index in enumerate(indices):
                alone = None if chosen is None else chosen[position : position + 1]
                self._draw_alone(logits, index, live[index], alone)
            return
        records = []
        for position, (index, one) in enumerate(live.items()):
            one.drawn = sampled.token_ids[position]
            _leave_only(logits[index], one.drawn)
            records += self._describe(one, sampled, position, chosen)
        if records and self._send is not None:
            self._send(records)

    def _draw_alone(self, logits: Tensor, index: int, one: LiveRow, states: Tensor | None) -> None:
        try:
            sampled = self._sampler.sample(logits[index : index + 1], [one.row], states)
            one.drawn = sampled.token_ids[0]
            records = self._describe(one, sampled, 0, states)
        except LogitsError:
            one.drawn = 0
            records = [self._key(one) | {"error": True}]
        _leave_only(logits[index], one.drawn)
        if records and self._send is not None and one.asked.key:
            self._send(records)

    def _describe(
        self, one: LiveRow, sampled: Sampled, position: int, states: Tensor | None
    ) -> list[Record]:
        if one.asked.classifier is not None:
            assert states is not None
            weight = self._classifier(one.asked.classifier)
            return [self._key(one) | {"scores": (weight @ states[position].cpu()).tolist()}]
        if not one.asked.is_traced:
            return []
        return [
            self._key(one)
            | {
                "token_class": sampled.classes[position],
                "temperature": sampled.temperatures[position],
                "entropy": sampled.entropies[position],
                "stage": sampled.stages[position],
            }
        ]

    def _key(self, one: LiveRow) -> Record:
        return {"key": one.asked.key, "position": one.row.num_generated}

    def _head(self, address: str) -> TemperatureHead:
        if address not in self._heads:
            stored, method = self._read(address)
            assert isinstance(method, HeadMethod)
            self._heads[address] = method.build(stored, self._host())
        return self._heads[address]

    def _classifier(self, address: str) -> Tensor:
        if address not in self._classifiers:
            stored, method = self._read(address)
            assert isinstance(method, SideMethod)
            classifier = method.build(stored, self._host()).classifier
            assert classifier is not None
            self._classifiers[address] = classifier
        return self._classifiers[address]

    @staticmethod
    def _read(address: str) -> tuple[StoredAdapter, Method]:
        stored = parse_address(address).read()
        return stored, method_of(stored.config)


def _leave_only(row: Tensor, token_id: int) -> None:
    """Make one token of (V,) logits the only possible one."""
    row.fill_(-float("inf"))
    row[token_id] = 0.0
