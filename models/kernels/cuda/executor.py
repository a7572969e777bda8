"""Run a program on a CUDA device: bitsandbytes' 4-bit matmul, SDPA, and graphs for decode steps.

A step with one token for each sequence is captured once for each padded batch shape and replayed,
so that launching its kernels costs one call. Other steps run operation by operation.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from bitsandbytes.functional import QuantState
from torch import Tensor

from models.batch import PackedBatch
from models.kernels.reference.executor import (
    attach_plain,
    count_bytes,
    forward_batch,
    make_plain_cache,
    map_tensors,
    walk_whole_sequences,
)
from models.kernels.reference.operations import Linear, apply_head, apply_prologue, run_program
from models.kv_cache import KVCache
from models.program import AttentionOp, EmbedOp, LinearOp, Piece, Program
from models.quantization import NF4_CODEBOOK
from models.side import AttachedSide, SideProgram
from models.spec import DecoderSpec
from models.weights import Matrix, Quantized4Bit, dense

Copies: TypeAlias = tuple[tuple[object, object], ...]


class CudaExecutor:
    """Executor on one CUDA device.

    Args:
        program: what to run; its tensors are copied to the device.
        device: "cuda" or "cuda:N".
        compute_dtype: of the matmuls' operands; sums, norms and the residual stream are float32.
        base: its embedding and LM head are used if this program has the same.

    Attributes:
        num_bytes: see `Decoder.num_bytes`.
    """

    name = "cuda"

    def __init__(
        self,
        program: Program,
        device: str,
        compute_dtype: torch.dtype = torch.bfloat16,
        *,
        base: "CudaExecutor | None" = None,
    ) -> None:
        self._device = torch.device(device)
        self._dtype = compute_dtype
        known = () if base is None else base._ends
        self._program = place_program(program, self._device, compute_dtype, known)
        ends = zip(program.head.pieces, self._program.head.pieces, strict=True)
        self._ends: Copies = ((program.ops[0], self._program.ops[0]), *ends)
        self.num_bytes = count_bytes(self._program, None if base is None else base._program)
        self._states = {
            id(piece.weight): _quant_state(piece.weight, compute_dtype)
            for op in self._program.ops
            if isinstance(op, LinearOp)
            for piece in op.pieces
            if isinstance(piece.weight, Quantized4Bit)
        }
        self._graphs: dict[tuple[int, int, int], _DecodeGraph] = {}

    def make_cache(
        self, spec: DecoderSpec, num_blocks: int, block_size: int, dtype: torch.dtype
    ) -> KVCache:
        """Return an empty cache; one block more than asked for takes what padding rows write."""
        cache = make_plain_cache(spec, num_blocks + 1, block_size, dtype, self._device)
        return dataclasses.replace(cache, num_blocks=num_blocks)

    def forward(self, batch: PackedBatch, cache: KVCache, taps: Tensor | None = None) -> Tensor:
        """Run one step; see `Decoder.forward`."""
        is_decode = len(batch.token_ids) == len(batch.context_lens) == len(batch.output_rows)
        is_plain = batch.side is None and batch.write_starts is None
        if is_decode and taps is None and is_plain:
            return self._graph(batch, cache).replay(batch)
        return forward_batch(
            self._program, batch, cache, device=self._device, taps=taps, linear=self._linear
        )

    def hidden_states(self, batch: PackedBatch) -> Iterator[Tensor]:
        """See `Decoder.hidden_states`."""
        return walk_whole_sequences(self._program, batch, device=self._device, linear=self._linear)

    def apply_final_norm(self, states: Tensor) -> Tensor:
        """See `Decoder.apply_final_norm`."""
        return apply_prologue(self._program.head, states)

    def apply_head(self, states: Tensor) -> Tensor:
        """See `Decoder.logits`."""
        return apply_head(self._program, states, linear=self._linear)

    def attach(self, program: SideProgram) -> AttachedSide:
        """See `Decoder.attach`; a side network is computed in float32."""
        return attach_plain(program, self._device)

    def _linear(self, x: Tensor, weight: Matrix) -> Tensor:
        x = x.to(self._dtype)
        if isinstance(weight, Quantized4Bit):
            packed, state = weight.packed.view(-1, 1), self._states[id(weight)]
            return bnb.matmul_4bit(x, packed.t(), quant_state=state).float()
        assert isinstance(weight, Tensor)
        return F.linear(x, weight).float()

    def _graph(self, batch: PackedBatch, cache: KVCache) -> "_DecodeGraph":
        rows = _next_power_of_two(len(batch.token_ids))
        needed = -(-int(batch.context_lens.max()) // cache.block_size)
        blocks = _next_power_of_two(needed)
        key = (id(cache), rows, blocks)
        if key not in self._graphs:
            self._graphs[key] = _capture(self._program, self._linear, cache, rows, blocks)
        return self._graphs[key]


@dataclass(frozen=True, kw_only=True, slots=True)
class _DecodeGraph:
    """A captured decode step and the tensors it reads and writes."""

    graph: torch.cuda.CUDAGraph
    token_ids: Tensor
    positions: Tensor
    block_tables: Tensor
    logits: Tensor
    spare_block: int

    def replay(self, batch: PackedBatch) -> Tensor:
        count = len(batch.token_ids)
        width = min(batch.block_tables.shape[1], self.block_tables.shape[1])
        self.token_ids.zero_()
        self.positions.zero_()
        self.block_tables.fill_(self.spare_block)
        self.token_ids[:count].copy_(batch.token_ids, non_blocking=True)
        self.positions[:count].copy_(batch.positions, non_blocking=True)
        self.block_tables[:count, :width].copy_(batch.block_tables[:, :width], non_blocking=True)
        self.graph.replay()
        return self.logits[:count].clone()


def _capture(
    program: Program, linear: Linear, cache: KVCache, rows: int, blocks: int
) -> _DecodeGraph:
    device = cache.keys[0].device
    token_ids = torch.zeros(rows, dtype=torch.long, device=device)
    positions = torch.zeros(rows, dtype=torch.long, device=device)
    tables = torch.full((rows, blocks), cache.num_blocks, dtype=torch.long, device=device)
    all_rows = torch.arange(rows, device=device)

    def attend(op: AttentionOp, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_decode(op, q, k, v, positions, tables, cache)

    def step() -> Tensor:
        return run_program(program, token_ids, positions, all_rows, attend=attend, linear=linear)

    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream), torch.inference_mode():
        for _ in range(2):  # lets libraries choose kernels and allocate before the capture
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.inference_mode():
        logits = step()
    return _DecodeGraph(
        graph=graph, token_ids=token_ids, positions=positions, block_tables=tables, logits=logits,
        spare_block=cache.num_blocks,
    )  # fmt: skip


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
    seen_k = keys[tables].flatten(1, 2).transpose(1, 2)
    seen_v = values[tables].flatten(1, 2).transpose(1, 2)
    mask = torch.arange(seen_k.shape[2], device=q.device) <= positions[:, None]
    out = F.scaled_dot_product_attention(
        q[:, :, None].to(keys.dtype), seen_k, seen_v, attn_mask=mask[:, None, None],
        scale=op.scale, enable_gqa=True,
    )  # fmt: skip
    return out.float().flatten(1)


def _next_power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _quant_state(weight: Quantized4Bit, dtype: torch.dtype) -> QuantState:
    is_nf4 = torch.allclose(weight.codebook.cpu(), torch.tensor(NF4_CODEBOOK), atol=1e-4)
    return QuantState(
        absmax=weight.absmax, shape=torch.Size(weight.shape), code=weight.codebook,
        blocksize=weight.block_size, quant_type="nf4" if is_nf4 else "fp4", dtype=dtype,
    )  # fmt: skip


def place_program(
    program: Program, device: torch.device, dtype: torch.dtype, known: Copies = ()
) -> Program:
    """Copy a program to a device; matrices that are not 4-bit become dense ones of `dtype`.

    Args:
        program: on the CPU.
        device, dtype: where to and as what.
        known: operations and pieces that have been copied, with their copies.
    """

    def make_dense(item: object) -> object | None:
        for source, copy in known:
            if _is_same(item, source):
                return copy
        if not isinstance(item, Piece) or isinstance(item.weight, Quantized4Bit):
            return None
        matrix = dense(item.weight).to(device, dtype)
        bias = None if item.bias is None else item.bias.to(device)
        return Piece(weight=matrix, bias=bias, offset=item.offset)

    moved = map_tensors(program, lambda tensor: tensor.to(device), make_dense)
    assert isinstance(moved, Program)
    return moved


def _is_same(item: object, source: object) -> bool:
    """Tell whether two embeddings or pieces hold the same tensors."""
    if isinstance(item, EmbedOp) and isinstance(source, EmbedOp):
        return item.table is source.table and item.positions_table is source.positions_table
    if isinstance(item, Piece) and isinstance(source, Piece):
        return item.weight is source.weight and item.bias is source.bias
    return False
