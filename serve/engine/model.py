"""What the engine asks of a model."""

from typing import Protocol

import torch
from torch import Tensor

from models.batch import PackedBatch
from models.kv_cache import KVCache
from models.side import AttachedSide
from models.spec import DecoderSpec


class Model(Protocol):
    """The part of `models.decoder.Decoder` that an engine uses."""

    spec: DecoderSpec

    def make_cache(
        self, *, num_blocks: int, block_size: int = 16, dtype: torch.dtype | None = None
    ) -> KVCache: ...

    def make_side_cache(
        self,
        side: AttachedSide,
        *,
        num_blocks: int,
        block_size: int = 16,
        dtype: torch.dtype | None = None,
    ) -> KVCache: ...

    def forward(
        self, batch: PackedBatch, cache: KVCache, *, states: Tensor | None = None
    ) -> Tensor: ...
