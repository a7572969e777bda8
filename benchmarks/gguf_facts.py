"""Sizes of a model in a GGUF file that comparisons count with."""

from dataclasses import dataclass
from math import prod
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES

from models.checkpoints.gguf_file import GgufFile, find_parts
from models.checkpoints.gguf_model import GgufModel

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_CACHED_BYTES = 2  # of a key's or value's number, float16


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufFacts:
    """Sizes of a model.

    Attributes:
        num_parameters: numbers in all tensors.
        file_bytes: size of the file, or of all parts of it.
        weight_bytes_per_token: of the tensors that computing a token reads whole: all of them, but
            not an embedding that is not the head too.
        cache_bytes_per_token: keys and values of a token in all layers, as float16.
    """

    num_parameters: int
    file_bytes: int
    weight_bytes_per_token: int
    cache_bytes_per_token: int


def read_facts(path: Path) -> GgufFacts:
    """Read them from the file's header.

    Raises:
        CheckpointError: it is no GGUF file of a model that is supported.
    """
    file = GgufFile(path)
    model = GgufModel(file)
    sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
    numbers = {name: prod(tensor.shape) for name, tensor in file.tensors.items()}
    stored = {
        name: numbers[name] // sizes[tensor.kind][0] * sizes[tensor.kind][1]
        for name, tensor in file.tensors.items()
    }
    layers = {name.split(".")[1] for name in stored if name.startswith("blk.")}
    unread = stored[_EMBEDDING] if _HEAD in stored else 0
    return GgufFacts(
        num_parameters=sum(numbers.values()),
        file_bytes=sum(part.stat().st_size for part in find_parts(path)),
        weight_bytes_per_token=sum(stored.values()) - unread,
        cache_bytes_per_token=len(layers) * 2 * model.num_kv_heads * model.head_dim * _CACHED_BYTES,
    )
