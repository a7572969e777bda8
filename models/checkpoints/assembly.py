"""Gather a checkpoint's tensors into the decoder's canonical weights."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from models.checkpoints.four_bit import (
    PARTS,
    quantized_kind,
    read_quantized,
    read_state,
)
from models.checkpoints.tensor_files import TensorReader
from models.families import CheckpointError, ModelDescription
from models.spec import canonical_weights
from models.weights import LowRank, Matrix, Quantized4Bit, Weight, select_rows

_MAX_NAMED = 5


def check_tensors(description: ModelDescription, reader: TensorReader, origin: Path) -> None:
    """Compare the tensors of a checkpoint with what its config promises.

    Args:
        description: the model.
        reader: its tensors.
        origin: folder or file, for the message.

    Raises:
        CheckpointError: tensors are missing, misshapen or unexpected; all are named.
    """
    expected = expected_shapes(description)
    problems = []
    for name, shape in expected.items():
        if name not in reader.shapes:
            problems.append(f"missing {name} {shape}")
            continue
        kind = quantized_kind(reader.shapes, name)
        try:
            found = read_state(reader, name, kind).shape if kind else reader.shapes[name]
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if found != shape:
            problems.append(f"{name} must have the shape {shape}, got {found}")
        elif not kind and (stored := reader.foreign_type(name)):
            problems.append(
                f"{name} is stored as {stored}; what can be read is F32, F16, BF16 and "
                "bitsandbytes' 4-bit format"
            )
    problems += [f"unexpected {name}" for name in _unexpected(description, reader, set(expected))]
    if problems:
        raise CheckpointError(
            f"{origin}: the tensors do not fit config.json: " + "; ".join(problems)
        )


def expected_shapes(description: ModelDescription) -> dict[str, tuple[int, ...]]:
    """Give the shape of every tensor that a checkpoint must hold, by its name there."""
    shapes = {name: shape for name, shape, _ in canonical_weights(description.spec)}
    fused_rows: dict[str, int] = defaultdict(int)
    expected = {}
    for canonical, source in description.sources.items():
        shape = shapes[canonical]
        if source.rows is not None:
            fused_rows[source.name] += len(source.rows)
            shape = (fused_rows[source.name], *shape[1:])
        expected[source.name] = shape
    return expected


def _unexpected(
    description: ModelDescription, reader: TensorReader, expected: set[str]
) -> list[str]:
    parts = {f"{name}.{part}" for name in expected for part in PARTS}
    patterns = [re.compile(pattern) for pattern in description.ignored]
    head = f"{description.head_module}.weight"
    return sorted(
        name
        for name in reader.shapes
        if name not in expected
        and name not in parts
        and not (description.spec.tied_head and name == head)
        and not any(pattern.fullmatch(name) for pattern in patterns)
    )


def assemble_weights(
    description: ModelDescription, reader: TensorReader, origin: Path
) -> dict[str, Weight]:
    """Read every weight of the decoder, quantised ones with their own codes.

    Args:
        description: the model.
        reader: its tensors.
        origin: folder or file, for messages.

    Returns:
        Weights by canonical name; dense ones keep their stored dtype.

    Raises:
        CheckpointError: the tensors do not fit; every mismatch is named.
    """
    check_tensors(description, reader, origin)
    fused: dict[str, Matrix] = {}
    weights: dict[str, Weight] = {}
    problems = []
    for canonical, source in description.sources.items():
        try:
            if source.rows is None:
                weights[canonical] = _read(reader, source.name)
                continue
            if source.name not in fused:
                fused[source.name] = _read(reader, source.name)
            weights[canonical] = select_rows(fused[source.name], source.rows)
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError(f"{origin}: {'; '.join(dict.fromkeys(problems))}")
    return weights


def check_finite(
    weights: Mapping[str, Weight], description: ModelDescription, origin: Path
) -> None:
    """Refuse weights that hold what is no number; of quantised ones the scales tell.

    Args:
        weights: by canonical name, as they come from a checkpoint.
        description: the model, for the tensors' names there.
        origin: folder or file, for the message.

    Raises:
        CheckpointError: names the first few of them.
    """
    bad = [
        description.sources[name].name
        for name, weight in weights.items()
        if not is_finite(_scales(weight))
    ]
    if bad:
        raise CheckpointError(describe_not_finite(origin, list(dict.fromkeys(bad))))


def _scales(weight: Weight) -> Tensor:
    """Return what tells whether a weight holds numbers only: its scales, or a dense one itself."""
    assert not isinstance(weight, LowRank)
    if isinstance(weight, Tensor):
        return weight
    return weight.absmax if isinstance(weight, Quantized4Bit) else weight.scales


def is_finite(tensor: Tensor) -> bool:
    """Tell whether all values are numbers: one pass, without a copy."""
    return all(map(math.isfinite, (float(value) for value in tensor.aminmax())))


def describe_not_finite(origin: Path, names: Sequence[str]) -> str:
    """Return the message about tensors that are no numbers."""
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return (
        f"{origin}: {', '.join(names[:_MAX_NAMED])}{more}: NaN or infinity among the values, so no "
        "answer of this model would mean anything; fetch or export it again"
    )


def _read(reader: TensorReader, name: str) -> Matrix:
    kind = quantized_kind(reader.shapes, name)
    return reader.read_stored(name) if kind is None else read_quantized(reader, name, kind)
