"""Find and open the safetensors files of a Hugging Face folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.families import CheckpointError
from models.weights import QuantizedBlocks

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOATS = ("F16", "BF16", "F32")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class TensorReader(Protocol):
    """Tensors by name, read one at a time.

    Attributes:
        shapes: shape of every tensor.
    """

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, by name."""

    def foreign_type(self, name: str) -> str | None:
        """Name the type that a tensor is stored in, if it is not read as 16- or 32-bit floats."""

    def read(self, name: str) -> Tensor:
        """Return a tensor with exact values."""

    def read_compact(self, name: str) -> Tensor:
        """Return a tensor in the dtype to store it in."""

    def read_stored(self, name: str) -> Tensor | QuantizedBlocks:
        """Return a tensor as it is stored, mapped from its file where that can be."""


class SafetensorsFolder:
    """The tensors of a folder; reading one maps the file, it does not copy.

    Attributes:
        folder: the folder.
        shapes: shape of every tensor, by name.
    """

    folder: Path
    shapes: Mapping[str, tuple[int, ...]]

    def __init__(self, folder: Path) -> None:
        """Open every file and read the headers.

        Raises:
            CheckpointError: a file is missing, truncated or holds pickled weights.
        """
        self.folder = folder
        files: list[Any] = [_open(path) for path in weight_files(folder)]
        self._file_of = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        self.shapes = {
            name: tuple(file.get_slice(name).get_shape()) for name, file in self._file_of.items()
        }

    def foreign_type(self, name: str) -> str | None:
        """Name the type that a tensor is stored in, if it is not 16- or 32-bit floating point."""
        stored = str(self._file_of[name].get_slice(name).get_dtype())
        return None if stored in _FLOATS else stored

    def read(self, name: str) -> Tensor:
        """Return a tensor mapped from its file."""
        return cast(Tensor, self._file_of[name].get_tensor(name))

    def read_compact(self, name: str) -> Tensor:
        """Return the tensor as stored."""
        return self.read(name)

    def read_stored(self, name: str) -> Tensor:
        """Return the tensor as stored."""
        return self.read(name)


def weight_files(folder: Path) -> list[Path]:
    """List the safetensors files that make a checkpoint.

    Raises:
        CheckpointError: there is none, or the index names files that are not there.
    """
    index = folder / _INDEX
    if index.is_file():
        return _indexed_files(index)
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder}: holds pickled weights ({pickles[0]}), which are never loaded because they "
            "can run code; convert them to safetensors first, with transformers' "
            "save_pretrained or https://huggingface.co/spaces/safetensors/convert"
        )
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    hint = f"; to load {ggufs[0]}, name the file itself" if ggufs else ""
    raise CheckpointError(
        f"{folder}: no weights; {_SINGLE} or {_INDEX} is needed (pickled weights are never "
        f"fetched or loaded){hint}"
    )


def _indexed_files(index: Path) -> list[Path]:
    content = load_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing or empty")
    names = sorted({str(name) for name in weight_map.values()})
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{index}: names files outside the folder: {', '.join(outside)}")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{index.parent}: missing weight files: {', '.join(missing)}")
    return [index.parent / name for name in names]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({error}); it may be truncated, fetch it again"
        ) from error


def load_json(path: Path) -> dict[str, object]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing or holds anything else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent}: {path.name} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value
