"""Run a program on a CUDA device: bitsandbytes' 4-bit matmul, SDPA, and graphs for decode steps.

Right, for one GPU, and not tuned. A step with one token for each sequence and no side network is
captured as a graph (`graphs.py`); attention in it gathers every row's keys and values padded to the
longest. Other steps run operation by operation, with a loop in Python over the sequences and over
their side networks.
"""

import dataclasses
from collections.abc import Iterator
from typing import TypeAlias

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from torch import Tensor

from models.batch import PackedBatch
from models.fork import AttachedFork, ForkProgram
from models.kernels.cuda.four_bit import quant_state
from models.kernels.cuda.graphs import DecodeGraphs, Recorder
from models.kernels.plain_cache import make_plain_cache
from models.kernels.reference.executor import (
    attach_plain,
    attach_plain_fork,
    forward_batch,
    walk_whole_sequences,
)
from models.kernels.reference.operations import Linear, apply_head, apply_prologue
from models.kernels.tensors import count_bytes, map_tensors
from models.kv_cache import KVCache
from models.program import EmbedOp, LinearOp, Piece, Program
from models.side import AttachedSide, SideProgram
from models.spec import DecoderSpec
from models.weights import Matrix, Quantized4Bit, QuantizedBlocks, dense

Copies: TypeAlias = tuple[tuple[object, object], ...]


class CudaExecutor:
    """Executor on one CUDA device.

    Args:
        program: what to run; its tensors are copied to the device.
        device: "cuda" or "cuda:N".
        compute_dtype: of the matmuls' operands; sums, norms and the residual stream are float32.
        base: its embedding and LM head are used if this program has the same, and the memory of
            its graphs; steps of the two must not run at the same time.

    Attributes:
        program: what it runs.
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
        self._recorder: Recorder = Recorder(self._device) if base is None else base._recorder
        known = () if base is None else base._ends
        with self._recorder.lock:
            self.program = place_program(program, self._device, compute_dtype, known)
            self._linear = _make_linear(self.program, compute_dtype)
        ends = zip(program.head.pieces, self.program.head.pieces, strict=True)
        self._ends: Copies = ((program.ops[0], self.program.ops[0]), *ends)
        self.num_bytes = count_bytes(self.program, None if base is None else base.program)
        self._graphs = DecodeGraphs(self.program, self._linear, self._recorder)

    def make_cache(
        self, spec: DecoderSpec, num_blocks: int, block_size: int, dtype: torch.dtype
    ) -> KVCache:
        """Return an empty cache; one block more than asked for takes what padding rows write.

        Raises:
            ValueError: int8, which is computed on the CPU only.
        """
        if dtype == torch.int8:
            raise ValueError("cache dtype must be float16 or float32 on CUDA, not torch.int8")
        with self._recorder.lock:
            cache = make_plain_cache(spec, num_blocks + 1, block_size, dtype, self._device)
        return dataclasses.replace(cache, num_blocks=num_blocks)

    def forward(
        self,
        batch: PackedBatch,
        cache: KVCache,
        taps: Tensor | None = None,
        states: Tensor | None = None,
    ) -> Tensor:
        """Run one step; see `Decoder.forward`."""
        is_decode = len(batch.token_ids) == len(batch.context_lens) == len(batch.output_rows)
        has_sides = batch.side is not None or batch.forks is not None
        is_plain = not has_sides and batch.write_starts is None
        if is_decode and taps is None and states is None and is_plain:
            return self._graphs.run(batch, cache)
        return forward_batch(
            self.program, batch, cache, device=self._device, taps=taps, states=states,
            linear=self._linear,
        )  # fmt: skip

    def hidden_states(self, batch: PackedBatch) -> Iterator[Tensor]:
        """See `Decoder.hidden_states`."""
        return walk_whole_sequences(self.program, batch, device=self._device, linear=self._linear)

    def apply_final_norm(self, states: Tensor) -> Tensor:
        """See `Decoder.apply_final_norm`."""
        return apply_prologue(self.program.head, states)

    def apply_head(self, states: Tensor) -> Tensor:
        """See `Decoder.logits`."""
        return apply_head(self.program, states, linear=self._linear)

    def attach(self, program: SideProgram) -> AttachedSide:
        """See `Decoder.attach`; a side network is computed in float32. Any thread may attach."""
        with self._recorder.lock:
            return attach_plain(program, self._device)

    def attach_fork(self, program: ForkProgram) -> AttachedFork:
        """See `Decoder.attach`; the differences are computed in float32. Any thread may attach."""
        with self._recorder.lock:
            return attach_plain_fork(program, self._device)


def _make_linear(program: Program, dtype: torch.dtype) -> Linear:
    """Return what multiplies float32 rows with the program's matrices, in `dtype`."""
    states = {
        id(piece.weight): quant_state(piece.weight, dtype)
        for op in program.ops
        if isinstance(op, LinearOp)
        for piece in op.pieces
        if isinstance(piece.weight, Quantized4Bit)
    }

    def linear(x: Tensor, weight: Matrix) -> Tensor:
        x = x.to(dtype)
        if isinstance(weight, Quantized4Bit):
            packed, state = weight.packed.view(-1, 1), states[id(weight)]
            return bnb.matmul_4bit(x, packed.t(), quant_state=state).float()
        assert isinstance(weight, Tensor)
        return F.linear(x, weight).float()

    return linear


def place_program(
    program: Program, device: torch.device, dtype: torch.dtype, known: Copies = ()
) -> Program:
    """Copy a program to a device; matrices become dense ones of `dtype`, each one once.

    `Quantized4Bit` matrices stay as they are, and so do dense tables.

    Args:
        program: on the CPU.
        device, dtype: where to and as what.
        known: operations and pieces that have been copied, with their copies.
    """

    placed: dict[int, Tensor] = {}

    def place(matrix: Matrix) -> Tensor:
        if id(matrix) not in placed:
            placed[id(matrix)] = dense(matrix).to(device, dtype)
        return placed[id(matrix)]

    def make_dense(item: object) -> object | None:
        for source, copy in known:
            if _is_same(item, source):
                return copy
        if isinstance(item, EmbedOp) and isinstance(item.table, QuantizedBlocks):
            positions = item.positions_table
            return dataclasses.replace(
                item, table=place(item.table),
                positions_table=None if positions is None else positions.to(device),
            )  # fmt: skip
        if not isinstance(item, Piece) or isinstance(item.weight, Quantized4Bit):
            return None
        matrix = place(item.weight)
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
