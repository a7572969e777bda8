"""The base decoder: a spec and weights made runnable."""

from collections.abc import Iterator, Mapping
from typing import Literal, Protocol

import torch
from torch import Tensor

from models.batch import PackedBatch
from models.kernels.native import NativeExecutor, is_native_available
from models.kernels.reference_executor import ReferenceExecutor
from models.kv_cache import KVCache, cache_bytes_per_block
from models.program import build_program
from models.quantization import quantize_4bit
from models.side import AttachedSide, SideNetwork, SideProgram, build_side_program
from models.spec import DecoderSpec
from models.weights import Matrix, Weight, dense, quantize_8bit

HeadPrecision = Literal["int8", "nf4", "dense"]
KernelChoice = Literal["auto", "native", "avx2", "avx512", "reference", "cuda"]


class Executor(Protocol):
    """Runs a program."""

    name: str

    def make_cache(
        self, spec: DecoderSpec, num_blocks: int, block_size: int, dtype: torch.dtype
    ) -> KVCache: ...

    def forward(self, batch: PackedBatch, cache: KVCache, taps: Tensor | None = None) -> Tensor: ...

    def hidden_states(self, batch: PackedBatch) -> Iterator[Tensor]: ...

    def apply_final_norm(self, states: Tensor) -> Tensor: ...

    def apply_head(self, states: Tensor) -> Tensor: ...

    def attach(self, program: SideProgram) -> AttachedSide: ...


class Decoder:
    """A decoder-only transformer over a paged KV cache.

    Args:
        spec: the architecture.
        weights: by canonical name (`models.spec.canonical_weights`). They are repacked; drop
            your own references to free what the decoder does not keep.
        kernels: "auto": CUDA on a CUDA device, else native, else reference.
        device: "cpu" or a CUDA device.
        head: precision of the LM head. The embedding keeps its own.
        num_threads: threads of the native kernels; None: one for each core.

    Raises:
        SpecError: weights are missing, misshapen or unknown.
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
    ) -> None:
        self.spec = spec
        kernels = resolve_kernels(kernels, device)
        program = build_program(spec, weights, _head_matrix(spec, weights, head))
        self._executor: Executor
        if kernels == "cuda":
            from models.kernels.cuda import CudaExecutor  # needs a CUDA build of its libraries

            self._executor = CudaExecutor(program, device)
        elif kernels == "reference":
            self._executor = ReferenceExecutor(program, device)
        else:
            wanted = "auto" if kernels == "native" else kernels
            self._executor = NativeExecutor(program, kernels=wanted, num_threads=num_threads)
        self._default_cache_dtype = torch.float32 if kernels == "reference" else torch.float16
        self.kernels = self._executor.name

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
            dtype: of keys and values; None: float16, float32 for the reference kernels.
        """
        dtype = dtype or self._default_cache_dtype
        return self._executor.make_cache(self.spec, num_blocks, block_size, dtype)

    def forward(self, batch: PackedBatch, cache: KVCache, *, taps: Tensor | None = None) -> Tensor:
        """Run one step: write the step's keys and values to the cache, return logits.

        Args:
            batch: the step's tokens.
            cache: from `make_cache`.
            taps: (layers + 1, T, D) float32 to receive the embedding and the residual stream
                after each layer.

        Returns:
            (L, V) float32 logits of `batch.output_rows`, on the decoder's device.
        """
        return self._executor.forward(batch, cache, taps)

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

    def attach(self, network: SideNetwork) -> AttachedSide:
        """Make a side network ready to run on this decoder's steps.

        Raises:
            SpecError: it does not fit; every reason is named.
        """
        return self._executor.attach(build_side_program(network, self.spec))

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

    def side_cache_bytes_per_block(
        self, side: AttachedSide, *, block_size: int = 16, dtype: torch.dtype | None = None
    ) -> int:
        """Return the bytes that one block of a side network's cache takes over all layers."""
        return cache_bytes_per_block(side.spec, block_size, dtype or self._default_cache_dtype)


def resolve_kernels(kernels: KernelChoice, device: str) -> KernelChoice:
    """Choose kernels for "auto" and refuse what cannot run.

    Raises:
        ValueError: names the choice and what would work.
    """
    is_cuda = device.startswith("cuda")
    if kernels == "auto":
        return "cuda" if is_cuda else "native" if is_native_available("auto") else "reference"
    if (kernels == "cuda") != is_cuda and kernels != "reference":
        raise ValueError(f"kernels {kernels!r} do not run on device {device!r}")
    if kernels in ("native", "avx2", "avx512"):
        wanted = "auto" if kernels == "native" else kernels
        if not is_native_available(wanted):
            raise ValueError(
                f"kernels {kernels!r} need a processor with "
                f"{'AVX-512 VNNI' if kernels == 'avx512' else 'AVX2, FMA and F16C'}; "
                "use 'auto' or 'reference'"
            )
    return kernels


def _head_matrix(spec: DecoderSpec, weights: Mapping[str, Weight], head: HeadPrecision) -> Matrix:
    matrix = weights.get("embed.weight" if spec.tied_head else "head.weight")
    if matrix is None:
        return torch.empty(0, 0)  # reported by build_program with everything else that is missing
    if not isinstance(matrix, Tensor) or head == "dense":
        return matrix if isinstance(matrix, Tensor) else dense(matrix)
    return quantize_8bit(matrix) if head == "int8" else quantize_4bit(matrix)
