"""Read bitsandbytes' 4-bit tensors without bitsandbytes.

A weight `W` is stored as `W` (codes) with `W.absmax`, `W.quant_map` and
`W.quant_state.bitsandbytes__KIND`, a JSON object kept as bytes. With double quantisation
`W.absmax` holds 8-bit codes, `W.nested_quant_map` and `W.nested_absmax` undo them, and the JSON
object has their offset.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from models.checkpoints.tensor_files import TensorReader
from models.families import CheckpointError
from models.weights import Quantized4Bit

KINDS = ("nf4", "fp4")
_STATE = "quant_state.bitsandbytes__"
PARTS = (
    "absmax",
    "quant_map",
    "nested_absmax",
    "nested_quant_map",
    *(f"{_STATE}{kind}" for kind in KINDS),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantState:
    """The JSON object stored with a 4-bit weight.

    Attributes:
        shape: (out_features, in_features).
        block_size: values per scale.
        nested_block_size: scales per scale of scales; None without double quantisation.
        nested_offset: added to every scale after undoing double quantisation.
    """

    shape: tuple[int, int]
    block_size: int
    nested_block_size: int | None = None
    nested_offset: float = 0.0


def quantized_kind(shapes: Mapping[str, object], name: str) -> str | None:
    """Return "nf4" or "fp4" if the tensor is a 4-bit weight, else None."""
    return next((kind for kind in KINDS if f"{name}.{_STATE}{kind}" in shapes), None)


def stored_kind(shapes: Iterable[str]) -> str | None:
    """Return the kind of the 4-bit weights among a checkpoint's tensors; None if there are none."""
    return next(
        (kind for kind in KINDS for name in shapes if name.endswith(f".{_STATE}{kind}")), None
    )


def read_state(reader: TensorReader, name: str, kind: str) -> QuantState:
    """Read the JSON object of a 4-bit weight.

    Raises:
        CheckpointError: it is damaged.
    """
    raw = bytes(reader.read(f"{name}.{_STATE}{kind}").tolist())
    try:
        value = json.loads(raw)
        rows, columns = (int(n) for n in value["shape"])
        nested = value.get("nested_blocksize")
        state = QuantState(
            shape=(rows, columns),
            block_size=int(value["blocksize"]),
            nested_block_size=None if nested is None else int(nested),
            nested_offset=float(value.get("nested_offset") or 0.0),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{name}: unreadable 4-bit state ({error})") from error
    if min(*state.shape, state.block_size, state.nested_block_size or 1) < 1:
        raise CheckpointError(f"{name}: 4-bit state with sizes below 1: {state}")
    return state


def read_quantized(reader: TensorReader, name: str, kind: str) -> Quantized4Bit:
    """Read a 4-bit weight and undo the double quantisation of its scales.

    Args:
        reader: the checkpoint's tensors.
        name: the weight's name.
        kind: "nf4" or "fp4", from `quantized_kind`.

    Raises:
        CheckpointError: a part is missing or has the wrong size.
    """
    state = read_state(reader, name, kind)
    needed = ["absmax", "quant_map"]
    if state.nested_block_size is not None:
        needed += ["nested_absmax", "nested_quant_map"]
    missing = [f"{name}.{part}" for part in needed if f"{name}.{part}" not in reader.shapes]
    if missing:
        raise CheckpointError(f"missing tensors: {', '.join(missing)}")
    packed = reader.read(name).view(torch.uint8).flatten()
    scales = reader.read(f"{name}.absmax").flatten()
    if state.nested_block_size is not None:
        scales = undo_double_quantization(
            scales,
            codebook=reader.read(f"{name}.nested_quant_map"),
            absmax=reader.read(f"{name}.nested_absmax").flatten(),
            block_size=state.nested_block_size,
            offset=state.nested_offset,
        )
    count = state.shape[0] * state.shape[1]
    codebook = reader.read(f"{name}.quant_map").float()
    sizes = (packed.numel(), scales.numel(), codebook.numel())
    expected = (-(-count // 2), -(-count // state.block_size), 16)
    if sizes != expected:
        raise CheckpointError(
            f"{name}: codes, scales and codebook of a {state.shape} matrix must have {expected} "
            f"values, got {sizes}"
        )
    return Quantized4Bit(
        packed=packed,
        absmax=scales.float(),
        codebook=codebook,
        shape=state.shape,
        block_size=state.block_size,
    )


def undo_double_quantization(
    codes: Tensor, *, codebook: Tensor, absmax: Tensor, block_size: int, offset: float
) -> Tensor:
    """Return the scales that were stored as 8-bit codes.

    Args:
        codes: (N,) uint8.
        codebook: (256,) float32 value of each code.
        absmax: (ceil(N / block_size),) float32 scale of each block of codes.
        block_size: codes per scale.
        offset: added to every value.

    Returns:
        (N,) float32.

    Raises:
        CheckpointError: there are too few scales for the codes.
    """
    if absmax.numel() != -(-codes.numel() // block_size) or codebook.numel() != 256:
        raise CheckpointError(
            f"{codes.numel()} 8-bit scales in blocks of {block_size} need "
            f"{-(-codes.numel() // block_size)} scales and 256 codes, got {absmax.numel()} and "
            f"{codebook.numel()}"
        )
    scales = absmax.repeat_interleave(block_size)[: codes.numel()]
    return codebook[codes.long()] * scales + offset
