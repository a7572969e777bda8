"""What a side network is trained on: tokens, which of them to predict, and batches of both."""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from models.batch import PackedBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One sequence.

    Attributes:
        token_ids: its tokens.
        is_target: for each token 1 if the loss counts its prediction, else 0; empty for
            classification. The first token is never predicted.
        label: its class, for classification.
    """

    token_ids: Sequence[int]
    is_target: Sequence[int] = b""
    label: int | None = None

    @property
    def num_targets(self) -> int:
        """Terms in the loss: predicted tokens, or one class."""
        return sum(self.is_target[1:]) if self.label is None else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingBatch:
    """Sequences one after the other, without padding.

    Attributes:
        examples: the sequences.
        packed: all tokens, from position 0 of each sequence.
        rows: (L,) int64 rows of the T tokens that a loss term reads: those before a target, or the
            last of each sequence.
        targets: (L,) int64 token id or class that each of them predicts.
    """

    examples: Sequence[Example]
    packed: PackedBatch
    rows: Tensor
    targets: Tensor


def pack_examples(examples: Sequence[Example]) -> TrainingBatch:
    """Lay sequences out for a decoder; tensors on the CPU."""
    lengths = [len(example.token_ids) for example in examples]
    starts = [0, *accumulate(lengths)]
    tokens = torch.tensor([i for e in examples for i in e.token_ids], dtype=torch.int32)
    rows, targets = [], []
    for example, start in zip(examples, starts, strict=False):
        if example.label is not None:
            rows.append(start + len(example.token_ids) - 1)
            targets.append(example.label)
            continue
        for i in range(1, len(example.token_ids)):
            if example.is_target[i]:
                rows.append(start + i - 1)
                targets.append(example.token_ids[i])
    packed = PackedBatch(
        token_ids=tokens,
        positions=torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths]),
        query_starts=torch.tensor(starts, dtype=torch.int32),
        context_lens=torch.tensor(lengths, dtype=torch.int32),
        block_tables=torch.zeros(len(examples), 1, dtype=torch.int32),
        output_rows=torch.empty(0, dtype=torch.int32),
    )
    return TrainingBatch(
        examples=examples, packed=packed, rows=torch.tensor(rows), targets=torch.tensor(targets)
    )  # fmt: skip


class DataOrder:
    """An endless stream of example indices: every epoch holds each once, in an order of its own.

    It has no state, so a run resumes anywhere.

    Args:
        num_examples: at least 1.
        seed: gives another order.
    """

    def __init__(self, num_examples: int, seed: int) -> None:
        self._num_examples = num_examples
        self._seed = seed
        self._epoch, self._order = -1, array("l")

    def take(self, start: int, count: int) -> list[int]:
        """Return the indices from place `start` of the stream."""
        return [self._at(place) for place in range(start, start + count)]

    def _at(self, place: int) -> int:
        epoch, offset = divmod(place, self._num_examples)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) % 2**63)
            order = torch.randperm(self._num_examples, generator=generator)
            self._epoch, self._order = epoch, array("l", order.tolist())
        return self._order[offset]


def hold_out(
    examples: Sequence[Example], share: float, limit: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """Split examples into those to train on and those held out, at least one of the former.

    Args:
        examples: all.
        share: to hold out, 0 .. 1; above 0 at least one is, if there are two.
        limit: most to hold out.
        seed: of the choice.
    """
    count = min(round(share * len(examples)) or int(share > 0), limit, len(examples) - 1)
    generator = torch.Generator().manual_seed(seed)
    chosen = set(torch.randperm(len(examples), generator=generator)[:count].tolist())
    kept = [example for i, example in enumerate(examples) if i not in chosen]
    return kept, [example for i, example in enumerate(examples) if i in chosen]


def digest_examples(examples: Sequence[Example]) -> str:
    """Return the SHA-256 of examples, in order."""
    hashed = hashlib.sha256()
    for example in examples:
        hashed.update(f"{len(example.token_ids)} {example.label}\n".encode())
        hashed.update(array("q", example.token_ids).tobytes() + bytes(example.is_target))
    return hashed.hexdigest()
