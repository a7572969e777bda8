"""Run the chunks of a step: lay them out as the packed batch that a decoder reads, and hand it to
the base or a variant, over the caches.
"""

import math
from array import array
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from models.batch import ForkBatch, PackedBatch, SideBatch
from models.fork import AttachedFork
from models.kv_cache import KVCache
from models.side import AttachedSide
from serve.engine.limits import EngineLimits
from serve.engine.model import Model
from serve.engine.scheduler import Chunk
from serve.engine.sequence import ModelVariant, SideStream


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

    def forward(self, chunks: list[Chunk], *, needs_states: bool) -> tuple[Tensor, Tensor | None]:
        """Run what chunks of one variant, or of the base, need.

        Returns:
            (L, V) their logits, and if asked for (L, D) what the LM head read for them.
        """
        variant = chunks[0].sequence.variant
        model = self._model if variant is None else variant.model
        batch = self._packer.pack(chunks)
        if not needs_states:
            return model.forward(batch, self._cache), None
        states = torch.empty(len(batch.output_rows), model.spec.hidden_size)
        return model.forward(batch, self._cache, states=states), states

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy (source, target) blocks of the cache."""
        if copies:
            sources, targets = zip(*copies, strict=True)
            self._cache.copy_blocks(sources, targets)

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


class _Buffer:
    """An int32 buffer that Python fills through `view` and torch reads through `head`."""

    def __init__(self, size: int) -> None:
        storage = array("i", bytes(4 * size))
        self.view = memoryview(storage)
        self._tensor = torch.frombuffer(storage, dtype=torch.int32)
        self._shape: tuple[int, ...] = (size,)
        self._head = self._tensor

    def head(self, *shape: int) -> Tensor:
        """Give the first elements in a shape; steps share the tensor: views are slow to make."""
        if self._shape != shape:
            self._shape, self._head = shape, self._tensor[: math.prod(shape)].view(shape)
        return self._head


class BatchPacker:
    """Builds packed batches in buffers that every step overwrites."""

    def __init__(
        self, limits: EngineLimits, *, side_cache: Callable[[AttachedSide], KVCache]
    ) -> None:
        """Allocate the buffers.

        Args:
            limits: fitted to the model.
            side_cache: gives the cache of a side network.
        """
        num_tokens = limits.max_batch_tokens
        num_rows = limits.max_running_sequences + limits.max_probes
        num_blocks = limits.max_sequence_blocks
        self._token_ids = _Buffer(num_tokens)
        self._positions = _Buffer(num_tokens)
        self._output_rows = _Buffer(num_tokens)
        self._query_starts = _Buffer(num_rows + 1)
        self._context_lens = _Buffer(num_rows)
        self._block_tables = _Buffer(num_rows * num_blocks)
        self._write_starts = _Buffer(num_rows)
        self._sides = SidePacker(num_rows, num_blocks, side_cache)
        self._forks = ForkPacker(num_tokens)
        longest = max(limits.max_context_tokens, num_tokens)
        self._count_up = memoryview(array("i", range(longest)))

    def pack(self, chunks: list[Chunk]) -> PackedBatch:
        """Lay out one step.

        Args:
            chunks: at least one, within the limits given at the start.

        Returns:
            The batch; its tensors are valid until the next call.
        """
        token_ids, positions = self._token_ids.view, self._positions.view
        output_rows, count_up = self._output_rows.view, self._count_up
        query_starts, context_lens = self._query_starts.view, self._context_lens.view
        block_tables = self._block_tables.view
        num_columns = max(len(chunk.sequence.blocks) for chunk in chunks)
        num_tokens = num_outputs = 0
        has_sides = has_forks = is_again = False
        for b, chunk in enumerate(chunks):
            sequence, start, length = chunk.sequence, chunk.start, chunk.num_tokens
            end = num_tokens + length
            if length == 1:
                token_ids[num_tokens] = sequence.token_ids[start]
                positions[num_tokens] = start
            else:
                token_ids[num_tokens:end] = sequence.token_ids[start : start + length]
                positions[num_tokens:end] = count_up[start : start + length]
            if chunk.num_logits == 1:
                output_rows[num_outputs] = end - 1
            else:
                first = end - chunk.num_logits
                output_rows[num_outputs : num_outputs + chunk.num_logits] = count_up[first:end]
            num_outputs += chunk.num_logits
            num_tokens = end
            query_starts[b + 1] = end
            context_lens[b] = start + length
            blocks = sequence.blocks
            column = b * num_columns
            block_tables[column : column + len(blocks)] = blocks
            if sequence.sides:
                has_sides = True
            if sequence.adapter is not None and sequence.adapter.fork is not None:
                has_forks = True
            if start < sequence.write_start:
                is_again = True
        if not has_sides:
            self._sides.forget()
        if not has_forks:
            self._forks.forget()
        num_rows = len(chunks)
        return PackedBatch(
            token_ids=self._token_ids.head(num_tokens),
            positions=self._positions.head(num_tokens),
            query_starts=self._query_starts.head(num_rows + 1),
            context_lens=self._context_lens.head(num_rows),
            block_tables=self._block_tables.head(num_rows, num_columns),
            output_rows=self._output_rows.head(num_outputs),
            write_starts=self._pack_write_starts(chunks) if is_again else None,
            side=self._sides.pack(chunks, num_columns) if has_sides else None,
            forks=self._forks.pack(chunks) if has_forks else None,
        )

    def forget(self) -> None:
        """Hold no side network any more, so that one that left is freed."""
        self._sides.forget()
        self._forks.forget()

    def _pack_write_starts(self, chunks: list[Chunk]) -> Tensor:
        for b, chunk in enumerate(chunks):
            self._write_starts.view[b] = chunk.sequence.write_start
        return self._write_starts.head(len(chunks))


class SidePacker:
    """Builds side batches in buffers that every step overwrites.

    Attributes:
        streams: of the latest batch.
    """

    def __init__(
        self, num_streams: int, max_blocks: int, side_cache: Callable[[AttachedSide], KVCache]
    ) -> None:
        """Allocate the buffers.

        Args:
            num_streams: side networks in a batch, usually; more make the buffers grow.
            max_blocks: blocks in a sequence at most.
            side_cache: gives the cache of a side network.
        """
        self._max_blocks = max_blocks
        self._side_cache = side_cache
        self._allocate(num_streams)
        self.start([])

    def pack(self, chunks: list[Chunk], num_columns: int) -> SideBatch:
        """Lay out the side networks of a step.

        Args:
            chunks: of which at least one has side networks.
            num_columns: most blocks that a sequence has.
        """
        streams = [side for chunk in chunks for side in chunk.sequence.sides]
        if streams != self.streams:
            self.start(streams)
        sequences, block_tables = self._sequences.view, self._block_tables.view
        row = column = 0
        for b, chunk in enumerate(chunks):
            for side in chunk.sequence.sides:
                sequences[row] = b
                block_tables[column : column + len(side.blocks)] = side.blocks
                row += 1
                column += num_columns
        return SideBatch(
            networks=self._networks,
            caches=self._caches,
            sequences=self._sequences.head(row),
            block_tables=self._block_tables.head(row, num_columns),
            write_starts=self._write_starts,
            scales=self._scales,
        )

    def forget(self) -> None:
        """Hold no side network any more."""
        if self.streams:
            self.start([])

    def start(self, streams: list[SideStream]) -> None:
        """Prepare what stays as it is while the same streams run."""
        if len(streams) > len(self._sequences.view):
            self._allocate(len(streams))
        for side in streams:
            if side.cache is None:
                assert side.adapter.side is not None
                side.cache = self._side_cache(side.adapter.side)
        self.streams = streams
        networks = (side.adapter.side for side in streams)
        self._networks = tuple(network for network in networks if network is not None)
        self._caches = tuple(side.cache for side in streams if side.cache is not None)
        self._write_starts = torch.tensor([side.start for side in streams], dtype=torch.int32)
        self._scales = torch.tensor([side.scale for side in streams], dtype=torch.float32)

    def _allocate(self, num_streams: int) -> None:
        self._sequences = _Buffer(num_streams)
        self._block_tables = _Buffer(num_streams * self._max_blocks)


class ForkPacker:
    """Builds fork batches in buffers that every step overwrites."""

    def __init__(self, num_outputs: int) -> None:
        """Allocate the buffers for so many output rows."""
        self._outputs, self._sequences = _Buffer(num_outputs), _Buffer(num_outputs)
        self._held: list[tuple[AttachedFork, float]] = []
        self._networks: tuple[AttachedFork, ...] = ()
        self._scales = torch.empty(0)

    def pack(self, chunks: list[Chunk]) -> ForkBatch | None:
        """Lay out the forks of a step; None if they have no part in its logits."""
        outputs, sequences = self._outputs.view, self._sequences.view
        held: list[tuple[AttachedFork, float]] = []
        output = 0
        for b, chunk in enumerate(chunks):
            adapter = chunk.sequence.adapter
            if adapter is not None and adapter.fork is not None:
                for i in range(output, output + chunk.num_logits):
                    outputs[len(held)], sequences[len(held)] = i, b
                    held.append((adapter.fork, chunk.sequence.adapter_scale))
            output += chunk.num_logits
        if held != self._held:
            self._held = held
            self._networks = tuple(fork for fork, _ in held)
            self._scales = torch.tensor([scale for _, scale in held], dtype=torch.float32)
        if not held:
            return None
        return ForkBatch(
            networks=self._networks, outputs=self._outputs.head(len(held)),
            sequences=self._sequences.head(len(held)), scales=self._scales,
        )  # fmt: skip

    def forget(self) -> None:
        """Hold no fork any more."""
        if self._held:
            self._held, self._networks = [], ()
