"""Write a checkpoint as a Hugging Face folder: in bitsandbytes' 4-bit format, or dense."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from models.checkpoints.assembly import (
    check_tensors,
    describe_not_finite,
    expected_shapes,
    is_finite,
)
from models.checkpoints.gguf_model import GgufModel
from models.checkpoints.gguf_tokenizer import GgufVocabulary, save_gguf_tokenizer
from models.checkpoints.origins import OpenCheckpoint
from models.checkpoints.tokenizer_files import TOKENIZER_FILES, has_older_tokenizer
from models.families import CheckpointError
from models.quantization import round_to_scales, search_scales
from models.weights import Quantized4Bit

BLOCK_SIZE = 64
_SHARD_BYTES = 2 << 30
_LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
_NUM_REPORTS = 10
QuantType = Literal["nf4", "fp4"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FourBit:
    """How the decoder's linears are quantised.

    Attributes:
        quant_type: "nf4" or "fp4".
        double_quant: whether the scales are quantised too, to 8 bits.
        search: whether the scales are those at which a matrix loses least, instead of the largest
            magnitudes of the blocks.
        importance: with `search`, how much each input of a linear counts, by the linear's canonical
            name, such as "layers.3.q": (in_features,) float32, >= 0; all alike where there is none.
    """

    quant_type: QuantType = "nf4"
    double_quant: bool = False
    search: bool = False
    importance: Mapping[str, Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.quant_type not in ("nf4", "fp4"):
            raise CheckpointError(f"quant_type must be 'nf4' or 'fp4', got {self.quant_type!r}")


def write_folder(
    checkpoint: OpenCheckpoint,
    folder: Path,
    four_bit: FourBit | None,
    report: Callable[[str], None],
) -> None:
    """Write a checkpoint with its tokenizer into an existing, empty folder.

    Embeddings, norms, biases and the LM head stay as they are. What a GGUF file packs is written
    in 16 bits: float16, or bfloat16 where that errs less.

    Args:
        checkpoint: the source.
        folder: where to write.
        four_bit: how to quantise the linears; None writes everything dense.
        report: told about the progress.

    Raises:
        CheckpointError: the tensors do not fit the config or hold what is no number, or the
            tokenizer is not known.
    """
    check_tensors(checkpoint.description, checkpoint.reader, checkpoint.path)
    _write_tokenizer(checkpoint, folder, report)
    linears = linear_tensors(checkpoint) if four_bit else frozenset()
    embedding = checkpoint.description.sources["embed.weight"].name
    dtype = checkpoint.reader.read_compact(embedding).dtype
    config = _config(checkpoint, four_bit, dtype)
    (folder / "config.json").write_text(_to_json(config), encoding="utf-8")
    _warn_about_widths(checkpoint, linears, report)
    _write_tensors(_converted(checkpoint, linears, four_bit, dtype, report), folder)


def linear_tensors(checkpoint: OpenCheckpoint) -> frozenset[str]:
    """Name the tensors of the source that become 4-bit: the linears of the decoder's layers."""
    return frozenset(
        source.name
        for canonical, source in checkpoint.description.sources.items()
        if canonical.startswith("layers.")
        and canonical.split(".")[2] in _LINEARS
        and canonical.endswith(".weight")
    )


def _converted(
    checkpoint: OpenCheckpoint,
    linears: frozenset[str],
    four_bit: FourBit | None,
    dtype: torch.dtype,
    report: Callable[[str], None],
) -> Iterator[tuple[str, Tensor]]:
    names = list(expected_shapes(checkpoint.description))
    verb = "quantising" if four_bit else "converting"
    step = max(1, len(names) // _NUM_REPORTS)
    canonical = {
        source.name: name.removesuffix(".weight")
        for name, source in checkpoint.description.sources.items()
    }
    for i, name in enumerate(names):
        if i % step == 0:
            report(f"{verb} {checkpoint.path.name}: tensor {i + 1} of {len(names)}")
        is_linear = four_bit is not None and name in linears
        reader = checkpoint.reader
        tensor = reader.read(name) if is_linear else reader.read_compact(name)
        if not is_finite(tensor):
            raise CheckpointError(describe_not_finite(checkpoint.path, [name]))
        if is_linear:
            assert four_bit is not None
            importance = (four_bit.importance or {}).get(canonical[name])
            yield from quantize_tensor(name, tensor, four_bit, dtype, importance)
        else:
            yield name, tensor


def quantize_tensor(
    name: str,
    tensor: Tensor,
    four_bit: FourBit,
    dtype: torch.dtype,
    importance: Tensor | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors, by name, that store a matrix in bitsandbytes' 4-bit format.

    Args:
        name: the matrix's name.
        tensor: (out_features, in_features), floating point.
        four_bit: how to quantise.
        dtype: what `transformers` dequantises to.
        importance: (in_features,) float32, >= 0: how much each input counts in a search.
    """
    from bitsandbytes.functional import quantize_4bit

    tensor = tensor.contiguous()
    packed, state = quantize_4bit(
        tensor,
        blocksize=BLOCK_SIZE,
        compress_statistics=four_bit.double_quant,
        quant_type=four_bit.quant_type,
    )
    state.dtype = dtype
    if four_bit.search:
        packed = _search(tensor, packed, state, importance)
    yield name, packed
    for part, value in state.as_dict(packed=True).items():
        yield f"{name}.{part}", value.clone()


def _search(tensor: Tensor, packed: Tensor, state: Any, importance: Tensor | None) -> Tensor:
    """Return better codes than bitsandbytes' and put their scales into its `QuantState`.

    Scales that are quantised too keep bitsandbytes' scales and offset of their own. They are
    positive then: the 8 bits are finest around the offset, the mean of the largest magnitudes.
    """
    scales = search_scales(
        tensor, state.code, is_signed=not state.nested, importance=importance, block_size=BLOCK_SIZE
    )
    codes, absmax = state.absmax, state.absmax
    if state.nested:
        levels, offset = state.state2.code, state.offset.item()
        sizes = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: len(scales)]
        nearest = (scales - offset) / torch.where(sizes > 0, sizes, 1)
        codes = torch.bucketize(nearest, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
        absmax, scales = (levels[stored.long()] * sizes + offset for stored in (absmax, codes))
    start = Quantized4Bit(
        packed=packed.flatten(),
        absmax=absmax,
        codebook=state.code,
        shape=(tensor.shape[0], tensor.shape[1]),
        block_size=BLOCK_SIZE,
    )
    found, is_new = round_to_scales(tensor, scales, start, importance=importance)
    state.absmax = torch.where(is_new, codes, state.absmax) if state.nested else found.absmax
    return found.packed.view_as(packed)


def _write_tensors(tensors: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    """Write one file, or an index and shards of at most 2 GiB plus one tensor."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total_bytes = 0

    def flush() -> None:
        path = folder / f"shard-{len(shards)}"
        save_file(pending, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors makes it readable by its owner only
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        pending[name] = tensor.contiguous()
        total_bytes += tensor.nbytes
        if sum(t.nbytes for t in pending.values()) >= _SHARD_BYTES:
            flush()
    if pending:
        flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file_name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"shard-{i}").rename(folder / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(_to_json(index), encoding="utf-8")


def _config(
    checkpoint: OpenCheckpoint, four_bit: FourBit | None, dtype: torch.dtype
) -> dict[str, object]:
    config = {k: v for k, v in checkpoint.config.items() if k not in ("auto_map", "torch_dtype")}
    dtype_name = str(dtype).removeprefix("torch.")
    config.setdefault("dtype", checkpoint.config.get("torch_dtype", dtype_name))
    compute_dtype = "float32" if isinstance(checkpoint.reader, GgufModel) else dtype_name
    if isinstance(checkpoint.reader, GgufModel):
        vocabulary = _vocabulary(checkpoint.reader)
        ids = ((key, vocabulary.token_id(key)) for key in ("bos", "eos"))
        config |= {f"{key}_token_id": i for key, i in ids}
    if four_bit is not None:
        config["quantization_config"] = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": four_bit.quant_type,
            "bnb_4bit_use_double_quant": four_bit.double_quant,
            "bnb_4bit_compute_dtype": compute_dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": sorted({checkpoint.description.head_module, "lm_head"}),
        }
    return config


def _vocabulary(model: GgufModel) -> GgufVocabulary:
    return GgufVocabulary(path=model.file.path, metadata=model.file.metadata)


def write_tokenizer_folder(
    checkpoint: OpenCheckpoint, folder: Path, report: Callable[[str], None]
) -> None:
    """Write the config and the tokenizer of a checkpoint into an existing, empty folder.

    Raises:
        CheckpointError: the tokenizer is not known.
    """
    _write_tokenizer(checkpoint, folder, report)
    config = _config(checkpoint, None, torch.float16)
    (folder / "config.json").write_text(_to_json(config), encoding="utf-8")


def _write_tokenizer(
    checkpoint: OpenCheckpoint, folder: Path, report: Callable[[str], None]
) -> None:
    if isinstance(checkpoint.reader, GgufModel):
        save_gguf_tokenizer(_vocabulary(checkpoint.reader), folder, report)
    else:
        _copy_tokenizer(checkpoint.path, folder, report)


def _copy_tokenizer(source: Path, folder: Path, report: Callable[[str], None]) -> None:
    if has_older_tokenizer(source):
        _convert_tokenizer(source, folder, report)
    licences = (path.name for path in source.glob("LICENSE*"))
    for name in (*TOKENIZER_FILES, *licences):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if not (folder / "tokenizer.json").is_file():
        report(f"warning: {source} has no tokenizer")
        return
    try:
        Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{source}: tokenizer.json is broken: {error}") from error


def _convert_tokenizer(source: Path, folder: Path, report: Callable[[str], None]) -> None:
    """Make tokenizer.json of older files (vocab.json and merges.txt, tokenizer.model)."""
    from transformers import AutoTokenizer

    report(f"making tokenizer.json from the older tokenizer files of {source}")
    try:
        AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(folder)
    except Exception as error:  # of transformers, tokenizers, sentencepiece or protobuf
        raise CheckpointError(f"{source}: its tokenizer cannot be converted ({error})") from error


def _warn_about_widths(
    checkpoint: OpenCheckpoint, linears: frozenset[str], report: Callable[[str], None]
) -> None:
    shapes = checkpoint.reader.shapes
    widths = sorted({shapes[name][1] for name in linears if shapes[name][1] % BLOCK_SIZE})
    if widths:
        report(
            f"note: input widths {widths} are no multiples of {BLOCK_SIZE}: Proa computes them "
            "right, but bitsandbytes 0.50.2 (so transformers) does not on a CPU"
        )


def _to_json(value: object) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"
