"""Run a program with the native CPU kernels: one call for a whole step.

The threads of the extension walk the operations together, so Python costs microseconds a step.
Every row is computed in one fixed order whatever else is in the batch: a batch gives the same
bits as its rows alone, and a prompt in chunks the same bits as the prompt whole.
"""

import ctypes
import dataclasses
import os
import weakref
from collections.abc import Callable, Iterator
from itertools import accumulate

import torch
from torch import Tensor

from models.batch import PackedBatch
from models.fork import AttachedFork, ForkProgram
from models.kernels.native.fork import ForkEntries, lower_fork
from models.kernels.native.library import native_library
from models.kernels.native.lowering import Lowering
from models.kernels.native.memory import lazy_zeros
from models.kernels.native.picker import NativePicker
from models.kernels.native.side import SideEntries, lower_side
from models.kernels.native.structs import CACHE_FORMATS, OP_KINDS, PANEL, NativeOp, NativeStep
from models.kernels.native.threads import ThreadPool
from models.kernels.reference.operations import apply_prologue
from models.kv_cache import KVCache, head_bytes
from models.program import AttentionOp, Program
from models.side import AttachedSide, SideProgram
from models.spec import DecoderSpec

BLOCK_SIZE = 16


def is_native_available(kernels: str) -> bool:
    """Whether the library is built and this processor runs "auto" or a set of instructions.

    Raises:
        NativeLibraryError: the library was not built for this code.
    """
    library = native_library()
    return library is not None and library.proa_kernels_name(kernels.encode()) != b""


class NativeExecutor:
    """Executor over the native extension.

    Args:
        program: what to run.
        kernels: "auto" (the fastest here, measured once a process), "avx2", "avxvnni" or
            "avx512".
        num_threads: None: one for each core this process may use.
        base: its threads are used, and what it made of tensors and matrices that this program has
            too; the two must not run at the same time.

    Raises:
        ValueError: the extension is not built or lacks these kernels.
    """

    def __init__(
        self,
        program: Program,
        *,
        kernels: str = "auto",
        num_threads: int | None = None,
        base: "NativeExecutor | None" = None,
    ) -> None:
        library = native_library()
        if library is None or not is_native_available(kernels):
            raise ValueError(f"native kernels {kernels!r} are not available on this machine")
        self._kernels: str = library.proa_kernels_name(kernels.encode()).decode()
        self.name = f"native-{self._kernels}"
        self._library = library
        self.program = program
        lowered_base = None if base is None else base._lowering
        self._lowering: Lowering = Lowering(library, program.widths, base=lowered_base)
        self._inv_freq = program.inv_freq.contiguous()
        self._side_entries, self._fork_entries = SideEntries(), ForkEntries()
        ops = self._lowering.lower(program.ops)
        kinds = [op.kind for op in ops]
        self._num_ops = len(ops)
        self._after_taps = [i + 1 for i, kind in enumerate(kinds) if kind == OP_KINDS["tap"]]
        widths = torch.tensor(list(program.widths.values()), dtype=torch.int32)
        self._pool: ThreadPool = (
            ThreadPool(library, num_threads or len(os.sched_getaffinity(0)))
            if base is None
            else base._pool
        )
        self._handle = library.proa_program_create(
            (NativeOp * len(ops))(*ops), len(ops), widths.data_ptr(), len(widths),
            self._pool.handle, kernels.encode(),
        )  # fmt: skip
        weakref.finalize(self, _destroy, library, self._handle, self._pool)

    @property
    def num_bytes(self) -> int:
        """See `Decoder.num_bytes`."""
        return self._lowering.num_bytes

    def make_picker(self) -> NativePicker:
        """Return what takes tokens from logits, on the same threads."""
        return NativePicker(self._library, self._pool, self._kernels)

    def make_cache(
        self, spec: DecoderSpec, num_blocks: int, block_size: int, dtype: torch.dtype
    ) -> KVCache:
        """Return an empty cache: keys (N, K, E, 16), values (N, K, 16, E) or turned as the keys.

        With int8 each is (N, K, bytes): such codes, then bfloat16 scales (groups, 16).

        Raises:
            ValueError: a block size or dtype the kernels do not read.
        """
        if block_size != BLOCK_SIZE:
            raise ValueError(
                f"block_size must be {BLOCK_SIZE} for native kernels, not {block_size}"
            )
        if dtype not in CACHE_FORMATS:
            raise ValueError(
                f"cache dtype must be float16, float32 or int8 on the CPU, not {dtype}"
            )

        def make(shape: Callable[[int], tuple[int, ...]]) -> list[Tensor]:
            return [
                lazy_zeros(num_blocks, x.num_key_value_heads, *shape(x.head_dim), dtype=dtype)
                for x in spec.layers
            ]

        if dtype == torch.int8:
            keys = make(lambda e: (head_bytes(e, dtype)[0] * BLOCK_SIZE,))
            values = make(lambda e: (head_bytes(e, dtype)[1] * BLOCK_SIZE,))
        else:
            keys = make(lambda e: (e, BLOCK_SIZE))
            # Heads that do not fill the kernels' vectors have their values turned too.
            values = make(lambda e: (e, BLOCK_SIZE) if e % PANEL else (BLOCK_SIZE, e))
        return KVCache(keys=keys, values=values, num_blocks=num_blocks, block_size=block_size)

    def forward(
        self,
        batch: PackedBatch,
        cache: KVCache,
        taps: Tensor | None = None,
        states: Tensor | None = None,
    ) -> Tensor:
        """Run one step; see `Decoder.forward`."""
        num_outputs = len(batch.output_rows)
        logits = torch.empty(num_outputs, self.program.vocab_size)
        step = self._step(batch, cache)
        step.output_rows = batch.output_rows.data_ptr()
        step.logits = logits.data_ptr()
        step.taps = None if taps is None else taps.data_ptr()
        step.final_states = None if states is None else states.data_ptr()
        step.num_outputs = num_outputs
        step.last_op = self._num_ops
        if batch.write_starts is not None:
            step.write_starts = batch.write_starts.data_ptr()
        if batch.side is not None:
            self._side_entries.set(step, batch.side)
        if batch.forks is not None:
            self._fork_entries.set(step, batch.forks)
        self._library.proa_program_run(self._handle, ctypes.byref(step))
        return logits

    def hidden_states(self, batch: PackedBatch) -> Iterator[Tensor]:
        """See `Decoder.hidden_states`."""
        lengths = batch.query_starts.diff().tolist()
        counts = [-(-length // BLOCK_SIZE) for length in lengths]
        tables = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        for b, (first, count) in enumerate(
            zip(accumulate(counts, initial=0), counts, strict=False)
        ):
            tables[b, :count] = torch.arange(first, first + count)
        batch = dataclasses.replace(batch, block_tables=tables)
        attentions = [op for op in self.program.ops if isinstance(op, AttentionOp)]
        size = sum(counts) * BLOCK_SIZE * max(op.num_kv_heads * op.head_dim for op in attentions)
        keys, values = ([torch.zeros(size, dtype=torch.float16)] * len(attentions) for _ in "kv")
        cache = KVCache(keys=keys, values=values, num_blocks=sum(counts), block_size=BLOCK_SIZE)
        first = 0
        for tap, last in enumerate(self._after_taps):
            state = torch.empty(len(batch.token_ids), self.program.widths["x"])
            step = self._step(batch, cache)
            step.taps, step.first_tap = state.data_ptr(), tap
            step.first_op, step.last_op = first, last
            self._library.proa_program_run(self._handle, ctypes.byref(step))
            first = last
            yield state

    def apply_final_norm(self, states: Tensor) -> Tensor:
        """See `Decoder.apply_final_norm`."""
        return apply_prologue(self.program.head, states)

    def apply_head(self, states: Tensor) -> Tensor:
        """See `Decoder.logits`."""
        states = states.float().contiguous()
        logits = torch.empty(len(states), self.program.vocab_size)
        step = NativeStep(
            states=states.data_ptr(), logits=logits.data_ptr(), num_outputs=len(states),
            first_op=self._after_taps[-1], last_op=self._num_ops,
        )  # fmt: skip
        self._library.proa_program_run(self._handle, ctypes.byref(step))
        return logits

    def attach(self, program: SideProgram) -> AttachedSide:
        """See `Decoder.attach`."""
        return lower_side(program, self._library)

    def attach_fork(self, program: ForkProgram) -> AttachedFork:
        """See `Decoder.attach`."""
        return lower_fork(
            program, self._library, places=self._lowering.places, first_ops=self._after_taps,
            num_ops=self._num_ops,
        )  # fmt: skip

    def _step(self, batch: PackedBatch, cache: KVCache) -> NativeStep:
        keys, values = cache.addresses
        return NativeStep(
            token_ids=batch.token_ids.data_ptr(),
            positions=batch.positions.data_ptr(),
            query_starts=batch.query_starts.data_ptr(),
            context_lens=batch.context_lens.data_ptr(),
            block_tables=batch.block_tables.data_ptr(),
            k_cache=ctypes.addressof(keys),
            v_cache=ctypes.addressof(values),
            inv_freq=self._inv_freq.data_ptr(),
            num_tokens=len(batch.token_ids),
            num_sequences=len(batch.context_lens),
            block_table_stride=batch.block_tables.stride(0),
            cache_format=CACHE_FORMATS[cache.keys[0].dtype],
            rotary_scale=self.program.rotary_scale,
        )


def _destroy(library: ctypes.CDLL, program: int, _: ThreadPool) -> None:
    """Free a program; its threads are held until then."""
    library.proa_program_destroy(program)
