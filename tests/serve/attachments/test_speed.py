"""The comparison of decode speeds, with a clock that only the decoders move."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import serve.attachments.speed
from models.batch import PackedBatch
from serve.attachments.speed import MAX_STEPS, MIN_STEPS, WARM_UPS, DecodeSpeedTest


class Clocked:
    """A decoder each of whose steps takes as long as the next of some times; the last repeats."""

    def __init__(self, clock: SimpleNamespace, *times_s: float) -> None:
        self.clock, self.times_s = clock, list(times_s)
        self.batches: list[tuple[int, int]] = []
        self.caches: list[Any] = []

    def make_cache(self, *, num_blocks: int, block_size: int = 16) -> Any:
        return SimpleNamespace(positions=num_blocks * block_size)

    def forward(self, batch: PackedBatch, cache: Any) -> Tensor:
        assert batch.positions.item() < cache.positions
        self.batches.append((int(batch.positions), int(batch.context_lens)))
        self.caches.append(cache)
        self.clock.now_s += self.times_s[0] if len(self.times_s) == 1 else self.times_s.pop(0)
        return torch.zeros(1, 4)


def measure(decoder: Any, base: Any) -> float | None:
    test = DecodeSpeedTest(decoder, base)
    while test.step():
        pass
    assert not test.step()
    return test.speed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now_s=0.0)
    monkeypatch.setattr(
        serve.attachments.speed, "time", SimpleNamespace(perf_counter=lambda: clock.now_s)
    )
    return clock


def test_speed_is_the_ratio_of_the_medians_without_the_first_steps(clock: SimpleNamespace) -> None:
    base = Clocked(clock, 0.09, 0.09, 0.09, 0.02, 0.5, 0.01)
    variant = Clocked(clock, 0.9, 0.05, 0.05, 0.02, 0.008)
    assert measure(variant, base) == pytest.approx(0.02 / 0.008)
    fast = Clocked(clock, 0.001)
    assert measure(fast, Clocked(clock, 0.0005)) == pytest.approx(0.5)
    assert len(fast.batches) == WARM_UPS + MAX_STEPS


def test_decoders_take_turns_over_one_cache(clock: SimpleNamespace) -> None:
    base, variant = Clocked(clock, 0.001), Clocked(clock, 0.001)
    measure(variant, base)
    assert base.batches == variant.batches
    assert base.batches == [(i, i + 1) for i in range(WARM_UPS + MAX_STEPS)]
    assert len({id(cache) for cache in (*base.caches, *variant.caches)}) == 1


def test_slow_models_are_measured_for_a_few_steps_only(clock: SimpleNamespace) -> None:
    base, variant = Clocked(clock, 2.0), Clocked(clock, 1.0)
    assert measure(variant, base) == pytest.approx(2.0)
    assert len(base.batches) == len(variant.batches) == WARM_UPS + MIN_STEPS


def test_speed_is_unknown_until_enough_was_measured(clock: SimpleNamespace) -> None:
    variant = Clocked(clock, 0.001)
    test = DecodeSpeedTest(variant, Clocked(clock, 0.002))
    for _ in range(WARM_UPS + MAX_STEPS - 1):
        assert test.step()
        assert test.speed is None
    assert not test.step()
    assert test.speed == pytest.approx(2.0)


def test_variant_that_has_left_memory_is_not_measured_and_not_held(clock: SimpleNamespace) -> None:
    variant, base = Clocked(clock, 0.001), Clocked(clock, 0.001)
    test = DecodeSpeedTest(variant, base)
    assert test.step()
    del variant
    assert not test.step()
    assert test.speed is None
    assert len(base.batches) == 1
