"""Load a checkpoint from wherever it is, in 4 bits."""

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
    prequantized_kind,
)
from models.checkpoints.tensor_files import load_json
from models.checkpoints.tokenizer_files import check_tokenizer_files, has_older_tokenizer
from models.checkpoints.worker import Content, convert_apart
from models.families import CheckpointError
from models.spec import DecoderSpec
from models.weights import LowRank, Quantized4Bit, Quantized8Bit, QuantizedBlocks, Weight

QUANTIZATIONS = ("nf4", "none")
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
        quantization: "nf4", "fp4" or "none".
        known_fingerprint: the fingerprint, if the cache has it.
        chain: digests of what was attached to the base to make this, in order.
    """

    spec: DecoderSpec
    weights: Mapping[str, Weight] = field(repr=False)
    folder: Path
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
        quantization: "nf4", "fp4" or "none".

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


def _silent(_: str) -> None:
    """Report to nobody."""


def load_checkpoint(
    source: str | Path | None,
    *,
    quantization: str = "nf4",
    cache_dir: Path | None = None,
    needs_tokenizer: bool = False,
    report: Callable[[str], None] = _silent,
) -> Checkpoint:
    """Load a model.

    What is not quantised yet is quantised once, into a bitsandbytes-compatible folder in the
    cache, and loaded from there ever after. A checkpoint that is 4-bit already is loaded as is.

    Args:
        source: Hugging Face folder, hub id, GGUF file; None or "smollm2" is the demo model.
        quantization: "nf4", or "none" to keep dense weights dense.
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
    if not origin.is_gguf:
        assert origin.path is not None
        opened = open_folder(origin.path)
        kind = prequantized_kind(opened)
        check_tokenizer_files(origin.path, is_needed=needs_tokenizer)
        if kind is not None or quantization == "none":
            loaded = _load(opened, origin.name, kind or "none", report)
            check_finite(loaded.weights, opened.description, origin.path)
            if not has_older_tokenizer(origin.path):
                return loaded
            return replace(loaded, folder=_converted(origin, "tokenizer", cache_dir, report))
        check_tensors(opened.description, opened.reader, origin.path)
    folder = _converted(origin, cast(Content, quantization), cache_dir, report)
    fingerprint = str(load_json(folder / _SUMMARY_FILE)["fingerprint"])
    loaded = _load(open_folder(folder), origin.name, quantization, report)
    return replace(loaded, known_fingerprint=fingerprint)


def _converted(origin: Origin, content: Content, cache_dir: Path, report: Report) -> Path:
    """Return the cached folder of what a source becomes, converting it the first time.

    Raises:
        CheckpointError: the source cannot be converted, or the cache cannot be used.
    """

    def build(part: Path) -> None:
        path = origin.fetched(cache_dir, report)
        report(f"converting {path} (once; later starts use {cache_dir})")
        convert_apart(path, part, content, report=report)
        if content != "tokenizer":
            written = _load(open_folder(part), origin.name, content, _silent)
            summary = {"fingerprint": written.fingerprint}
            (part / _SUMMARY_FILE).write_text(json.dumps(summary) + "\n", encoding="utf-8")

    key = {"version": _CACHE_VERSION, "source": origin.identity(), "content": content}
    return cached_folder(cache_dir, f"{origin.name}-{content}", key, build)


def _load(source: OpenCheckpoint, name: str, quantization: str, report: Report) -> Checkpoint:
    for note in source.description.notes:
        report(f"note: {name}: {note}")
    return Checkpoint(
        spec=source.description.spec,
        weights=assemble_weights(source.description, source.reader, source.path),
        folder=source.path,
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
        if prequantized_kind(checkpoint) is not None:
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
