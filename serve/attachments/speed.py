"""Measure how fast a variant decodes beside its base."""

import time
from statistics import median
from typing import Protocol

import torch
from torch import Tensor

from models.batch import PackedBatch
from models.kv_cache import KVCache

WARM_UPS = 3
MAX_STEPS = 12
MIN_STEPS = 3
BUDGET_S = 0.5


class Decoder(Protocol):
    """The part of `models.decoder.Decoder` that is measured."""

    def make_cache(self, *, num_blocks: int, block_size: int = 16) -> KVCache: ...

    def forward(self, batch: PackedBatch, cache: KVCache) -> Tensor: ...


def compare_decode_speed(decoder: Decoder, base: Decoder) -> float:
    """Return how many times as fast as its base a variant decodes one stream.

    The two take turns, so that what else the machine does slows both. After `MIN_STEPS` each it
    ends when `BUDGET_S` seconds are over.

    Args:
        decoder: the variant.
        base: its base; caches of the one are caches of the other.
    """
    cache = base.make_cache(num_blocks=1)
    times_s: dict[Decoder, list[float]] = {base: [], decoder: []}
    start_s = time.perf_counter()
    with torch.inference_mode():
        for position in range(WARM_UPS + MAX_STEPS):
            is_late = time.perf_counter() - start_s > BUDGET_S
            if is_late and position >= WARM_UPS + MIN_STEPS:
                break
            batch = _one_token(position)
            for measured, times in times_s.items():
                before_s = time.perf_counter()
                measured.forward(batch, cache)[0, 0].item()  # waits for a GPU
                times.append(time.perf_counter() - before_s)
    return median(times_s[base][WARM_UPS:]) / median(times_s[decoder][WARM_UPS:])


def _one_token(position: int) -> PackedBatch:
    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    return PackedBatch(
        token_ids=ints(0), positions=ints(position), query_starts=ints(0, 1),
        context_lens=ints(position + 1), block_tables=ints(0).view(1, 1), output_rows=ints(0),
    )  # fmt: skip
