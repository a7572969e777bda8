"""Image classifiers as folders: as `transformers` writes them, and compressed ones.

A compressed folder holds the model's `config.json` and `preprocessor_config.json` as they were, the
weights in `mixed_rank.safetensors` and, in `mixed_rank.json`, which linears are factored. The
weights are not named as `transformers` names them, which would fill what it misses with random
numbers; `load_vision` reads both kinds of folder. Nothing in them can hold code.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from adapters.format import shortened
from adapters.mixed_rank.compress_config import GROUP
from adapters.mixed_rank.modules import LowRankLinear, factor_linears
from adapters.mixed_rank.ranks import break_even

__all__ = ["VisionConfig", "VisionError", "VisionModel", "load_vision", "open_vision"]

MODEL_TYPES = ("vit", "deit", "swin")
CONFIG_FILE = "config.json"
PROCESSOR_FILE = "preprocessor_config.json"
COMPRESSED_CONFIG = "mixed_rank.json"
COMPRESSED_WEIGHTS = "mixed_rank.safetensors"
FORMAT_VERSION = 1
FORMS = ("float16", "int8")
_MAX_JSON_BYTES = 1 << 20
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


class VisionError(ValueError):
    """A folder holds no image classifier that can be used, or cannot be written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Factored:
    """Linears that share a right factor.

    Attributes:
        linears: names of their modules.
        rank: of the factors.
    """

    linears: Sequence[str]
    rank: int


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """What `mixed_rank.json` holds.

    Attributes:
        form: what the factors are rounded to.
        factored: which linears have factors.
        remove_linears, remove_total: shares of the parameters that are removed, of the linears in
            blocks and of the whole model.
        description: one line for people.
        training: facts about how it came to be; JSON values.
    """

    form: str
    factored: Sequence[Factored]
    remove_linears: float
    remove_total: float
    description: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionModel:
    """An image classifier, loaded.

    Attributes:
        folder: it came from.
        module: it, in float32 and evaluation mode; takes `pixel_values`, gives `logits`.
        compressed: what it is if it is compressed.
    """

    folder: Path
    module: nn.Module
    compressed: VisionConfig | None

    @property
    def name(self) -> str:
        """A name for people."""
        return self.folder.resolve().name

    def digest(self) -> str:
        """Read its files; return their SHA-256, 64 hexadecimal digits."""
        return _digest(self.folder)


def load_vision(folder: str | os.PathLike[str]) -> nn.Module:
    """Load an image classifier, compressed or not.

    Args:
        folder: as `transformers` writes it, or as `proa compress` does.

    Returns:
        What `AutoModelForImageClassification` gives, in float32 and evaluation mode; of a
        compressed model with `LowRankLinear` modules in the place of linears.

    Raises:
        VisionError: the folder holds no such model.
    """
    return open_vision(Path(folder)).module


def open_vision(folder: Path) -> VisionModel:
    """Load an image classifier with what is told of it; raises as `load_vision` does."""
    content = _read_json(folder / CONFIG_FILE)
    kind = content.get("model_type")
    if kind not in MODEL_TYPES:
        raise VisionError(
            f"{folder / CONFIG_FILE}: model_type must be one of {', '.join(MODEL_TYPES)}, got "
            f"{shortened(kind)}"
        )
    compressed = None
    if (folder / COMPRESSED_CONFIG).exists():
        compressed = _parse_config(_read_json(folder / COMPRESSED_CONFIG))
        module = _load_compressed(folder, compressed)
    else:
        module = _load_plain(folder)
    return VisionModel(folder=folder, module=module.eval(), compressed=compressed)


def save_vision(folder: Path, model: VisionModel, config: VisionConfig) -> None:
    """Write a compressed model; the file that makes the folder one comes last.

    Args:
        folder: there already; its other files are left alone.
        model: whose module has factors in the place of linears.
        config: what it is.

    Raises:
        VisionError: the folder cannot be written.
    """
    dtype = _stored_dtype(model.folder)
    factors = {
        f"{name}.{part}"
        for name, module in model.module.named_modules()
        if isinstance(module, LowRankLinear)
        for part in ("left.weight", "right.weight", "left.scales", "right.scales")
    }
    tensors = {
        name: tensor.to(torch.float16 if name in factors else dtype).contiguous()
        if tensor.is_floating_point() else tensor.contiguous()
        for name, tensor in _own_tensors(model.module)
    }  # fmt: skip
    content = {"format_version": FORMAT_VERSION, **asdict(config)}
    try:
        for name in (CONFIG_FILE, PROCESSOR_FILE):
            if (model.folder / name).exists():
                shutil.copyfile(model.folder / name, folder / name)
        part = folder / f".{COMPRESSED_WEIGHTS}.part"
        safetensors.torch.save_file(tensors, part)
        part.replace(folder / COMPRESSED_WEIGHTS)
        part = folder / f".{COMPRESSED_CONFIG}.part"
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        part.replace(folder / COMPRESSED_CONFIG)
    except (OSError, SafetensorError) as error:
        raise VisionError(f"{folder}: cannot be written ({error})") from error


def _load_plain(folder: Path) -> nn.Module:
    import transformers

    try:
        module, told = transformers.AutoModelForImageClassification.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32,
            output_loading_info=True,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise VisionError(f"{folder}: cannot be loaded ({error})") from error
    missing = [*sorted(told["missing_keys"]), *sorted(map(str, told["mismatched_keys"]))]
    if missing:
        raise VisionError(
            f"{folder}: the weights lack {missing[0]}, or have it in another shape, and "
            f"{len(missing) - 1} more"
        )
    found: nn.Module = module
    return found


def _load_compressed(folder: Path, config: VisionConfig) -> nn.Module:
    import transformers

    path = folder / COMPRESSED_WEIGHTS
    try:
        made = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        module: nn.Module = transformers.AutoModelForImageClassification.from_config(made)
        tensors = safetensors.torch.load_file(path)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise VisionError(f"{folder}: cannot be loaded ({error})") from error
    for problem in _find_problems(module, config):
        raise VisionError(f"{folder / COMPRESSED_CONFIG}: {problem}")
    for each in config.factored:
        factor_linears(module, each.linears, each.rank, is_int8=config.form == "int8")
    wanted = dict(_own_tensors(module))
    problems = [
        f"{name}: not a tensor of this model" for name in sorted(set(tensors) - set(wanted))
    ]
    for name, tensor in wanted.items():
        found = tensors.get(name)
        if found is None:
            problems.append(f"{name}: missing")
        elif found.shape != tensor.shape or (
            found.is_floating_point() != tensor.is_floating_point()
        ):
            problems.append(
                f"{name}: must have shape {tuple(tensor.shape)}, got {found.dtype} of "
                f"{tuple(found.shape)}"
            )
        elif found.is_floating_point() and not found.isfinite().all():
            problems.append(f"{name}: has values that are no finite numbers")
    if problems:
        raise VisionError(f"{path}: {'; '.join(problems[:5])}")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(tensors[name])
    return module


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and lasting buffers, each once, by its first name."""
    lasting = module.state_dict(keep_vars=True)
    seen: set[int] = set()
    for name, tensor in lasting.items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor.detach()


def _find_problems(module: nn.Module, config: VisionConfig) -> Iterator[str]:
    modules = dict(module.named_modules())
    seen: set[str] = set()
    for each in config.factored:
        found = [modules.get(name) for name in each.linears]
        linears = [m for m in found if isinstance(m, nn.Linear)]
        if len(linears) < len(found) or len({m.in_features for m in linears}) != 1 or (
            seen & set(each.linears)):  # fmt: skip
            yield f"{'+'.join(each.linears)} are no linears of this model that share an input"
            continue
        seen.update(each.linears)
        inputs, outputs = linears[0].in_features, sum(m.out_features for m in linears)
        if not 1 <= each.rank < break_even(outputs, inputs):
            yield (
                f"the rank of {'+'.join(each.linears)} must be from 1 to below "
                f"{break_even(outputs, inputs)}, got {each.rank}"
            )
        elif config.form == "int8" and (each.rank % GROUP or inputs % GROUP):
            yield (
                f"the rank of {'+'.join(each.linears)} must be a multiple of {GROUP} with int8 "
                f"factors, got {each.rank}"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise VisionError(f"{path}: larger than {_MAX_JSON_BYTES} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VisionError(f"{path}: cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise VisionError(f"{path}: must hold an object, got {shortened(content)}")
    return content


def _parse_config(content: Mapping[str, Any]) -> VisionConfig:
    def refuse(name: str, wanted: str) -> VisionError:
        return VisionError(
            f"{COMPRESSED_CONFIG}: {name} must be {wanted}, got {shortened(content.get(name))}"
        )

    if content.get("format_version") != FORMAT_VERSION:
        raise refuse("format_version", str(FORMAT_VERSION))
    if content.get("form") not in FORMS:
        raise refuse("form", f"one of {', '.join(FORMS)}")
    factored = content.get("factored")
    if not isinstance(factored, list) or not all(map(_is_factored, factored)):
        raise refuse("factored", 'a list of {"linears": names, "rank": a whole number}')
    for name in ("remove_linears", "remove_total"):
        if type(content.get(name)) not in (int, float) or not 0 <= content[name] < 1:
            raise refuse(name, "a number from 0 to below 1")
    return VisionConfig(
        form=content["form"],
        factored=[Factored(linears=tuple(f["linears"]), rank=f["rank"]) for f in factored],
        remove_linears=content["remove_linears"], remove_total=content["remove_total"],
        description=str(content.get("description", "")),
    )  # fmt: skip


def _is_factored(value: Any) -> bool:
    return (
        isinstance(value, dict) and type(value.get("rank")) is int
        and isinstance(value.get("linears"), list) and bool(value["linears"])
        and all(isinstance(name, str) for name in value["linears"])
    )  # fmt: skip


def _stored_dtype(folder: Path) -> torch.dtype:
    """Return the precision that a model's files are in, float32 if they are in several."""
    found = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    floats = found & set(_DTYPES)
    return _DTYPES[floats.pop()] if len(floats) == 1 else torch.float32


def _digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        if path.name == CONFIG_FILE or path.suffix == ".safetensors":
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()
