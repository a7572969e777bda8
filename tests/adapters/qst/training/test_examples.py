"""Batches of examples, their order, and the split."""

import pytest

from adapters.qst.examples import DataOrder, Example, digest_examples, hold_out, pack_examples


def test_rows_are_those_before_targets() -> None:
    first = Example(token_ids=[5, 6, 7], is_target=[1, 0, 1])
    second = Example(token_ids=[8, 9], is_target=[0, 1])
    batch = pack_examples([first, second])
    assert batch.packed.token_ids.tolist() == [5, 6, 7, 8, 9]
    assert batch.packed.positions.tolist() == [0, 1, 2, 0, 1]
    assert batch.packed.query_starts.tolist() == [0, 3, 5]
    assert batch.packed.context_lens.tolist() == [3, 2]
    assert (batch.rows.tolist(), batch.targets.tolist()) == ([1, 3], [7, 9])
    assert first.num_targets + second.num_targets == 2


def test_classes_are_read_from_last_tokens() -> None:
    batch = pack_examples([Example(token_ids=[5, 6], label=2), Example(token_ids=[7], label=0)])
    assert (batch.rows.tolist(), batch.targets.tolist()) == ([1, 2], [2, 0])


def test_every_epoch_holds_each_example_once_in_another_order() -> None:
    order = DataOrder(10, seed=3)
    first, second = order.take(0, 10), order.take(10, 10)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert DataOrder(10, seed=4).take(0, 10) != first


@pytest.mark.parametrize("start", [0, 7, 25])
def test_order_can_be_read_from_anywhere(start: int) -> None:
    assert DataOrder(10, seed=3).take(start, 12) == DataOrder(10, seed=3).take(0, 40)[start:][:12]


@pytest.mark.parametrize(
    ("share", "limit", "count"), [(0.0, 9, 0), (0.1, 9, 2), (0.5, 4, 4), (0.01, 9, 1)]
)
def test_held_out_examples_are_not_trained_on(share: float, limit: int, count: int) -> None:
    examples = [Example(token_ids=[i, i], is_target=[0, 1]) for i in range(20)]
    kept, held_out = hold_out(examples, share, limit, seed=0)
    assert len(held_out) == count
    assert sorted(e.token_ids[0] for e in kept + held_out) == list(range(20))
    assert (kept, held_out) == hold_out(examples, share, limit, seed=0)


def test_single_example_is_trained_on() -> None:
    examples = [Example(token_ids=[1, 2], is_target=[0, 1])]
    assert hold_out(examples, 0.5, 10, seed=0) == (examples, [])


def test_digest_follows_tokens_targets_labels_and_order() -> None:
    a, b = Example(token_ids=[1, 2], is_target=[0, 1]), Example(token_ids=[3, 2], is_target=[0, 1])
    variants = [
        [a, b], [b, a], [a], [Example(token_ids=[1, 2], is_target=[1, 1]), b],
        [Example(token_ids=[1, 2], label=0), Example(token_ids=[3, 2], label=1)],
    ]  # fmt: skip
    assert len({digest_examples(variant) for variant in variants}) == len(variants)
    assert digest_examples([a, b]) == digest_examples([a, b])
