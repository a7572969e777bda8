"""Load a pruned variant of a checkpoint: the original weights sliced, then quantised."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
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
    prequantized_kind,
)
from models.checkpoints.tensor_files import SafetensorsFolder
from models.families import CheckpointError
from models.pruning import Selections, kept_parts, prune_spec, slice_weight
from models.quantization import NF4_CODEBOOK, quantize_4bit
from models.spec import DecoderSpec, canonical_weights
from models.weights import Quantized4Bit, Weight, dense

_CACHE_VERSION = 2
_FILE = "model.safetensors"
_BLOCK_SIZE = 64
_COST = (
    "rounding twice costs quality (on the demo model, NF4 of weights that were 4-bit took "
    "perplexity from 23.1 to 28.8 on WikiText-2's first 4 x 1,024 tokens)"
)


def load_pruned(
    source: str | Path | None,
    base: Checkpoint,
    selections: Selections,
    *,
    digest: str,
    cache_dir: Path | None = None,
    dequantize: bool = False,
    report: Report = lambda _: None,
) -> Checkpoint:
    """Load a variant of a base that keeps some of each layer's channels.

    Matrices are sliced from the original weights, then quantised if the base is (to NF4, whatever
    its kind), once: they are kept in the cache and mapped from there. Weights that keep all of
    their channels are the base's own objects.

    Args:
        source: what `base` was loaded from.
        base: not pruned.
        selections: channels that each layer keeps.
        digest: names the selections, in the cache and in the chain of the result.
        cache_dir: where sliced weights and the demo model are kept; default ~/.cache/proa.
        dequantize: slice a base that has 4-bit weights only; a warning is reported.
        report: called with one line at a time about what is being done.

    Returns:
        The pruned decoder, with the base's name and fingerprint.

    Raises:
        SpecError: the selections do not fit the base; every problem is named.
        CheckpointError: the source cannot be read, is not the base's or has 4-bit weights only, or
            the cache cannot be used.
    """
    spec = prune_spec(base.spec, selections)
    sliced = [name for name in base.weights if any(kept_parts(name, base.spec, selections))]
    matrices = [name for name in sliced if name.endswith(".weight")]
    weights = dict(base.weights)
    for name in set(sliced) - set(matrices):
        weights[name] = slice_weight(name, cast(Tensor, weights[name]), base.spec, selections)
    if matrices:
        cache_dir = (cache_dir or DEFAULT_CACHE_DIR).expanduser()
        origin = find_origin(source, report)
        if is_rounded := base.quantization != "none" and _is_quantized(origin):
            if not dequantize:
                raise CheckpointError(
                    f"{origin.path}: has 4-bit weights only, and slicing needs the original ones; "
                    "load the base from those, or give --dequantize, which takes the 4-bit ones "
                    f"at a cost: {_COST}"
                )
            report(
                f"warning: {base.name}: 4-bit weights are dequantised, sliced and quantised again; "
                f"{_COST}"
            )

        def build(part: Path) -> None:
            report(f"slicing {base.name} (once; later starts use {cache_dir})")
            read = _weights_of(base) if is_rounded else _originals(origin, base, cache_dir, report)
            sliced = ((n, slice_weight(n, read(n), base.spec, selections)) for n in matrices)
            _write(part / _FILE, sliced, is_quantized=base.quantization != "none")

        folder = _cached(origin, base, digest, cache_dir, build)
        weights |= _mapped(folder, spec, matrices, is_quantized=base.quantization != "none")
    return replace(
        base, spec=spec, weights=weights, known_fingerprint=base.fingerprint,
        chain=(*base.chain, digest),
    )  # fmt: skip


def _is_quantized(origin: Origin) -> bool:
    if origin.is_gguf:
        return False
    assert origin.path is not None
    return prequantized_kind(open_folder(origin.path)) is not None


def _weights_of(base: Checkpoint) -> Callable[[str], Tensor]:
    """Return a function that gives the base's own weights, dense."""

    def read(name: str) -> Tensor:
        weight = base.weights[name]
        return weight if isinstance(weight, Tensor) else dense(weight)

    return read


def _originals(
    origin: Origin, base: Checkpoint, cache_dir: Path, report: Report
) -> Callable[[str], Tensor]:
    """Return a function that reads the weights the base was made of.

    Raises:
        CheckpointError: they cannot be read, or are another model's.
    """
    if base.quantization == "none":
        return _weights_of(base)
    path = origin.fetched(cache_dir, report)
    opened = open_gguf(path) if origin.is_gguf else open_folder(path)
    description, reader = opened.description, opened.reader
    check_tensors(description, reader, path)
    if description.spec != base.spec:
        raise CheckpointError(f"{path}: is not what the base {base.name} was loaded from")

    def read(name: str) -> Tensor:
        source = description.sources[name]
        tensor = reader.read(source.name)
        return tensor if source.rows is None else tensor[torch.tensor(source.rows)]

    return read


def _cached(
    origin: Origin, base: Checkpoint, digest: str, cache_dir: Path, build: Callable[[Path], None]
) -> Path:
    """Return the cached folder of a base's variant, building it the first time.

    Raises:
        CheckpointError: the cache is damaged, or cannot be read or written.
    """
    key = {
        "version": _CACHE_VERSION,
        "source": origin.identity(),
        "selections": digest,
        "quantization": base.quantization,
    }
    try:
        return cached_folder(cache_dir, f"{base.name}-{base.quantization}-pruned", key, build)
    except OSError as error:
        raise CheckpointError(
            f"{cache_dir}: the cache cannot be used ({error}); name another folder"
        ) from error


def _write(path: Path, matrices: Iterable[tuple[str, Tensor]], *, is_quantized: bool) -> None:
    """Write matrices by name, quantised or as they are."""
    tensors: dict[str, Tensor] = {}
    for name, matrix in matrices:
        if is_quantized:
            quantized = quantize_4bit(matrix, _BLOCK_SIZE)
            tensors |= {f"{name}.packed": quantized.packed, f"{name}.absmax": quantized.absmax}
        else:
            tensors[name] = matrix.contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes it readable by its owner only


def _mapped(
    folder: Path, spec: DecoderSpec, names: Sequence[str], *, is_quantized: bool
) -> dict[str, Weight]:
    """Map matrices from the cache, by name."""
    shapes = {name: shape for name, shape, _ in canonical_weights(spec)}
    codebook = torch.tensor(NF4_CODEBOOK)
    reader = SafetensorsFolder(folder)
    if not is_quantized:
        return {name: reader.read(name) for name in names}
    return {
        name: Quantized4Bit(
            packed=reader.read(f"{name}.packed"),
            absmax=reader.read(f"{name}.absmax"),
            codebook=codebook,
            shape=cast(tuple[int, int], shapes[name]),
            block_size=_BLOCK_SIZE,
        )
        for name in names
    }
