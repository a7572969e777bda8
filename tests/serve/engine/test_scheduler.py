from collections.abc import Callable
from typing import Any

import pytest

from serve.engine.cache_blocks import CacheBlocks
from serve.engine.limits import EngineLimits
from serve.engine.scheduler import Chunk, Scheduler
from serve.engine.sequence import LiveRequest, Sequence, SequenceState
from serve.requests import TokenLogprob
from tests.serve.engine.engine_client import branch, make_live

BLOCK_SIZE = 4


class Harness:
    """A scheduler whose steps generate a token for every chunk that ends with the newest token."""

    def __init__(self, num_blocks: int, **limits: int | bool) -> None:
        self.blocks = CacheBlocks(num_blocks)
        settings: dict[str, Any] = {"max_batch_tokens": 16, "max_running_sequences": 4}
        self.scheduler = Scheduler(
            self.blocks,
            CacheBlocks(1),
            EngineLimits(num_cache_blocks=num_blocks, block_size=BLOCK_SIZE, **(settings | limits)),
        )
        self.num_requests = 0

    def add(self, prompt: list[int], num_sequences: int = 1, **fields: int) -> LiveRequest:
        alike = branch(seed=0, max_tokens=100, num_sequences=num_sequences)
        request = make_live(prompt, alike, **fields)
        request.start(self.num_requests)
        self.num_requests += 1
        self.scheduler.add(request)
        return request

    def step(self) -> list[Chunk]:
        chunks = self.scheduler.schedule()
        self.scheduler.commit(chunks)
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence.prompt_logprobs is not None:
                sequence.prompt_logprobs += [TokenLogprob(0.0)] * chunk.num_prompt_logits
            if chunk.is_last:
                sequence.token_ids.append(len(sequence.token_ids))
        return chunks


def shape(chunks: list[Chunk]) -> list[tuple[int, int, int]]:
    return [(chunk.sequence.order[0], chunk.start, chunk.num_tokens) for chunk in chunks]


def test_long_prompt_is_cut_to_the_budget() -> None:
    harness = Harness(20)
    harness.add(list(range(40)))
    chunks = [harness.step()[0] for _ in range(4)]
    assert [(chunk.start, chunk.num_tokens) for chunk in chunks] == [
        (0, 16),
        (16, 16),
        (32, 8),
        (40, 1),
    ]
    assert [chunk.num_logits for chunk in chunks] == [0, 0, 1, 1]


def test_decoding_goes_before_prompts_in_one_step() -> None:
    harness = Harness(40)
    harness.add([1, 2, 3])
    harness.step()
    harness.add(list(range(30)))
    harness.add(list(range(50, 60)))
    assert shape(harness.step()) == [(0, 3, 1), (1, 0, 15)]
    assert shape(harness.step()) == [(0, 4, 1), (1, 15, 15)]
    assert shape(harness.step()) == [(0, 5, 1), (1, 30, 1), (2, 0, 10)]


def test_admission_is_first_come_first_served() -> None:
    harness = Harness(6)
    first = harness.add(list(range(16)))
    big = harness.add(list(range(100, 116)))
    small = harness.add([1])
    harness.step()
    assert first.sequences[0].state is SequenceState.RUNNING
    assert harness.scheduler.waiting == [big.sequences[0], small.sequences[0]]


def test_running_sequences_are_limited() -> None:
    harness = Harness(40, max_running_sequences=2)
    for i in range(3):
        harness.add([i])
    assert shape(harness.step()) == [(0, 0, 1), (1, 0, 1)]
    assert len(harness.scheduler.waiting) == 1


def test_request_is_queued_until_its_first_admission() -> None:
    harness = Harness(40, max_running_sequences=1)
    running = harness.add([1, 2])
    waiting = harness.add([3, 4, 5], num_sequences=2)
    assert (running.is_queued, waiting.is_queued) == (True, True)
    harness.step()
    assert (running.is_queued, waiting.is_queued) == (False, True)


def test_prefix_is_reused_in_full_blocks_and_to_the_end_by_the_same_prompt() -> None:
    harness = Harness(20)
    first = harness.add(list(range(12)))
    harness.step()
    again = harness.add(list(range(12)))
    longer = harness.add([*range(8), 99, 98])
    chunks = harness.step()
    assert shape(chunks) == [(0, 12, 1), (1, 11, 1), (2, 8, 2)]
    ends = [request.sequences[0].blocks[2] for request in (first, again)]
    assert harness.scheduler.take_copies() == [tuple(ends)]
    assert again.sequences[0].blocks[:2] == first.sequences[0].blocks[:2]
    assert longer.sequences[0].num_cached_prompt_tokens == 8
    assert harness.scheduler.num_cached_prompt_tokens == 11 + 8


def test_prefix_is_not_reused_when_caching_is_off() -> None:
    harness = Harness(20, prefix_caching=False)
    harness.add(list(range(12)))
    harness.step()
    harness.add(list(range(12)))
    assert shape(harness.step()) == [(0, 12, 1), (1, 0, 12)]


def test_siblings_wait_for_the_shared_prompt() -> None:
    harness = Harness(40)
    request = harness.add(list(range(20)), num_sequences=3)
    harness.add([1])
    assert shape(harness.step()) == [(0, 0, 16)]
    assert [s.state for s in request.sequences[1:]] == [SequenceState.HELD] * 2
    assert shape(harness.step()) == [(0, 16, 4), (1, 0, 1)]
    assert harness.scheduler.take_copies() == []
    assert shape(harness.step()) == [(0, 20, 1), (1, 1, 1), (0, 19, 1), (0, 19, 1)]
    assert len({sequence.blocks[3] for sequence in request.sequences}) == 1
    ends = [sequence.blocks[4] for sequence in request.sequences]
    assert len(set(ends)) == 3
    assert harness.scheduler.take_copies() == [(ends[0], ends[1]), (ends[0], ends[2])]
    assert harness.scheduler.take_copies() == []


def test_end_of_a_prompt_is_copied_from_one_that_has_left_until_its_block_is_recycled() -> None:
    harness = Harness(5)
    first = harness.add(list(range(6)))
    harness.step()
    end = first.sequences[0].blocks[1]
    harness.scheduler.finish(first.sequences[0])
    again = harness.add(list(range(6)))
    assert shape(harness.step()) == [(1, 5, 1)]
    assert harness.scheduler.take_copies() == [(end, again.sequences[0].blocks[1])]
    harness.scheduler.finish(again.sequences[0])
    other = harness.add([*range(50, 66)])
    harness.step()
    harness.scheduler.finish(other.sequences[0])
    harness.add(list(range(6)))
    assert shape(harness.step())[0][1] in (0, 4)
    assert harness.scheduler.take_copies() == []


def test_block_that_a_prompt_ends_in_is_found_as_full_once_it_is() -> None:
    harness = Harness(20)
    first = harness.add(list(range(6)))
    for _ in range(4):
        harness.step()
    ids = list(first.sequences[0].token_ids)
    assert len(ids) >= 8
    longer = harness.add([*ids[:8], 77])
    harness.step()
    assert longer.sequences[0].num_cached_prompt_tokens == 8
    assert longer.sequences[0].blocks[:2] == first.sequences[0].blocks[:2]


def test_sibling_takes_over_when_the_first_is_finished_early() -> None:
    harness = Harness(40)
    request = harness.add(list(range(20)), num_sequences=3)
    harness.step()
    harness.scheduler.finish(request.sequences[0])
    assert request.sequences[1].state is SequenceState.WAITING
    assert shape(harness.step()) == [(0, 16, 4)]
    assert len(harness.step()) == 2


def test_siblings_of_a_short_prompt_start_together() -> None:
    harness = Harness(40)
    harness.add([1, 2, 3, 4], num_sequences=3)
    assert shape(harness.step()) == [(0, 0, 4)] * 3


def test_youngest_is_preempted_and_computed_again() -> None:
    harness = Harness(4)
    old = harness.add([1, 2, 3, 4, 5, 6, 7])
    young = harness.add([11, 12, 13])
    for _ in range(3):
        harness.step()
    assert harness.scheduler.num_preemptions == 1
    assert harness.scheduler.waiting == young.sequences
    assert (young.sequences[0].num_computed, len(young.sequences[0].blocks)) == (0, 0)
    assert young.sequences[0].num_generated == 2
    harness.scheduler.finish(old.sequences[0])
    assert shape(harness.step()) == [(1, 4, 1)]


def test_preempted_sequence_runs_before_later_arrivals() -> None:
    harness = Harness(4)
    old = harness.add([1, 2, 3, 4, 5, 6, 7])
    harness.add([11, 12, 13])
    for _ in range(3):
        harness.step()
    harness.add([21])
    harness.scheduler.finish(old.sequences[0])
    assert [order for order, _, _ in shape(harness.step())] == [1, 2]


def test_admission_leaves_room_for_those_who_run_to_grow() -> None:
    harness = Harness(4)
    harness.add([1, 2, 3, 4, 5])
    harness.step()
    harness.add([11, 12, 13, 14, 15])
    assert shape(harness.step()) == [(0, 5, 1)]


def test_finish_frees_blocks_in_every_state() -> None:
    harness = Harness(8, max_running_sequences=2)
    running = harness.add(list(range(9)), num_sequences=2)
    waiting = harness.add(list(range(30, 50)))
    harness.step()
    assert harness.blocks.num_available == 5
    for sequence in (*running.sequences, *waiting.sequences):
        harness.scheduler.finish(sequence)
    assert harness.blocks.num_available == 8
    assert not harness.scheduler.waiting
    assert not harness.scheduler.running


def test_prompt_logits_are_asked_for_in_bounded_chunks() -> None:
    harness = Harness(20, max_prompt_logits=6)
    harness.add(list(range(15)), prompt_logprobs=0)
    chunks = [harness.step()[0] for _ in range(4)]
    assert [(c.start, c.num_tokens, c.num_logits, c.num_prompt_logits) for c in chunks] == [
        (0, 6, 6, 6),
        (6, 6, 6, 6),
        (12, 3, 3, 2),
        (15, 1, 1, 0),
    ]


def test_prompt_logits_forbid_prefix_reuse_by_the_first_sequence_only() -> None:
    harness = Harness(20)
    harness.add(list(range(12)))
    harness.step()
    harness.add(list(range(12)), prompt_logprobs=0, num_sequences=2)
    assert shape(harness.step()) == [(0, 12, 1), (1, 0, 12)]
    assert shape(harness.step())[2:] == [(1, 11, 1)]


def test_prompt_logits_are_not_computed_twice_after_preemption() -> None:
    harness = Harness(7, max_prompt_logits=10)
    old = harness.add([1, 2, 3])
    harness.step()
    echo = harness.add(list(range(50, 70)), prompt_logprobs=0)
    harness.step()
    assert harness.step()[1].num_prompt_logits == 9
    assert harness.scheduler.num_preemptions == 0
    for _ in range(6):
        harness.step()
    assert harness.scheduler.num_preemptions == 1
    harness.scheduler.finish(old.sequences[0])
    chunks = harness.step()
    assert chunks[0].num_prompt_logits == 0
    assert echo.sequences[0].num_prompt_logprobs == 19


@pytest.mark.parametrize("pick", [min, max], ids=["oldest", "youngest"])
def test_schedule_always_makes_progress_while_there_is_work(
    pick: Callable[[list[Sequence]], Sequence],
) -> None:
    harness = Harness(6, max_prompt_logits=2)
    for i in range(6):
        harness.add(list(range(i, i + 9)), num_sequences=1 + i % 2, prompt_logprobs=i % 3 or None)
    for _ in range(300):
        if not harness.scheduler.running and not harness.scheduler.waiting:
            break
        assert harness.step()
        done = [s for s in harness.scheduler.running if s.num_generated >= 6]
        if done:
            harness.scheduler.finish(pick(done, key=lambda s: s.order))
    assert harness.blocks.num_available == 6
    assert not harness.scheduler.waiting
    assert not harness.scheduler.running
