"""Run a program with the native CPU kernels: one call for a whole step.

The threads of the extension walk the operations together, so Python costs microseconds a step.
Every row is computed in one fixed order whatever else is in the batch: a batch gives the same
bits as its rows alone, and a prompt in chunks the same bits as the prompt whole.
"""

import ctypes
import functools
import os
import weakref
from pathlib import Path

import torch
from torch import Tensor

from models.batch import PackedBatch
from models.kernels.memory import lazy_zeros, on_huge_pages
from models.kernels.native_program import (
    ACTIVATIONS,
    OP_KINDS,
    PROLOGUES,
    NativeOp,
    NativePiece,
    NativeStep,
    load_library,
)
from models.kernels.panels import float_format, kernel_group, pack
from models.kv_cache import KVCache
from models.program import LOGITS, Activate, AttentionOp, EmbedOp, LinearOp, Norm, Piece, Program
from models.spec import DecoderSpec

_LIBRARY_PATH = Path(__file__).with_name("_native.so")
BLOCK_SIZE = 16


@functools.cache
def _library() -> ctypes.CDLL | None:
    return load_library(str(_LIBRARY_PATH)) if _LIBRARY_PATH.exists() else None


def is_native_available(kernels: str) -> bool:
    """Whether the extension is built and this processor runs "auto", "avx2" or "avx512"."""
    library = _library()
    return library is not None and library.proa_kernels_name(kernels.encode()) != b""


class NativeExecutor:
    """Executor over the native extension.

    Args:
        program: what to run.
        kernels: "auto" (the best this processor has), "avx2" or "avx512".
        num_threads: None: one for each core this process may use.

    Raises:
        ValueError: the extension is not built or lacks these kernels.
    """

    def __init__(
        self, program: Program, *, kernels: str = "auto", num_threads: int | None = None
    ) -> None:
        library = _library()
        if library is None or not is_native_available(kernels):
            raise ValueError(f"native kernels {kernels!r} are not available on this machine")
        self.name = f"native-{library.proa_kernels_name(kernels.encode()).decode()}"
        self._library = library
        self._program = program
        self._keep: list[object] = []
        self._buffers = {name: i for i, name in enumerate(program.widths)}
        self._inv_freq = program.inv_freq.contiguous()
        ops: list[NativeOp] = []
        for op in program.ops:
            if isinstance(op, EmbedOp):
                ops.append(self._lower_embed(op))
            elif isinstance(op, LinearOp):
                ops += self._lower_linear(op)
            elif isinstance(op, AttentionOp):
                ops.append(self._lower_attention(op))
            else:
                src = self._buffers[op.src]
                ops.append(NativeOp(kind=OP_KINDS["tap"], src=src, layer=op.layer))
        threads = num_threads or len(os.sched_getaffinity(0))
        widths = torch.tensor(list(program.widths.values()), dtype=torch.int32)
        pool = library.proa_pool_create(threads)
        self._handle = library.proa_program_create(
            (NativeOp * len(ops))(*ops), len(ops), widths.data_ptr(), len(widths), pool,
            kernels.encode(),
        )  # fmt: skip
        weakref.finalize(self, _destroy, library, self._handle, pool)

    def make_cache(
        self, spec: DecoderSpec, num_blocks: int, block_size: int, dtype: torch.dtype
    ) -> KVCache:
        """Return an empty cache: keys (N, K, E, 16), values (N, K, 16, E).

        Raises:
            ValueError: a block size or dtype the kernels do not read.
        """
        if block_size != BLOCK_SIZE:
            raise ValueError(
                f"block_size must be {BLOCK_SIZE} for native kernels, not {block_size}"
            )
        if dtype not in (torch.float16, torch.float32):
            raise ValueError(f"cache dtype must be float16 or float32 on the CPU, not {dtype}")
        shapes = [(num_blocks, x.num_key_value_heads, x.head_dim, block_size) for x in spec.layers]
        keys = [lazy_zeros(n, k, e, b, dtype=dtype) for n, k, e, b in shapes]
        values = [lazy_zeros(n, k, b, e, dtype=dtype) for n, k, e, b in shapes]
        return KVCache(keys=keys, values=values, num_blocks=num_blocks, block_size=block_size)

    def forward(self, batch: PackedBatch, cache: KVCache, taps: Tensor | None = None) -> Tensor:
        """Run one step; see `Decoder.forward`."""
        num_outputs = len(batch.output_rows)
        logits = torch.empty(num_outputs, self._program.vocab_size)
        layers = self._program.num_layers
        keys = (ctypes.c_void_p * layers)(*(t.data_ptr() for t in cache.keys))
        values = (ctypes.c_void_p * layers)(*(t.data_ptr() for t in cache.values))
        step = NativeStep(
            token_ids=batch.token_ids.data_ptr(),
            positions=batch.positions.data_ptr(),
            query_starts=batch.query_starts.data_ptr(),
            context_lens=batch.context_lens.data_ptr(),
            block_tables=batch.block_tables.data_ptr(),
            output_rows=batch.output_rows.data_ptr(),
            k_cache=ctypes.addressof(keys),
            v_cache=ctypes.addressof(values),
            inv_freq=self._inv_freq.data_ptr(),
            logits=logits.data_ptr(),
            taps=None if taps is None else taps.data_ptr(),
            num_tokens=len(batch.token_ids),
            num_sequences=len(batch.context_lens),
            num_outputs=num_outputs,
            block_table_stride=batch.block_tables.stride(0),
            cache_format=float_format(cache.keys[0].dtype),
            rotary_scale=self._program.rotary_scale,
        )
        self._library.proa_program_run(self._handle, ctypes.byref(step))
        return logits

    def _pointer(self, tensor: Tensor | None) -> int | None:
        """Keep a copy of a tensor, free of the file it may be mapped from; return its address."""
        if tensor is None:
            return None
        tensor = on_huge_pages(tensor)
        self._keep.append(tensor)
        return tensor.data_ptr()

    def _lower_embed(self, op: EmbedOp) -> NativeOp:
        native = NativeOp(kind=OP_KINDS["embed"], dst=self._buffers[op.dst])
        native.table = self._pointer(op.table)
        native.table_format = float_format(op.table.dtype)
        if op.positions_table is not None:
            native.position_table = self._pointer(op.positions_table)
            native.position_format = float_format(op.positions_table.dtype)
            native.position_offset = op.positions_offset
        return native

    def _lower_linear(self, op: LinearOp) -> list[NativeOp]:
        """Make one native operation for each input format among the pieces."""
        groups = sorted({kernel_group(piece.weight) for piece in op.pieces})
        return [
            self._lower_pieces(op, [p for p in op.pieces if kernel_group(p.weight) == group], group)
            for group in groups
        ]

    def _lower_pieces(self, op: LinearOp, pieces: list[Piece], group: int) -> NativeOp:
        lowered = []
        for piece in pieces:
            panels = pack(piece.weight, self._library)
            lowered.append(
                NativePiece(
                    data=self._pointer(panels.data),
                    bias=self._pointer(piece.bias),
                    codebook=self._pointer(panels.codebook),
                    format=panels.format,
                    outputs=panels.outputs,
                    dst_offset=piece.offset,
                )
            )
        array = (NativePiece * len(lowered))(*lowered)
        self._keep.append(array)
        native = NativeOp(
            kind=OP_KINDS["linear"],
            pieces=ctypes.addressof(array),
            num_pieces=len(lowered),
            group=group,
            src=self._buffers[op.src],
            dst=-1 if op.dst == LOGITS else self._buffers[op.dst],
            inputs=op.in_features,
            accumulate=op.accumulate,
            select_rows=op.selects_rows,
            scatter=self._pointer(op.scatter),
        )
        if isinstance(op.prologue, Norm):
            kind = "rms_norm" if op.prologue.bias is None else "layer_norm"
            native.prologue = PROLOGUES[kind]
            native.norm_weight = self._pointer(op.prologue.weight)
            native.norm_bias = self._pointer(op.prologue.bias)
            native.norm_width = len(op.prologue.weight)
            native.gather = self._pointer(op.prologue.indices)
            native.eps = op.prologue.eps
        elif isinstance(op.prologue, Activate):
            kind = "gated_activation" if op.prologue.is_gated else "activation"
            native.prologue = PROLOGUES[kind]
            native.activation = ACTIVATIONS[op.prologue.kind]
        return native

    def _lower_attention(self, op: AttentionOp) -> NativeOp:
        return NativeOp(
            kind=OP_KINDS["attention"],
            src=self._buffers[op.src],
            dst=self._buffers[op.dst],
            layer=op.layer,
            num_heads=op.num_heads,
            num_kv_heads=op.num_kv_heads,
            head_dim=op.head_dim,
            rotary_dim=op.rotary_dim,
            q_norm=self._pointer(op.q_norm),
            k_norm=self._pointer(op.k_norm),
            eps=op.eps,
            scale=op.scale,
        )


def _destroy(library: ctypes.CDLL, program: int, pool: int) -> None:
    library.proa_program_destroy(program)
    library.proa_pool_destroy(pool)
