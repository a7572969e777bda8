"""Mixed-rank variants as adapter folders: two thin factors in place of some matrices."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.format import (
    AdapterConfig,
    AdapterError,
    Host,
    StoredAdapter,
    check_base,
    check_field_names,
    collect_problems,
    shortened,
    write_adapter,
)
from adapters.mixed_rank.compress_config import CHOICES, GROUP, Calibration, Form, Metric, Plan
from adapters.mixed_rank.quantize import KINDS
from adapters.mixed_rank.ranks import break_even
from models.checkpoints.derived import Derivation
from models.spec import DecoderSpec, canonical_weights
from models.weights import BLOCK_FORMATS, LowRank, Matrix, QuantizedBlocks, Weight

METHOD = "mixed_rank"
_JOIN = "+"


@dataclass(frozen=True, kw_only=True, slots=True)
class MixedRankConfig:
    """A mixed-rank variant's description.

    Attributes:
        ranks: of what matrices are factored together, such as "layers.3.q+k+v"; None: they stay.
        form: what the factors are rounded to.
        plan: ranks chosen for each matrix, or one share for all.
        calibration: what the factors were fitted to: the covariance of the inputs, a mean input in
            their place, or nothing, which is plain SVD.
        metric: what lost parts of outputs count by: what they do to the loss, or all alike.
        is_compensated: each layer makes up for what those before it have lost.
        remove_linears, remove_total: shares of the parameters that are removed, of the linears and
            of the whole model.
    """

    ranks: Mapping[str, int | None]
    form: Form
    plan: Plan
    calibration: Calibration
    metric: Metric
    is_compensated: bool
    remove_linears: float
    remove_total: float

    def __post_init__(self) -> None:
        if problems := list(_find_problems(self)):
            raise AdapterError("; ".join(problems))

    def to_fields(self) -> dict[str, Any]:
        """Return JSON values that `from_fields` makes the same config of."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


def from_fields(values: Mapping[str, Any]) -> MixedRankConfig:
    """Read a config from JSON values.

    Raises:
        AdapterError: names every field that is unknown, missing or has a value it may not have.
    """
    known = {item.name for item in fields(MixedRankConfig)}
    check_field_names(values, known, METHOD)
    return MixedRankConfig(**values)


def group_name(names: Sequence[str]) -> str:
    """Name linears of one layer that are factored together: "layers.3.q+k+v"."""
    prefix, _, _ = names[0].rpartition(".")
    return f"{prefix}.{_JOIN.join(name.rpartition('.')[2] for name in names)}"


def group_members(name: str) -> tuple[str, ...]:
    """Return the linears that a name of `group_name` stands for."""
    prefix, _, members = name.rpartition(".")
    return tuple(f"{prefix}.{member}" for member in members.split(_JOIN))


def save_mixed_rank(
    folder: Path,
    factors: Mapping[str, tuple[Sequence[Matrix], Matrix]],
    config: MixedRankConfig,
    *,
    host: Host,
    description: str = "",
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write a variant as an adapter; one that was there is replaced as a whole or not at all.

    Args:
        folder: made if missing; its other files are left alone.
        factors: of each group whose rank is not None: a left factor for each of its members, and
            the right one that they share.
        config: what it is.
        host: what it was made for, as it is served.
        description, training: see `AdapterConfig`.

    Raises:
        AdapterError: the folder cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for group, (lefts, right) in factors.items():
        members = group_members(group)
        for member, left in zip(members, lefts, strict=True):
            tensors[f"{member}.left"] = _stored(left)
        tensors[f"{members[0]}.right"] = _stored(right)
    about = AdapterConfig(
        method=METHOD, base_id=host.model_id, base_fingerprint=host.fingerprint,
        base_quantization=host.quantization, chain=host.chain, description=description,
        fields=config.to_fields(), training=dict(training or {}),
    )  # fmt: skip
    write_adapter(folder, about, tensors)


def derive_mixed_rank(stored: StoredAdapter, host: Host) -> Derivation:
    """Hold a variant against what it is made of, and say what it has in place of its matrices.

    Raises:
        AdapterError: it is not for this base, or has fields or factors that are missing, unknown,
            wrong or contradict each other; every one is named.
    """
    config = from_fields(stored.config.fields)
    found: list[dict[str, Weight]] = []
    if problems := collect_problems(
        lambda: check_base(stored.config, host),
        lambda: found.append(_read_factors(config, host.spec, stored.tensors)),
    ):
        raise AdapterError("; ".join(problems))
    return Derivation.of_weights(stored.digest, host.spec, found[0])


def describe_mixed_rank(stored: StoredAdapter) -> list[tuple[str, str]]:
    """Return rows of name and value that say what a variant is.

    Raises:
        AdapterError: a field is unknown, missing or has a value it may not have.
    """
    config = from_fields(stored.config.fields)
    rows = [
        ("removed of linears", f"{config.remove_linears:.1%}"),
        ("removed of model", f"{config.remove_total:.1%}"),
        ("factors", config.form),
        ("ranks", config.plan),
        ("fitted to", f"{config.calibration}{', compensated' if config.is_compensated else ''}"),
    ]
    by_kind: dict[str, list[int | None]] = {}
    for name, rank in config.ranks.items():
        by_kind.setdefault(name.rpartition(".")[2], []).append(rank)
    for kind, ranks in by_kind.items():
        factored = [rank for rank in ranks if rank is not None]
        whole = len(ranks) - len(factored)
        text = f"{sum(factored) / len(factored):.1f} ({min(factored)} to {max(factored)})" if (
            factored) else "none"  # fmt: skip
        rows.append((f"ranks: {kind}", text + (f", {whole} whole" if whole else "")))
    return rows


def _stored(matrix: Matrix) -> Tensor:
    if isinstance(matrix, QuantizedBlocks):
        return matrix.data
    assert isinstance(matrix, Tensor)
    return matrix


def _find_problems(config: MixedRankConfig) -> Iterator[str]:
    def is_rank(value: object) -> bool:
        return value is None or (type(value) is int and value >= 1)

    if not isinstance(config.ranks, Mapping) or not config.ranks:
        yield f"ranks must be an object of ranks by linears, got {shortened(config.ranks)}"
    else:
        for name, rank in config.ranks.items():
            if not isinstance(name, str) or not is_rank(rank):
                yield (
                    f"ranks: {shortened(name)} must be an integer of at least 1 or null, got "
                    f"{shortened(rank)}"
                )
    choices: Mapping[str, Sequence[object]] = {**CHOICES, "is_compensated": (False, True)}
    for name, allowed in choices.items():
        value = getattr(config, name)
        if not any(value is each or (type(value) is str and value == each) for each in allowed):
            yield (f"{name} must be one of {', '.join(map(str, allowed))}, got {shortened(value)}")
    for name in ("remove_linears", "remove_total"):
        share = getattr(config, name)
        if type(share) not in (int, float) or not 0 <= share < 1:
            yield f"{name} must be a number from 0 to below 1, got {shortened(share)}"


def _read_factors(
    config: MixedRankConfig, spec: DecoderSpec, tensors: Mapping[str, Tensor]
) -> dict[str, Weight]:
    """Hold a variant's tensors against its config and its base; return them as weights.

    Raises:
        AdapterError: names everything that is wrong.
    """
    shapes = {
        name.removesuffix(".weight"): shape
        for name, shape, _ in canonical_weights(spec)
        if name.startswith("layers.") and len(shape) == 2
    }
    problems, unknown = [], set(tensors)
    weights: dict[str, Weight] = {}
    seen: set[str] = set()
    left_kind, right_kind = KINDS[config.form]
    for group, rank in config.ranks.items():
        members = group_members(group)
        missing = [name for name in members if name not in shapes or name in seen]
        seen.update(members)
        widths = {shapes[name][1] for name in members if name in shapes}
        if missing or len(widths) != 1:
            problems.append(
                f"ranks: {shortened(group)} names no linears of this decoder that share an input"
            )
            continue
        if rank is None:
            continue
        (inputs,) = widths
        outputs = sum(shapes[name][0] for name in members)
        if rank >= break_even(outputs, inputs):
            problems.append(
                f"ranks: {group} must be below {break_even(outputs, inputs)}, where factors are no "
                f"smaller than the matrix, got {rank}"
            )
            continue
        if config.form != "float16" and (rank % GROUP or inputs % GROUP):
            problems.append(
                f"ranks: {group} must be a multiple of {GROUP} with {config.form} factors, got "
                f"{rank}"
            )
            continue
        wanted = {f"{members[0]}.right": ((rank, inputs), right_kind)} | {
            f"{name}.left": ((shapes[name][0], rank), left_kind) for name in members
        }
        unknown -= set(wanted)
        read: dict[str, Matrix] = {}
        for name, (shape, kind) in wanted.items():
            problem, matrix = _read_matrix(tensors.get(name), shape, kind)
            if matrix is None:
                problems.append(f"{name}: {problem}")
            else:
                read[name] = matrix
        if len(read) == len(wanted):
            right = read[f"{members[0]}.right"]
            for name in members:
                weights[f"{name}.weight"] = LowRank(left=read[f"{name}.left"], right=right)
    problems += [f"{name}: not a tensor of this variant" for name in sorted(unknown)]
    if problems:
        raise AdapterError("the variant does not fit the base: " + "; ".join(problems))
    return weights


def _read_matrix(
    tensor: Tensor | None, shape: tuple[int, int], kind: str | None
) -> tuple[str, Matrix | None]:
    """Return what is wrong with a factor, or the factor."""
    if tensor is None:
        return "missing", None
    dtype, stored = torch.float16, shape
    if kind is not None:
        values, size = BLOCK_FORMATS[kind]
        dtype, stored = torch.uint8, (shape[0], shape[1] // values * size)
    if tensor.dtype != dtype or tuple(tensor.shape) != stored:
        return (
            f"must be {dtype} of shape {stored}, got {tensor.dtype} of {tuple(tensor.shape)}", None
        )  # fmt: skip
    if kind is None:
        matrix: Matrix = tensor
        is_finite = bool(tensor.isfinite().all())
    else:
        matrix = QuantizedBlocks(data=tensor, kind=kind)
        is_finite = bool(matrix.scales.isfinite().all())
    return ("", matrix) if is_finite else ("has values that are no finite numbers", None)
