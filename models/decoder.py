"""The base decoder: a spec and weights made runnable."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Literal, Protocol, overload

import torch
from torch import Tensor

from models.batch import PackedBatch
from models.fork import AttachedFork, ForkNetwork, ForkProgram, build_fork_program
from models.kernels.native.executor import NativeExecutor, is_native_available
from models.kernels.native.picker import NativePicker
from models.kernels.reference.executor import ReferenceExecutor
from models.kv_cache import KVCache, cache_bytes_per_block
from models.program import Program, Vectors, build_program
from models.quantization import quantize_4bit
from models.side import AttachedSide, SideNetwork, SideProgram, build_side_program
from models.spec import DecoderSpec, SpecError
from models.weights import Matrix, QuantizedBlocks, Weight, dense, quantize_8bit

HeadPrecision = Literal["int8", "nf4", "dense"]
KernelChoice = Literal["auto", "native", "avx2", "avxvnni", "avx512", "amx", "reference", "cuda"]
_NEEDED = {
    "avxvnni": "AVX2 and AVX-VNNI", "avx512": "AVX-512 VNNI", "amx": "AVX-512 VNNI and AMX int8",
}  # fmt: skip


class Executor(Protocol):
    """Runs a program."""

    name: str
    program: Program

    def make_cache(
        self, spec: DecoderSpec, num_blocks: int, block_size: int, dtype: torch.dtype
    ) -> KVCache: ...

    def forward(
        self,
        batch: PackedBatch,
        cache: KVCache,
        taps: Tensor | None = None,
        states: Tensor | None = None,
    ) -> Tensor: ...

    def hidden_states(self, batch: PackedBatch) -> Iterator[Tensor]: ...

    def apply_final_norm(self, states: Tensor) -> Tensor: ...

    def apply_head(self, states: Tensor) -> Tensor: ...

    def attach(self, program: SideProgram) -> AttachedSide: ...

    def attach_fork(self, program: ForkProgram) -> AttachedFork: ...

    @property
    def num_bytes(self) -> int: ...


class Decoder:
    """A decoder-only transformer over a paged KV cache.

    Args:
        spec: the architecture.
        weights: by canonical name (`models.spec.canonical_weights`). They are repacked; drop
            your own references to free what the decoder does not keep.
        kernels: "auto": CUDA on a CUDA device, else native, else reference.
        device: "cpu" or a CUDA device.
        head: precision that a dense LM head is rounded to; one in a block format is computed from
            its own codes. The embedding keeps its own.
        num_threads: threads of the native kernels; None: one for each core.
        base: a decoder that this one is a pruned variant of. Its kernels, device, head precision
            and threads are used, whatever is asked for here; weights that are the same objects as
            the base's are shared with it; its caches serve both. The two must not run at the same
            time. The base may leave memory first.

    Raises:
        SpecError: weights are missing, misshapen or unknown, or this is no variant of the base.
        ValueError: the kernels asked for cannot run here.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        weights: Mapping[str, Weight],
        *,
        kernels: KernelChoice = "auto",
        device: str = "cpu",
        head: HeadPrecision = "int8",
        num_threads: int | None = None,
        base: "Decoder | None" = None,
    ) -> None:
        self.spec = spec
        if base is not None:
            _check_variant(spec, base.spec)
            kernels, device, head = base._kernels, base._device, base._head
        self._kernels: KernelChoice = resolve_kernels(kernels, device)
        self._device: str = device
        self._head: HeadPrecision = head
        self._vectors: Vectors = {} if base is None else dict(base._vectors)
        stored = weights.get("embed.weight" if spec.tied_head else "head.weight")
        self._head_matrix: tuple[Weight | None, Matrix] = (
            base._head_matrix
            if base is not None and stored is base._head_matrix[0]
            else (stored, _head_matrix(stored, head))
        )
        program = build_program(spec, weights, self._head_matrix[1], self._vectors)
        self._executor: Executor = self._make_executor(
            program, num_threads, None if base is None else base._executor
        )
        is_reference = self._kernels == "reference"
        self._default_cache_dtype = torch.float32 if is_reference else torch.float16
        self.kernels = self._executor.name

    def _make_executor(
        self, program: Program, num_threads: int | None, base: Executor | None
    ) -> Executor:
        if self._kernels == "cuda":
            from models.kernels.cuda.executor import (
                CudaExecutor,  # needs a CUDA build of its libraries
            )

            assert base is None or isinstance(base, CudaExecutor)
            return CudaExecutor(program, self._device, base=base)
        if self._kernels == "reference":
            assert base is None or isinstance(base, ReferenceExecutor)
            return ReferenceExecutor(program, self._device, base=base)
        assert base is None or isinstance(base, NativeExecutor)
        wanted = "auto" if self._kernels == "native" else self._kernels
        return NativeExecutor(program, kernels=wanted, num_threads=num_threads, base=base)

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights that it computes with, without those it shares with its base."""
        return self._executor.num_bytes

    def make_picker(self) -> NativePicker | None:
        """Return what takes tokens from logits natively; None without native kernels."""
        if isinstance(self._executor, NativeExecutor):
            return self._executor.make_picker()
        return None

    def cache_bytes_per_block(
        self, *, block_size: int = 16, dtype: torch.dtype | None = None
    ) -> int:
        """Return the bytes that one cache block takes over all layers."""
        return cache_bytes_per_block(self.spec, block_size, dtype or self._default_cache_dtype)

    def make_cache(
        self, *, num_blocks: int, block_size: int = 16, dtype: torch.dtype | None = None
    ) -> KVCache:
        """Return an empty cache.

        Args:
            num_blocks: how many blocks.
            block_size: positions in a block.
            dtype: of keys and values, float16, float32 or, on the CPU, int8; None: float16,
                float32 for the reference kernels.
        """
        dtype = dtype or self._default_cache_dtype
        return self._executor.make_cache(self.spec, num_blocks, block_size, dtype)

    def forward(
        self,
        batch: PackedBatch,
        cache: KVCache,
        *,
        taps: Tensor | None = None,
        states: Tensor | None = None,
    ) -> Tensor:
        """Run one step: write the step's keys and values to the cache, return logits.

        Args:
            batch: the step's tokens.
            cache: from `make_cache`.
            taps: (layers + 1, T, D) float32 to receive the embedding and the residual stream
                after each layer.
            states: (L, D) float32 to receive what the LM head reads for each output row: the final
                state after its norm, a side network blended in.

        Returns:
            (L, V) float32 logits of `batch.output_rows`, on the decoder's device.
        """
        return self._executor.forward(batch, cache, taps, states)

    def hidden_states(self, batch: PackedBatch) -> Iterator[Tensor]:
        """Compute whole sequences one layer at a time, without logits.

        Each layer is computed when it is asked for; nothing else may run on the decoder before the
        last one was. Keys and values are kept for one layer only, so no cache is needed.

        Args:
            batch: all tokens of each sequence, from position 0; its block tables, output rows and
                side networks are ignored.

        Yields:
            h[0] .. h[N], the embedding and the residual stream after each layer: new (T, D) float32
            tensors on the decoder's device.
        """
        return self._executor.hidden_states(batch)

    def apply_final_norm(self, states: Tensor) -> Tensor:
        """Apply the final norm, if there is one, to (T, D) float32 states."""
        return self._executor.apply_final_norm(states)

    def logits(self, states: Tensor) -> Tensor:
        """Return the (T, V) float32 logits of (T, D) float32 states that are normed already."""
        return self._executor.apply_head(states)

    @overload
    def attach(self, network: SideNetwork) -> AttachedSide: ...

    @overload
    def attach(self, network: ForkNetwork) -> AttachedFork: ...

    def attach(self, network: SideNetwork | ForkNetwork) -> AttachedSide | AttachedFork:
        """Make a side network ready to run on this decoder's steps.

        Raises:
            SpecError: it does not fit; every reason is named.
        """
        if isinstance(network, ForkNetwork):
            return self._executor.attach_fork(self.fork_program(network))
        return self._executor.attach(build_side_program(network, self.spec))

    def fork_program(self, network: ForkNetwork) -> ForkProgram:
        """Lay out a fork over this decoder's operations, whose tensors it shares.

        Raises:
            SpecError: it does not fit; every reason is named.
        """
        return build_fork_program(network, self._executor.program)

    def make_side_cache(
        self,
        side: AttachedSide,
        *,
        num_blocks: int,
        block_size: int = 16,
        dtype: torch.dtype | None = None,
    ) -> KVCache:
        """Return an empty cache for a side network and all others of its `cache_shape`."""
        dtype = dtype or self._default_cache_dtype
        return self._executor.make_cache(side.spec, num_blocks, block_size, dtype)


def resolve_kernels(kernels: KernelChoice, device: str) -> KernelChoice:
    """Choose kernels for "auto" and refuse what cannot run.

    Raises:
        ValueError: names the choice and what would work, or how to rebuild a native library that
            does not fit this code.
    """
    is_cuda = device.startswith("cuda")
    if kernels == "auto":
        return "cuda" if is_cuda else "native" if is_native_available("auto") else "reference"
    if (kernels == "cuda") != is_cuda and kernels != "reference":
        raise ValueError(f"kernels {kernels!r} do not run on device {device!r}")
    if kernels not in ("reference", "cuda"):
        wanted = "auto" if kernels == "native" else kernels
        if not is_native_available(wanted):
            raise ValueError(
                f"kernels {kernels!r} need the native library and an x86-64 processor with "
                f"{_NEEDED.get(kernels, 'AVX2, FMA and F16C')}; "
                "use 'auto' or 'reference'"
            )
    return kernels


def _check_variant(spec: DecoderSpec, base: DecoderSpec) -> None:
    """Refuse a decoder that differs from a base in more than widths."""

    def attention(spec: DecoderSpec) -> list[tuple[int, int, int]]:
        return [
            (layer.num_attention_heads, layer.num_key_value_heads, layer.head_dim)
            for layer in spec.layers
        ]

    differing = [
        item.name
        for item in fields(DecoderSpec)
        if item.name != "layers" and getattr(spec, item.name) != getattr(base, item.name)
    ]
    if attention(spec) != attention(base):
        differing.append("attention heads of the layers")
    if differing:
        raise SpecError(f"not a variant of the base: {', '.join(differing)} must be the base's")


def _head_matrix(stored: Weight | None, head: HeadPrecision) -> Matrix:
    if stored is None:
        return torch.empty(0, 0)  # reported by build_program with everything else that is missing
    if isinstance(stored, QuantizedBlocks):
        return stored
    if not isinstance(stored, Tensor) or head == "dense":
        return stored if isinstance(stored, Tensor) else dense(stored)
    return quantize_8bit(stored) if head == "int8" else quantize_4bit(stored)
