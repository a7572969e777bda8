"""Read a GGUF file: metadata, and tensors, mapped as they are or unpacked one at a time.

Source: the GGUF specification (ggml, MIT); block formats are unpacked by the `gguf` package.
"""

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from mmap import ACCESS_COPY, mmap
from pathlib import Path

import torch
from torch import Tensor

from models.families import CheckpointError
from models.weights import BLOCK_FORMATS, QuantizedBlocks

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_F32, _F16, _BF16 = 0, 1, 30
_PLAIN = {_F32: torch.float32, _F16: torch.float16, _BF16: torch.bfloat16}
_BLOCKS = {
    2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K",
    20: "IQ4_NL",
}  # fmt: skip
_OTHER = {24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"}
_PART = re.compile(r"(.+)-(\d{5})-of-((?!00000)\d{5})\.gguf", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufTensor:
    """Where one tensor lies.

    Attributes:
        part: number of the file it is in.
        shape: outermost dimension first, as torch counts.
        kind: ggml type number.
        offset: first byte, from the start of the file.
        num_bytes: how many it takes.
    """

    part: int
    shape: tuple[int, ...]
    kind: int
    offset: int
    num_bytes: int

    @property
    def end(self) -> int:
        """The byte after its last one."""
        return self.offset + self.num_bytes


def find_parts(path: Path) -> list[Path]:
    """Return the files of a GGUF model, any of which may be named; most models have one.

    Raises:
        CheckpointError: the name is that of a part, and others are not beside it.
    """
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    stem, _, count = match.groups()
    parts = [
        path.with_name(f"{stem}-{number:05}-of-{count}{path.suffix}")
        for number in range(1, int(count) + 1)
    ]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise CheckpointError(
            f"{path}: is one part of {int(count)}; missing beside it: {', '.join(missing)}"
        )
    return parts


class _Cursor:
    def __init__(self, data: mmap) -> None:
        self.data = data
        self.offset = 0

    def scalar(self, code: str) -> int | float | bool:
        (value,) = struct.unpack_from(code, self.data, self.offset)
        self.offset += struct.calcsize(code)
        return value

    def count(self, code: str = "<Q") -> int:
        return int(self.scalar(code))

    def string(self) -> str:
        length = self.count()
        end = self.offset + length
        if end > len(self.data):
            raise struct.error("string past the end")
        text = self.data[self.offset : end].decode("utf-8", errors="replace")
        self.offset = end
        return text

    def value(self, kind: int) -> object:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        item, length = self.count("<I"), self.count()
        if item in (_STRING, _ARRAY):
            return [self.value(item) for _ in range(length)]
        code = f"<{length}{_SCALARS[item][1:]}"
        values = list(struct.unpack_from(code, self.data, self.offset))
        self.offset += struct.calcsize(code)
        return values


class GgufFile:
    """An open GGUF file, with all of its parts where it is split.

    Attributes:
        path: the first file.
        metadata: key-value pairs; arrays are lists.
        tensors: what tensors there are, by name.
    """

    path: Path
    metadata: Mapping[str, object]
    tensors: Mapping[str, GgufTensor]

    def __init__(self, path: Path) -> None:
        """Read the headers and check that the tensors lie within the files, each by itself.

        Raises:
            CheckpointError: a file is missing, is no GGUF file or no such part, is truncated, uses
                an unknown type, or has a table of tensors that contradicts itself.
        """
        parts = find_parts(path)
        self.path = parts[0]
        self._data: list[mmap] = []
        self.metadata, self.tensors = {}, {}
        for part in parts:
            metadata, tensors = self._open(part)
            count = metadata.get("split.count", 1)
            if count != len(parts):
                raise CheckpointError(
                    f"{part}: says that the model has {count} parts, its name that it has "
                    f"{len(parts)}; name them NAME-00001-of-{count:05}.gguf and so on"
                )
            self.metadata = self.metadata or metadata
            if twice := sorted(self.tensors.keys() & tensors.keys()):
                raise CheckpointError(f"{part}: {twice[0]} is in an earlier part, too")
            self.tensors |= tensors

    def _open(self, path: Path) -> tuple[dict[str, object], dict[str, GgufTensor]]:
        """Map one file, and return its metadata and its tensors."""
        with path.open("rb") as stream:
            if stream.read(4) != _MAGIC:
                raise CheckpointError(f"{path}: not a GGUF file")
            # Private and writable, which torch asks for: nothing is copied until it is written.
            data = mmap(stream.fileno(), 0, access=ACCESS_COPY)
        self._data.append(data)
        try:
            metadata, tensors = self._read_header(path, data)
        except (struct.error, OverflowError, MemoryError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: truncated or damaged in its header; download it again"
            ) from error
        except KeyError as error:
            raise CheckpointError(f"{path}: unknown GGUF value type {error}") from error
        short = [name for name, tensor in tensors.items() if tensor.end > len(data)]
        if short:
            raise CheckpointError(
                f"{path}: truncated: {len(short)} of {len(tensors)} tensors lie past its end "
                f"({len(data)} bytes), the first {short[0]}; download it again"
            )
        placed = sorted(tensors.items(), key=lambda item: item[1].offset)
        for (name, tensor), (other, after) in pairwise(placed):
            if after.offset < tensor.end:
                raise CheckpointError(
                    f"{path}: {name} and {other} overlap: bytes {tensor.offset} to {tensor.end} "
                    f"and from {after.offset} on; download it again"
                )
        return metadata, tensors

    def _read_header(
        self, path: Path, data: mmap
    ) -> tuple[dict[str, object], dict[str, GgufTensor]]:
        cursor = _Cursor(data)
        cursor.offset = len(_MAGIC)
        version = cursor.count("<I")
        if version not in _VERSIONS:
            raise CheckpointError(
                f"{path}: GGUF version {version} is not supported; supported: {_VERSIONS}"
            )
        num_tensors, num_pairs = cursor.count(), cursor.count()
        metadata = {}
        for _ in range(num_pairs):
            key = cursor.string()
            metadata[key] = cursor.value(cursor.count("<I"))
        headers = {}
        for _ in range(num_tensors):
            name = cursor.string()
            shape = tuple(cursor.count() for _ in range(cursor.count("<I")))[::-1]
            if name in headers:
                raise CheckpointError(f"{path}: {name} is there twice")
            headers[name] = (shape, cursor.count("<I"), cursor.count())
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
            raise CheckpointError(
                f"{path}: general.alignment must be a multiple of 8, got {alignment!r}"
            )
        start = -(-cursor.offset // alignment) * alignment
        tensors = {}
        for name, (shape, kind, offset) in headers.items():
            if offset % alignment:
                raise CheckpointError(
                    f"{path}: {name} lies at {offset}, which is no multiple of {alignment}"
                )
            tensors[name] = GgufTensor(
                part=len(self._data) - 1,
                shape=shape,
                kind=kind,
                offset=start + offset,
                num_bytes=self._size(path, name, shape, kind),
            )
        return metadata, tensors

    @cached_property
    def _other_sizes(self) -> dict[int, tuple[int, int]]:
        from gguf.constants import GGML_QUANT_SIZES

        return {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}

    def _size(self, path: Path, name: str, shape: tuple[int, ...], kind: int) -> int:
        """Return the bytes that a tensor takes."""
        if kind in _PLAIN:
            values, size = 1, _PLAIN[kind].itemsize
        elif kind in _BLOCKS:
            values, size = BLOCK_FORMATS[_BLOCKS[kind]]
        elif kind in self._other_sizes:
            values, size = self._other_sizes[kind]
        else:
            raise CheckpointError(f"{path}: {name} has the unknown type {kind}")
        if not shape or not all(shape):
            raise CheckpointError(f"{path}: {name} has the shape {shape}, which holds nothing")
        if shape[-1] % values:
            raise CheckpointError(
                f"{path}: {name} has rows of {shape[-1]} values, its type has blocks of {values}"
            )
        return math.prod(shape) // values * size

    def is_packed(self, name: str) -> bool:
        """Tell whether a tensor is stored in a block format."""
        return self.tensors[name].kind not in _PLAIN

    @cached_property
    def _not_computable(self) -> str:
        """Say which tensors are in a block format that is not computed from its own codes."""
        from gguf.constants import GGMLQuantizationType

        known = _PLAIN.keys() | _BLOCKS.keys()
        names = [name for name, tensor in self.tensors.items() if tensor.kind not in known]
        kinds = {GGMLQuantizationType(self.tensors[name].kind).name for name in names}
        who = f"{names[0]} and {len(names) - 1} more are" if len(names) > 1 else f"{names[0]} is"
        return (
            f"{who} stored as {', '.join(sorted(kinds))}, which cannot be kept; what can be is "
            f"{', '.join(BLOCK_FORMATS)}, F16, BF16 and F32. Quantization nf4 converts the file"
        )

    def foreign_type(self, name: str) -> str | None:
        """Name the type that a tensor is stored in, if it is not read as 16- or 32-bit floats."""
        return _OTHER.get(self.tensors[name].kind)

    def read_stored(self, name: str) -> Tensor | QuantizedBlocks:
        """Return a tensor mapped from the file, matrices in block formats with their own codes.

        Raises:
            CheckpointError: the block format is not computed from its own codes.
        """
        tensor = self.tensors[name]
        if tensor.kind not in _PLAIN and tensor.kind not in _BLOCKS:
            raise CheckpointError(self._not_computable)
        if tensor.kind in _PLAIN or len(tensor.shape) != 2:
            return self.read(name)
        blocks = self._map(tensor, torch.uint8, range(tensor.shape[0]))
        return QuantizedBlocks(data=blocks, kind=_BLOCKS[tensor.kind])

    def _map(self, tensor: GgufTensor, dtype: torch.dtype, rows: range) -> Tensor:
        """Map rows of a tensor, whatever its bytes mean: (rows, ...) of a dtype."""
        start, stop = (row * tensor.num_bytes // tensor.shape[0] for row in (rows.start, rows.stop))
        flat = torch.frombuffer(
            self._data[tensor.part],
            dtype=dtype,
            count=(stop - start) // dtype.itemsize,
            offset=tensor.offset + start,
        )
        return flat.view(len(rows), *tensor.shape[1:-1], -1) if len(tensor.shape) > 1 else flat

    def read(self, name: str, rows: range | None = None) -> Tensor:
        """Return a tensor in its stored dtype, mapped; block formats exactly, as float32.

        Args:
            name: the tensor.
            rows: consecutive rows of it; None: all of it.

        Raises:
            CheckpointError: the block format cannot be unpacked.
        """
        tensor = self.tensors[name]
        rows = range(tensor.shape[0]) if rows is None else rows
        shape = (len(rows), *tensor.shape[1:])
        if tensor.kind in _PLAIN:
            return self._map(tensor, _PLAIN[tensor.kind], rows).view(shape)
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType(tensor.kind)
        blocks = self._map(tensor, torch.uint8, rows)
        try:
            return torch.from_numpy(dequantize(blocks.numpy(), kind)).view(shape)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path}: tensor {name} has the type {kind.name}, which cannot be unpacked"
            ) from error
