"""Read a GGUF file: metadata, and tensors unpacked one at a time.

Source: the GGUF specification (ggml, MIT); block formats are unpacked by the `gguf` package.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from mmap import ACCESS_READ, mmap
from pathlib import Path

import torch
from torch import Tensor

from models.families import CheckpointError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_F32, _F16, _BF16 = 0, 1, 30
_PLAIN = {_F32: torch.float32, _F16: torch.float16, _BF16: torch.bfloat16}
_OTHER = (24, 25, 26, 27, 28)  # whole numbers and float64


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufTensor:
    """Where one tensor lies.

    Attributes:
        shape: outermost dimension first, as torch counts.
        kind: ggml type number.
        offset: first byte, from the start of the file.
    """

    shape: tuple[int, ...]
    kind: int
    offset: int


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
    """An open GGUF file.

    Attributes:
        path: the file.
        metadata: key-value pairs; arrays are lists.
        tensors: what tensors there are, by name.
    """

    path: Path
    metadata: Mapping[str, object]
    tensors: Mapping[str, GgufTensor]

    def __init__(self, path: Path) -> None:
        """Read the header and check that the tensors lie within the file.

        Raises:
            CheckpointError: the file is no GGUF file, is truncated or uses an unknown type.
        """
        self.path = path
        with path.open("rb") as stream:
            if stream.read(4) != _MAGIC:
                raise CheckpointError(f"{path}: not a GGUF file")
            self._data = mmap(stream.fileno(), 0, access=ACCESS_READ)
        try:
            self.metadata, self.tensors = self._read_header()
        except (struct.error, OverflowError, MemoryError) as error:
            raise CheckpointError(
                f"{path}: truncated or damaged in its header; download it again"
            ) from error
        except KeyError as error:
            raise CheckpointError(f"{path}: unknown GGUF value type {error}") from error
        short = [n for n, t in self.tensors.items() if self._end(t) > len(self._data)]
        if short:
            raise CheckpointError(
                f"{path}: truncated: {len(short)} of {len(self.tensors)} tensors lie past its end "
                f"({len(self._data)} bytes), the first {short[0]}; download it again"
            )

    def _read_header(self) -> tuple[dict[str, object], dict[str, GgufTensor]]:
        cursor = _Cursor(self._data)
        cursor.offset = len(_MAGIC)
        version = cursor.count("<I")
        if version not in _VERSIONS:
            raise CheckpointError(
                f"{self.path}: GGUF version {version} is not supported; supported: {_VERSIONS}"
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
            headers[name] = (shape, cursor.count("<I"), cursor.count())
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise CheckpointError(f"{self.path}: general.alignment {alignment!r} is no alignment")
        start = -(-cursor.offset // alignment) * alignment
        tensors = {
            name: GgufTensor(shape=shape, kind=kind, offset=start + offset)
            for name, (shape, kind, offset) in headers.items()
        }
        return metadata, tensors

    @cached_property
    def _block_sizes(self) -> dict[int, tuple[int, int]]:
        from gguf.constants import GGML_QUANT_SIZES

        return {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}

    def _end(self, tensor: GgufTensor) -> int:
        if tensor.kind not in self._block_sizes:
            raise CheckpointError(f"{self.path}: unknown tensor type {tensor.kind}")
        values, size = self._block_sizes[tensor.kind]
        return tensor.offset + torch.Size(tensor.shape).numel() // values * size

    def is_packed(self, name: str) -> bool:
        """Tell whether a tensor is stored in a block format."""
        return self.tensors[name].kind not in _PLAIN

    def is_float(self, name: str) -> bool:
        """Tell whether a tensor is read as 16- or 32-bit floating point."""
        return self.tensors[name].kind not in _OTHER

    def read(self, name: str, rows: range | None = None) -> Tensor:
        """Return a tensor in its stored dtype, block formats exactly as float32.

        Args:
            name: the tensor.
            rows: consecutive rows of it; None: all of it.

        Raises:
            CheckpointError: the block format cannot be unpacked.
        """
        tensor = self.tensors[name]
        rows = range(tensor.shape[0]) if rows is None else rows
        row_bytes = (self._end(tensor) - tensor.offset) // tensor.shape[0]
        start = tensor.offset + rows.start * row_bytes
        data = memoryview(self._data)[start : start + len(rows) * row_bytes]
        shape = (len(rows), *tensor.shape[1:])
        if tensor.kind in _PLAIN:
            return torch.frombuffer(bytearray(data), dtype=_PLAIN[tensor.kind]).view(shape)
        import numpy as np
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType(tensor.kind)
        blocks = np.frombuffer(data, dtype=np.uint8).reshape(*shape[:-1], -1)
        try:
            return torch.from_numpy(dequantize(blocks, kind)).view(shape)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path}: tensor {name} has the type {kind.name}, which cannot be unpacked"
            ) from error
