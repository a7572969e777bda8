"""Tell what kind of checkpoint a source is, and open it as config and tensors."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from models.checkpoints.four_bit import stored_kind
from models.checkpoints.gguf_file import GgufFile, find_parts
from models.checkpoints.tensor_files import SafetensorsFolder, TensorReader, load_json, weight_files
from models.checkpoints.tokenizer_files import TOKENIZER_FILES
from models.demo import DEMO_MODEL_ID, DEMO_SHA256, fetch_demo_model
from models.families import CheckpointError, ModelDescription, describe_model

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """A source that has been found.

    Attributes:
        name: model id that follows from the source.
        path: folder, or (first) GGUF file; None for the demo model, which is fetched only when
            needed.
    """

    name: str
    path: Path | None

    @property
    def is_gguf(self) -> bool:
        """Whether it is one GGUF file."""
        return self.path is None or self.path.is_file()

    def identity(self) -> object:
        """Return what changes when the source changes, for JSON."""
        if self.path is None:
            return {"sha256": DEMO_SHA256}
        path = self.path.resolve()
        files = find_parts(path) if self.is_gguf else sorted(_files_that_matter(path))
        stats = [(file.name, file.stat()) for file in files]
        return {"path": str(path), "files": [(n, s.st_size, s.st_mtime_ns) for n, s in stats]}

    def fetched(self, cache_dir: Path, report: Report) -> Path:
        """Return where the source lies, fetching the demo model if it is that."""
        return fetch_demo_model(cache_dir, report=report) if self.path is None else self.path


def _files_that_matter(folder: Path) -> list[Path]:
    others = (folder / name for name in ("config.json", *TOKENIZER_FILES))
    return [*weight_files(folder), *(path for path in others if path.is_file())]


def find_origin(source: str | Path | None, report: Report) -> Origin:
    """Find a folder, a GGUF file, a hub repository or the demo model.

    Args:
        source: path, hub id ("owner/name"), "smollm2" or None; a local path comes first.
        report: told about downloads.

    Raises:
        CheckpointError: there is no such path, or the repository cannot be had.
    """
    if source is None:
        return Origin(name=DEMO_MODEL_ID, path=None)
    path = Path(source).expanduser()
    if path.is_dir():
        return Origin(name=path.resolve().name, path=path)
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            first = find_parts(path)[0]
            return Origin(name=re.sub(r"-00001-of-\d{5}$", "", first.stem), path=first)
        raise CheckpointError(f"{path}: a model is a folder or a .gguf file, not this")
    if str(source) == DEMO_MODEL_ID:
        return Origin(name=DEMO_MODEL_ID, path=None)
    if isinstance(source, str) and _HUB_ID.fullmatch(source) and path.suffix.lower() != ".gguf":
        from models.checkpoints.hub import fetch_from_hub

        return Origin(name=source.split("/")[1], path=fetch_from_hub(source, report))
    raise CheckpointError(
        f"{source}: no such folder or file, and not a hub id of the form owner/name"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenCheckpoint:
    """A source whose config has been read and whose tensors can be.

    Attributes:
        path: folder or GGUF file.
        config: parsed config.json.
        description: what the config says.
        reader: the tensors.
        has_blocks: some are in a block format of GGUF.
    """

    path: Path
    config: dict[str, object]
    description: ModelDescription
    reader: TensorReader
    has_blocks: bool = False


def open_folder(folder: Path) -> OpenCheckpoint:
    """Open a Hugging Face folder.

    Raises:
        CheckpointError: the config or a weight file is missing, damaged or not supported.
    """
    config = load_json(folder / "config.json")
    try:
        description = describe_model(config)
    except CheckpointError as error:
        raise type(error)(f"{folder}: {error}") from error
    return OpenCheckpoint(
        path=folder, config=config, description=description, reader=SafetensorsFolder(folder)
    )


def open_gguf(path: Path) -> OpenCheckpoint:
    """Open a GGUF file.

    Raises:
        CheckpointError: the file is damaged or of an unsupported kind.
    """
    from models.checkpoints.gguf_model import GgufModel

    model = GgufModel(GgufFile(path))
    config = model.config()
    return OpenCheckpoint(
        path=path, config=config, description=describe_model(config), reader=model,
        has_blocks=model.has_blocks,
    )  # fmt: skip


def quantization_of(opened: OpenCheckpoint) -> str:
    """Return how a checkpoint's weights are stored: "nf4", "fp4", "gguf" or "none".

    "gguf" is any block format. A config that says nothing about it is not believed: the tensors
    tell.

    Raises:
        CheckpointError: the checkpoint is quantised in another way.
    """
    folder = opened.path
    settings = opened.config.get("quantization_config")
    if settings is None:
        return "gguf" if opened.has_blocks else stored_kind(opened.reader.shapes) or "none"
    if not isinstance(settings, dict):
        raise CheckpointError(
            f"{folder}: config.json: quantization_config must be an object, got {settings!r}"
        )
    # transformers' first releases with it wrote no quant_method.
    method = settings.get("quant_method", "bitsandbytes" if "load_in_4bit" in settings else None)
    if method != "bitsandbytes" or not settings.get("load_in_4bit", False):
        raise CheckpointError(
            f"{folder}: config.json: quantization_config with quant_method {method!r} is not "
            "supported; supported: bitsandbytes with load_in_4bit"
        )
    kind = str(settings.get("bnb_4bit_quant_type", "fp4"))
    if kind not in ("nf4", "fp4"):
        raise CheckpointError(
            f"{folder}: config.json: bnb_4bit_quant_type {kind!r} is not supported; "
            "supported: nf4, fp4"
        )
    return kind
