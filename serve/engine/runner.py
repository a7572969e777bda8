"""Run the chunks of a step: the base, its variants and their side networks, over the caches."""

from functools import partial

from torch import Tensor

from models.kv_cache import KVCache
from models.side import AttachedSide
from serve.engine.limits import EngineLimits
from serve.engine.model import Model
from serve.engine.packing import BatchPacker
from serve.engine.scheduler import Chunk
from serve.engine.sequence import ModelVariant


class ModelRunner:
    """A base, the caches, and what lays steps out for it and its variants."""

    def __init__(self, model: Model, limits: EngineLimits) -> None:
        """Allocate the cache and the buffers.

        Args:
            model: the base.
            limits: fitted to it.
        """
        self._model = model
        self._cache = model.make_cache(
            num_blocks=limits.num_cache_blocks, block_size=limits.block_size,
            dtype=limits.cache_dtype,
        )  # fmt: skip
        self._make_side_cache = partial(
            model.make_side_cache, num_blocks=limits.num_side_blocks,
            block_size=limits.block_size, dtype=limits.cache_dtype,
        )  # fmt: skip
        self._side_caches: dict[object, KVCache] = {}
        self._packer = BatchPacker(limits, side_cache=self.side_cache)

    def forward(self, chunks: list[Chunk]) -> Tensor:
        """Run what chunks of one variant, or of the base, need.

        Returns:
            (L, V) their logits.
        """
        variant = chunks[0].sequence.variant
        model = self._model if variant is None else variant.model
        return model.forward(self._packer.pack(chunks), self._cache)

    def side_cache(self, side: AttachedSide) -> KVCache:
        """Return the cache that side networks of this shape share, made for the first of them."""
        cache = self._side_caches.get(side.cache_shape)
        if cache is None:
            cache = self._side_caches[side.cache_shape] = self._make_side_cache(side)
        return cache

    def forget(self) -> None:
        """Hold no side network any more, so that one that left is freed."""
        self._packer.forget()


def group_by_variant(chunks: list[Chunk]) -> list[list[Chunk]]:
    """Split the chunks of a step by what they run on: base first, then as the variants appear."""
    first = chunks[0].sequence.variant
    for chunk in chunks:
        if chunk.sequence.variant is not first:
            break
    else:
        return [chunks]
    groups: dict[ModelVariant | None, list[Chunk]] = {None: []}
    for chunk in chunks:
        groups.setdefault(chunk.sequence.variant, []).append(chunk)
    return [group for group in groups.values() if group]
