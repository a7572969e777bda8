"""Load a variant of a checkpoint: weights derived from the original ones, then quantised, once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.checkpoints.assembly import check_tensors
from models.checkpoints.cache import cached_folder
from models.checkpoints.checkpoint import DEFAULT_CACHE_DIR, Checkpoint
from models.checkpoints.origins import (
    Origin,
    Report,
    find_origin,
    open_folder,
    open_gguf,
    quantization_of,
)
from models.checkpoints.tensor_files import SafetensorsFolder
from models.families import CheckpointError
from models.q4_1 import quantize_q4_1
from models.quantization import NF4_CODEBOOK, quantize_4bit
from models.spec import DecoderSpec, canonical_weights
from models.weights import BLOCK_FORMATS, Matrix, Quantized4Bit, QuantizedBlocks, Weight, dense

_CACHE_VERSION = 1
_FILE = "model.safetensors"
_BLOCK_SIZE = 64
_COST = (
    "rounding twice costs quality (on the demo model, NF4 of weights that were 4-bit took "
    "perplexity from 23.1 to 28.8 on WikiText-2's first 4 x 1,024 tokens)"
)

Read = Callable[[str], Tensor]
"""Gives a dense weight by its canonical name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Derivation:
    """What a variant is, and how its weights follow from those of what it sits on.

    Attributes:
        digest: names it, in the cache and in the chain of the result.
        spec: of the result: the host's but for the layers' widths.
        changed: canonical names of the layers' weights that it has of its own; those that the host
            is without do no harm.
        derive: gives one of those; is told its name, and what reads weights of the host.
        take: gives one of those in the codes of the host's, which it is told, or None where that
            cannot be.
        brought: weights in place of the host's that are ready to compute with, such as factors.
    """

    digest: str
    spec: DecoderSpec
    changed: frozenset[str]
    derive: Callable[[str, Read], Tensor]
    take: Callable[[str, QuantizedBlocks], QuantizedBlocks | None] = lambda _, __: None
    brought: Mapping[str, Weight] = field(default_factory=dict)

    @staticmethod
    def of_weights(digest: str, spec: DecoderSpec, brought: Mapping[str, Weight]) -> "Derivation":
        """Describe a variant that brings its weights along; `spec` is its host's."""
        return Derivation(
            digest=digest, spec=spec, changed=frozenset(), derive=lambda name, read: read(name),
            brought=brought,
        )  # fmt: skip


class Originals:
    """The weights that a base was made of; they are opened when a variant is derived from them.

    Args:
        source: what `base` was loaded from.
        base: no variant.
        cache_dir: where derived weights and the demo model are kept; default ~/.cache/proa.
        dequantize: derive from 4-bit weights where there are no others; a warning is reported.
    """

    def __init__(
        self,
        source: str | Path | None,
        base: Checkpoint,
        *,
        cache_dir: Path | None = None,
        dequantize: bool = False,
    ) -> None:
        self.base = base
        self.cache_dir = (cache_dir or DEFAULT_CACHE_DIR).expanduser()
        self._source = source
        self._dequantize = dequantize

    def cached(
        self, chain: Sequence[str], report: Report, write: Callable[[Path, Read], None]
    ) -> Path:
        """Return the cached folder of a variant's weights, writing it the first time.

        Args:
            chain: digests of what the variant consists of, in order.
            report: called with one line at a time about what is being done.
            write: fills an empty folder; is given what reads the base's weights.

        Raises:
            CheckpointError: the source cannot be read, is not the base's or has 4-bit weights only,
                or the cache is damaged or cannot be used.
        """
        base, origin = self.base, find_origin(self._source, report)
        is_rounded = base.quantization != "none" and _is_quantized(origin)
        if is_rounded:
            self._accept_rounding(origin, report)

        def build(part: Path) -> None:
            report(f"deriving a variant of {base.name} (once; later starts use {self.cache_dir})")
            is_original = is_rounded or base.quantization in ("gguf", "none")
            write(part, weights_of(base) if is_original else self._open(origin, report))

        key = {
            "version": _CACHE_VERSION,
            "source": origin.identity(),
            "chain": list(chain),
            "quantization": base.quantization,
        }
        name = f"{base.name}-{base.quantization}-variant"
        return cached_folder(self.cache_dir, name, key, build)

    def _accept_rounding(self, origin: Origin, report: Report) -> None:
        if not self._dequantize:
            raise CheckpointError(
                f"{origin.path}: has 4-bit weights only, and a variant is made of the original "
                "ones; load the base from those, or give --dequantize, which takes the 4-bit ones "
                f"at a cost: {_COST}"
            )
        report(
            f"warning: {self.base.name}: 4-bit weights are dequantised, changed and quantised "
            f"again; {_COST}"
        )

    def _open(self, origin: Origin, report: Report) -> Read:
        path = origin.fetched(self.cache_dir, report)
        opened = open_gguf(path) if origin.is_gguf else open_folder(path)
        description, reader = opened.description, opened.reader
        check_tensors(description, reader, path)
        if description.spec != self.base.spec:
            raise CheckpointError(f"{path}: is not what the base {self.base.name} was loaded from")

        def read(name: str) -> Tensor:
            source = description.sources[name]
            tensor = reader.read(source.name)
            return tensor if source.rows is None else tensor[torch.tensor(source.rows)]

        return read


@dataclass(frozen=True, kw_only=True, slots=True)
class Lineage:
    """A checkpoint and how it came of a base: what further variants are derived from.

    Attributes:
        checkpoint: the base with all steps taken.
        originals: of the base.
        steps: from the base on; none: it is the base.
    """

    checkpoint: Checkpoint
    originals: Originals
    steps: tuple[Derivation, ...] = ()

    def derive(self, step: Derivation, *, report: Report = lambda _: None) -> "Lineage":
        """Load a variant of this checkpoint.

        Its own matrices are derived from the original weights, through all steps, then quantised
        once where the base's are, to Q4_1 if those are in a block format, else to NF4; they are
        kept in the cache and mapped from there. Those that the steps can take in the base's own
        codes are not rounded. All other weights are this checkpoint's own objects.

        Args:
            step: made for this checkpoint.
            report: called with one line at a time about what is being done.

        Returns:
            The variant, with the base's name and fingerprint.

        Raises:
            CheckpointError: see `Originals.cached`; or the step cuts channels of a checkpoint whose
                matrices are factored.
        """
        host, steps = self.checkpoint, (*self.steps, step)
        if step.changed and any(earlier.brought for earlier in self.steps):
            raise CheckpointError(
                f"{host.name}: nothing can be cut out of factored matrices; prune the model first, "
                "then compress the pruned variant"
            )
        changed = [name for name in host.weights if name in step.changed]
        matrices = [name for name in changed if len(host.weights[name].shape) == 2]
        weights = dict(host.weights)
        for name in set(changed) - set(matrices):
            weights[name] = step.derive(name, weights_of(host))
        if matrices:
            base = self.originals.base.weights

            def write(part: Path, read: Read) -> None:
                for each in steps:
                    read = _through(each, read)
                tensors: dict[str, Tensor] = {}
                for name in matrices:
                    taken = _take(steps, name, base[name])
                    matrix = _rounded_as(base[name], read(name)) if taken is None else taken
                    tensors |= _parts(name, matrix)
                save_file(tensors, part / _FILE, metadata={"format": "pt"})
                (part / _FILE).chmod(0o644)  # safetensors makes it readable by its owner only

            chain = [taken.digest for taken in steps]
            folder = self.originals.cached(chain, report, write)
            weights |= _mapped(folder, step.spec, matrices)
        weights |= step.brought
        checkpoint = replace(
            host, spec=step.spec, weights=weights,
            known_fingerprint=self.originals.base.fingerprint, chain=(*host.chain, step.digest),
        )  # fmt: skip
        return replace(self, checkpoint=checkpoint, steps=steps)


def weights_of(checkpoint: Checkpoint) -> Read:
    """Return a function that gives a checkpoint's own weights, dense."""

    def read(name: str) -> Tensor:
        weight = checkpoint.weights[name]
        return weight if isinstance(weight, Tensor) else dense(weight)

    return read


def _through(step: Derivation, read: Read) -> Read:
    return lambda name: step.derive(name, read) if name in step.changed else read(name)


def _is_quantized(origin: Origin) -> bool:
    if origin.is_gguf:
        return False
    assert origin.path is not None
    return quantization_of(open_folder(origin.path)) != "none"


def _take(steps: Sequence[Derivation], name: str, weight: Weight) -> QuantizedBlocks | None:
    """Take a matrix through all steps in its own codes; None: it has none, or cannot keep them."""
    taken = weight if isinstance(weight, QuantizedBlocks) else None
    for step in steps:
        if taken is not None and name in step.changed:
            taken = step.take(name, taken)
    return taken


def _rounded_as(weight: Weight, matrix: Tensor) -> Matrix:
    """Quantise a derived matrix if the base's is."""
    if isinstance(weight, Tensor):
        return matrix
    if isinstance(weight, QuantizedBlocks) and matrix.shape[1] % BLOCK_FORMATS["Q4_1"][0] == 0:
        return quantize_q4_1(matrix)
    return quantize_4bit(matrix, _BLOCK_SIZE)


def _parts(name: str, matrix: Matrix) -> dict[str, Tensor]:
    """Return the tensors, by name, that a matrix is stored as."""
    if isinstance(matrix, Tensor):
        return {name: matrix.contiguous()}
    if isinstance(matrix, QuantizedBlocks):
        return {f"{name}.{matrix.kind}": matrix.data.contiguous()}
    assert isinstance(matrix, Quantized4Bit)
    return {f"{name}.packed": matrix.packed, f"{name}.absmax": matrix.absmax}


def _mapped(folder: Path, spec: DecoderSpec, names: Sequence[str]) -> dict[str, Weight]:
    """Map matrices from the cache, by name."""
    shapes = {name: shape for name, shape, _ in canonical_weights(spec)}
    codebook = torch.tensor(NF4_CODEBOOK)
    reader = SafetensorsFolder(folder)

    def read(name: str) -> Matrix:
        if name in reader.shapes:
            return reader.read(name)
        for kind in BLOCK_FORMATS:
            if f"{name}.{kind}" in reader.shapes:
                return QuantizedBlocks(data=reader.read(f"{name}.{kind}"), kind=kind)
        return Quantized4Bit(
            packed=reader.read(f"{name}.packed"),
            absmax=reader.read(f"{name}.absmax"),
            codebook=codebook,
            shape=cast(tuple[int, int], shapes[name]),
            block_size=_BLOCK_SIZE,
        )

    return {name: read(name) for name in names}
