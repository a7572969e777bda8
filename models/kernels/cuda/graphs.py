"""Decode steps captured as CUDA graphs.

A graph holds addresses, not tensors: of the program's weights, of a cache, and of memory from a
pool for what it computes on the way. So three things are seen to here:

- A graph is kept by its executor for as long as the cache lives: the cache itself is the key, held
  weakly. Neither a cache that is gone nor another one at its address ever meets a graph of it.
- The graphs of an executor and of its variants share one pool. What a replay leaves there is copied
  out before the next one is launched; nothing else is carried from one replay to another.
- While a step is captured no other thread allocates or copies; see `Recorder`.
"""

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.batch import PackedBatch
from models.kernels.reference.operations import Linear, run_program
from models.kv_cache import KVCache
from models.program import AttentionOp, Program


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Recording:
    """A captured step.

    Attributes:
        graph: computes it again from what its inputs hold by then.
        output: what the step returned; the next replay of any graph of the pool may overwrite it.
    """

    graph: torch.cuda.CUDAGraph
    output: Tensor


class Recorder:
    """Captures steps on one device, into memory that all of them share.

    Adapters and variants attach on threads of their own while the engine's thread captures. In
    CUDA's default mode ("global") a cudaMalloc there fails, and the capture with it; and one that
    finds no memory makes the allocator wait for the device, which no mode allows while a capture
    runs. So captures are in mode "thread_local", for whatever else the process does, and what
    allocates through an executor holds `lock`, which a capture takes.

    Attributes:
        lock: held while a step is captured; hold it to allocate or copy on the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.lock = threading.Lock()
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._recordings: weakref.WeakSet[Recording] = weakref.WeakSet()

    def record(self, step: Callable[[], Tensor]) -> Recording:
        """Run a step twice, then capture it.

        Args:
            step: launches work on the current stream only, and waits for none of it.
        """
        with self.lock, torch.cuda.device(self._device), torch.inference_mode():
            # One stream for all: memory of a pool is reused on the stream that it was taken on.
            stream = self._stream = self._stream or torch.cuda.Stream(self._device)
            current = torch.cuda.current_stream(self._device)
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(2):  # lets libraries choose kernels and allocate before the capture
                    step()
            current.wait_stream(stream)
            # A pool is gone with its last graph, and its handle must not be used again; so it is
            # taken from a graph that is held meanwhile.
            sibling = next(iter(self._recordings), None)
            pool = None if sibling is None else sibling.graph.pool()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph, pool=pool, stream=stream, capture_error_mode="thread_local"
            ):
                output = step()
            recording = Recording(graph, output)
            self._recordings.add(recording)
        return recording


class DecodeGraphs:
    """The decode steps of a program: captured for each cache and padded shape, and replayed.

    Args:
        program: on the device.
        linear: multiplies rows with its matrices.
        recorder: captures.
    """

    def __init__(self, program: Program, linear: Linear, recorder: Recorder) -> None:
        self._program = program
        self._linear = linear
        self._recorder = recorder
        self._graphs: weakref.WeakKeyDictionary[KVCache, dict[tuple[int, int], _DecodeGraph]] = (
            weakref.WeakKeyDictionary()
        )

    def run(self, batch: PackedBatch, cache: KVCache) -> Tensor:
        """Compute a step with one token for each sequence, all of whose logits are wanted.

        Args:
            batch: the step's tokens, without side networks.
            cache: has a block more than it says, for what padding rows write.

        Returns:
            (B, V) float32 logits, a new tensor.
        """
        rows = _next_power_of_two(len(batch.token_ids))
        needed = -(-int(batch.context_lens.max()) // cache.block_size)
        shape = (rows, _next_power_of_two(needed))
        graphs = self._graphs.setdefault(cache, {})
        if shape not in graphs:
            graphs[shape] = self._capture(cache, *shape)
        return graphs[shape].replay(batch)

    def _capture(self, cache: KVCache, rows: int, blocks: int) -> "_DecodeGraph":
        device = cache.keys[0].device
        with torch.inference_mode(False):  # else they could not be written outside of it
            token_ids, positions = torch.zeros(2, rows, dtype=torch.long, device=device)
            tables = torch.full((rows, blocks), cache.num_blocks, device=device)
            all_rows = torch.arange(rows, device=device)

        def attend(op: AttentionOp, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend_decode(op, q, k, v, positions, tables, cache)

        def step() -> Tensor:
            return run_program(
                self._program, token_ids, positions, all_rows, attend=attend, linear=self._linear
            )

        return _DecodeGraph(
            recording=self._recorder.record(step), token_ids=token_ids, positions=positions,
            block_tables=tables, all_rows=all_rows, block_size=cache.block_size,
            spare_block=cache.num_blocks,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class _DecodeGraph:
    """A captured decode step and the tensors that it reads; it does not hold the cache."""

    recording: Recording
    token_ids: Tensor
    positions: Tensor
    block_tables: Tensor
    all_rows: Tensor
    block_size: int
    spare_block: int

    def replay(self, batch: PackedBatch) -> Tensor:
        count = len(batch.token_ids)
        width = min(batch.block_tables.shape[1], self.block_tables.shape[1])
        firsts = torch.arange(0, width * self.block_size, self.block_size)
        is_used = firsts < batch.context_lens[:, None]
        tables = torch.where(is_used, batch.block_tables[:, :width], self.spare_block)
        self.token_ids.zero_()
        self.positions.zero_()
        self.block_tables.fill_(self.spare_block)
        self.token_ids[:count].copy_(batch.token_ids, non_blocking=True)
        self.positions[:count].copy_(batch.positions, non_blocking=True)
        self.block_tables[:count, :width].copy_(tables, non_blocking=True)
        self.recording.graph.replay()
        return self.recording.output[:count].clone()


def attend_decode(
    op: AttentionOp, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, tables: Tensor,
    cache: KVCache,
) -> Tensor:  # fmt: skip
    """Attend one token of each sequence to its blocks; no value leaves the device.

    Args:
        q: (B, H, E); k, v: (B, K, E).
        positions: (B,) of the tokens.
        tables: (B, M) block ids.

    Returns:
        (B, H * E) float32.
    """
    keys, values = cache.keys[op.layer], cache.values[op.layer]
    block = tables.gather(1, (positions // cache.block_size)[:, None])[:, 0]
    offset = positions % cache.block_size
    keys.index_put_((block, offset), k.to(keys.dtype))
    values.index_put_((block, offset), v.to(values.dtype))
    places = torch.arange(tables.shape[1] * cache.block_size, device=q.device)
    mask = places <= positions[:, None]
    # What lies past the context is another sequence's, which may have overflowed.
    seen_k, seen_v = (
        stored[tables].flatten(1, 2).masked_fill(~mask[:, :, None, None], 0).transpose(1, 2)
        for stored in (keys, values)
    )
    out = F.scaled_dot_product_attention(
        q[:, :, None].to(keys.dtype), seen_k, seen_v, attn_mask=mask[:, None, None],
        scale=op.scale, enable_gqa=True,
    )  # fmt: skip
    return out.float().flatten(1)


def _next_power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
