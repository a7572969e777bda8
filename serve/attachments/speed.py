"""Measure how fast a variant decodes beside its base."""

import time
import weakref
from statistics import median

import torch
from torch import Tensor

from models.batch import PackedBatch
from models.kv_cache import KVCache
from serve.engine.model import Model

WARM_UPS = 3
MAX_STEPS = 12
MIN_STEPS = 3
BUDGET_S = 0.5


class DecodeSpeedTest:
    """Compares how fast a variant and its base decode one stream.

    The two take turns, so that what else the machine does slows both. After `MIN_STEPS` each it
    ends when they have taken `BUDGET_S` seconds. A variant that leaves memory ends it, too.

    Attributes:
        speed: how many times as fast as its base the variant is; None until it is known.
    """

    def __init__(self, decoder: Model, base: Model) -> None:
        """Prepare it.

        Args:
            decoder: the variant.
            base: its base; caches of the one are caches of the other.
        """
        self.speed: float | None = None
        self._decoder = weakref.ref(decoder)
        self._base = base
        self._cache: KVCache | None = None
        self._base_times_s: list[float] = []
        self._times_s: list[float] = []

    def step(self) -> bool:
        """Decode one token with each of the two; nothing else may run on them meanwhile.

        Returns:
            Whether there is more to measure.
        """
        decoder = self._decoder()
        if decoder is None or self.speed is not None:
            return False
        if self._cache is None:
            self._cache = self._base.make_cache(num_blocks=1)
        batch = _one_token(len(self._times_s))
        with torch.inference_mode():
            for measured, times_s in (
                (self._base, self._base_times_s),
                (decoder, self._times_s),
            ):
                before_s = time.perf_counter()
                measured.forward(batch, self._cache)[0, 0].item()  # waits for a GPU
                times_s.append(time.perf_counter() - before_s)
        num_steps = len(self._times_s) - WARM_UPS
        is_late = sum(self._base_times_s) + sum(self._times_s) > BUDGET_S
        if num_steps == MAX_STEPS or (is_late and num_steps >= MIN_STEPS):
            self.speed = median(self._base_times_s[WARM_UPS:]) / median(self._times_s[WARM_UPS:])
            self._cache = None
        return self.speed is None


def _one_token(position: int) -> PackedBatch:
    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    return PackedBatch(
        token_ids=ints(0), positions=ints(position), query_starts=ints(0, 1),
        context_lens=ints(position + 1), block_tables=ints(0).view(1, 1), output_rows=ints(0),
    )  # fmt: skip
