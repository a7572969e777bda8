"""Load a checkpoint from wherever it is, with its own codes or in 4 bits."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from models.checkpoints.assembly import assemble_weights, check_finite, check_tensors
from models.checkpoints.cache import cached_folder, whole_folder
from models.checkpoints.origins import (
    OpenCheckpoint,
    Origin,
    Report,
    find_origin,
    open_folder,
    open_gguf,
    quantization_of,
)
from models.checkpoints.tensor_files import load_json
from models.checkpoints.tokenizer_files import check_tokenizer_files, has_older_tokenizer
from models.checkpoints.worker import Content, convert_apart
from models.families import CheckpointError
from models.spec import DecoderSpec
from models.weights import LowRank, Quantized4Bit, Quantized8Bit, QuantizedBlocks, Weight

QUANTIZATIONS = ("auto", "keep", "nf4", "none")
DEFAULT_CACHE_DIR = Path("~/.cache/proa")
_CACHE_VERSION = 2
_SUMMARY_FILE = "proa_summary.json"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model's weights and where the rest of it lies.

    Attributes:
        spec: the decoder.
        weights: by canonical name; dense ones keep their stored dtype and are mapped from disk.
        folder: holds config.json, tokenizer.json and, where the model has them, the other files of
            the tokenizer and generation_config.json.
        name: the model's id.
        weights_folder: the files that weights are mapped from lie in it.
        quantization: how they are quantised: "nf4", "fp4", "gguf" (block formats of a GGUF file,
            maybe mixed) or "none".
        known_fingerprint: the fingerprint, if the cache has it.
        chain: digests of what was attached to the base to make this, in order.
    """

    spec: DecoderSpec
    weights: Mapping[str, Weight] = field(repr=False)
    folder: Path
    weights_folder: Path
    name: str
    quantization: str
    known_fingerprint: str | None = field(default=None, repr=False)
    chain: tuple[str, ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights as computed with, and of how they are quantised; 64 hex digits.

        What `chain` names is no part of it: it is the base's.
        """
        return self.known_fingerprint or fingerprint_weights(self.weights, self.quantization)


def fingerprint_weights(weights: Mapping[str, Weight], quantization: str) -> str:
    """Hash names, dtypes, shapes and bytes of all weights; how files split them is no part of it.

    Args:
        weights: by canonical name.
        quantization: "nf4", "fp4", "gguf" or "none".

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(json.dumps({"quantization": quantization}).encode())

    def add(name: str, tensor: Tensor) -> None:
        head = f"\n{name} {tensor.dtype} {tuple(tensor.shape)} "
        digest.update(head.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)

    def add_weight(name: str, weight: Weight) -> None:
        if isinstance(weight, LowRank):
            add_weight(f"{name}.left", weight.left)
            add_weight(f"{name}.right", weight.right)
        elif isinstance(weight, Quantized8Bit):
            add(f"{name}.codes", weight.codes)
            add(f"{name}.scales", weight.scales)
        elif isinstance(weight, Quantized4Bit):
            digest.update(f"\n{name} {weight.shape} {weight.block_size}".encode())
            for part in ("packed", "absmax", "codebook"):
                add(f"{name}.{part}", getattr(weight, part))
        elif isinstance(weight, QuantizedBlocks):
            add(f"{name}.{weight.kind}", weight.data)
        else:
            add(name, weight)

    for name in sorted(weights):
        add_weight(name, weights[name])
    return digest.hexdigest()


def default_quantization(stored: str) -> str:
    """Say what "auto" means for weights.

    Args:
        stored: how they are stored: "nf4", "fp4", "gguf" or "none".
    """
    return "nf4" if stored == "none" else "keep"


def _silent(_: str) -> None:
    """Report to nobody."""


def load_checkpoint(
    source: str | Path | None,
    *,
    quantization: str = "auto",
    cache_dir: Path | None = None,
    needs_tokenizer: bool = False,
    report: Callable[[str], None] = _silent,
) -> Checkpoint:
    """Load a model.

    Weights that are kept are mapped from where they are stored. Others are converted once, into a
    folder in the cache that `transformers` could load too, and mapped from there ever after.

    Args:
        source: Hugging Face folder, hub id, GGUF file; None or "smollm2" is the demo model.
        quantization: "keep": weights stay as they are stored, dense or quantised. "nf4": those of
            16 and 32 bits, and a GGUF file's, are quantised to NF4. "none": those of a GGUF file
            are unpacked to 16 bits, dense ones stay dense. bitsandbytes' 4-bit checkpoints are
            kept in any case. "auto": see `default_quantization`.
        cache_dir: where converted models and the demo model are kept; default ~/.cache/proa.
        needs_tokenizer: refuse a model without one, before anything is converted.
        report: called with one line at a time about what is being done.

    Raises:
        UnsupportedArchitectureError: there is no native implementation of the architecture.
        CheckpointError: the source cannot be found or read; the message says what is wrong.
    """
    if quantization not in QUANTIZATIONS:
        raise CheckpointError(
            f"quantization must be one of {', '.join(QUANTIZATIONS)}, got {quantization!r}"
        )
    cache_dir = (cache_dir or DEFAULT_CACHE_DIR).expanduser()
    origin = find_origin(source, report)
    if origin.is_gguf:
        # The header of a large vocabulary takes a while to read, and the demo model's is known.
        opened = None
        if origin.path is not None and quantization != "nf4":
            opened = open_gguf(origin.path)
        stored = "gguf" if opened is None else quantization_of(opened)
    else:
        assert origin.path is not None
        opened = open_folder(origin.path)
        stored = quantization_of(opened)
        check_tokenizer_files(origin.path, is_needed=needs_tokenizer)
    wanted = default_quantization(stored) if quantization == "auto" else quantization
    if wanted in ("keep", stored) or stored in ("nf4", "fp4"):
        opened = opened or open_gguf(origin.fetched(cache_dir, report))
        return _kept(origin, opened, stored, cache_dir, report)
    if not origin.is_gguf:
        assert opened is not None
        check_tensors(opened.description, opened.reader, opened.path)
    folder = _converted(origin, cast(Content, wanted), cache_dir, report)
    loaded = _load(open_folder(folder), origin.name, wanted, report)
    return replace(loaded, known_fingerprint=_stored_fingerprint(folder))


def _kept(
    origin: Origin, opened: OpenCheckpoint, stored: str, cache_dir: Path, report: Report
) -> Checkpoint:
    """Load weights as they are stored; a GGUF file's are hashed and checked once."""
    loaded = _load(opened, origin.name, stored, report)
    if origin.is_gguf:
        folder = _converted(origin, "tokenizer", cache_dir, report, kept=(opened, loaded))
        return replace(loaded, folder=folder, known_fingerprint=_stored_fingerprint(folder))
    check_finite(loaded.weights, opened.description, opened.path)
    if has_older_tokenizer(opened.path):
        return replace(loaded, folder=_converted(origin, "tokenizer", cache_dir, report))
    return loaded


def _stored_fingerprint(folder: Path) -> str:
    return str(load_json(folder / _SUMMARY_FILE)["fingerprint"])


def _converted(
    origin: Origin,
    content: Content,
    cache_dir: Path,
    report: Report,
    *,
    kept: tuple[OpenCheckpoint, Checkpoint] | None = None,
) -> Path:
    """Return the cached folder of what a source becomes, converting it the first time.

    Args:
        origin: the source.
        content: what of it.
        cache_dir: the cache.
        report: told about the progress.
        kept: what a GGUF file was opened and loaded as, whose weights are in no folder.

    Raises:
        CheckpointError: the source cannot be converted, or the cache cannot be used.
    """

    def build(part: Path) -> None:
        path = origin.fetched(cache_dir, report)
        written = None
        if kept is not None:
            opened, written = kept
            check_finite(written.weights, opened.description, path)
        report(f"converting {path} (once; later starts use {cache_dir})")
        convert_apart(path, part, content, report=report)
        if content != "tokenizer":
            written = _load(open_folder(part), origin.name, content, _silent)
        if written is not None:
            summary = {"fingerprint": written.fingerprint}
            (part / _SUMMARY_FILE).write_text(json.dumps(summary) + "\n", encoding="utf-8")

    key = {"version": _CACHE_VERSION, "source": origin.identity(), "content": content}
    return cached_folder(cache_dir, f"{origin.name}-{content}", key, build)


def _load(source: OpenCheckpoint, name: str, quantization: str, report: Report) -> Checkpoint:
    for note in source.description.notes:
        report(f"note: {name}: {note}")
    path = source.path.resolve()
    return Checkpoint(
        spec=source.description.spec,
        weights=assemble_weights(source.description, source.reader, source.path),
        folder=source.path,
        weights_folder=path.parent if path.is_file() else path,
        name=name,
        quantization=quantization,
    )


def quantize_checkpoint(
    source: str | Path | None,
    output: Path,
    *,
    double_quant: bool = False,
    quant_type: str = "nf4",
    search: bool = False,
    importance: Mapping[str, Tensor] | None = None,
    cache_dir: Path | None = None,
    report: Callable[[str], None] = _silent,
) -> None:
    """Write a model as a 4-bit folder that `transformers` with bitsandbytes loads too.

    Args:
        source: as for `load_checkpoint`, not quantised yet.
        output: folder to make; it must not exist or be empty.
        double_quant: quantise the scales too, to 8 bits.
        quant_type: "nf4" or "fp4".
        search: look for the scales at which the matrices lose least; takes longer.
        importance: how much each input counts in the search, by the linear's canonical name, such
            as "layers.3.q": (in_features,) float32, >= 0, as measured by
            `adapters.calibration.mean_square_inputs`; None: all alike.
        cache_dir: where the demo model is kept, if that is the source; default ~/.cache/proa.
        report: called with one line at a time about what is being done.

    Raises:
        CheckpointError: the source cannot be read or is quantised already, or `output` is in use.
    """
    from models.checkpoints.conversion import FourBit, write_folder

    four_bit = FourBit(
        quant_type=quant_type,  # type: ignore[arg-type]
        double_quant=double_quant,
        search=search,
        importance=importance,
    )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output}: exists and is not an empty folder; name a new one")
    origin = find_origin(source, report)
    path = origin.fetched((cache_dir or DEFAULT_CACHE_DIR).expanduser(), report)
    if origin.is_gguf:
        checkpoint = open_gguf(path)
    else:
        checkpoint = open_folder(path)
        if quantization_of(checkpoint) != "none":
            raise CheckpointError(f"{path}: is quantised to 4 bits already")
        check_tokenizer_files(path)
    try:
        if output.exists():
            output.rmdir()
        with whole_folder(output) as part:
            write_folder(checkpoint, part, four_bit, report)
    except OSError as error:
        raise CheckpointError(f"{output}: cannot be written ({error})") from error
    report(f"wrote {output}")
