"""What a pruned variant says about itself, apart from its index lists.

The paper's symbols: rho, the share removed of the whole model, is `remove_total`; the kept share p
of the layers' linears is 1 - `remove_linears`. Source: DISP-LLM, arXiv 2410.11988.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from adapters.disp.search_config import Residual
from adapters.format import AdapterError, check_field_names, shortened
from models.pruning import MODULES, count_fixed, count_linears, widths_of
from models.spec import DecoderSpec

_TOLERANCE = 1e-6  # of the shares, which are kept to be read


@dataclass(frozen=True, kw_only=True, slots=True)
class DispConfig:
    """A pruned variant's description.

    Attributes:
        widths: channels kept by each of `MODULES`, for each layer.
        remove_linears: share of the parameters of the layers' linears that is removed, in 0 .. 1.
        remove_total: the same of the whole model, embeddings and norms included, biases not.
        align: each width is a multiple of it, or the full one.
        residual: "independent": each block reads and writes channels of its own; "shared": one set
            of residual channels for all of them (dimension-dependent pruning).
        dense_fingerprint: the base's fingerprint without quantisation; "" if it has none.
        stat: which channels the norms' statistics run over; all of them: "full".
    """

    widths: tuple[tuple[int, ...], ...]
    remove_linears: float
    remove_total: float
    align: int
    residual: Residual
    dense_fingerprint: str
    stat: Literal["full"] = "full"

    def __post_init__(self) -> None:
        if problems := list(_find_problems(self)):
            raise AdapterError("; ".join(problems))

    def find_contradictions(self, spec: DecoderSpec) -> Iterator[str]:
        """Yield what does not fit a base, or itself.

        Args:
            spec: of the base, not pruned.
        """
        full = widths_of(spec)
        if len(self.widths) != len(full):
            yield f"widths must be for {len(full)} layers, got {len(self.widths)}"
            return
        is_possible = True
        for i, (kept, limits) in enumerate(zip(self.widths, full, strict=True)):
            for module, width, limit in zip(MODULES, kept, limits, strict=True):
                if width > limit:
                    is_possible = False
                    yield f"widths: layer {i}, {module} must be 1 to {limit}, got {width}"
                elif width % self.align and width != limit:
                    yield (
                        f"widths: layer {i}, {module} must be a multiple of align {self.align} or "
                        f"{limit}, got {width}"
                    )
        if is_possible:
            for name, share in zip(
                ("remove_linears", "remove_total"), removed_shares(spec, self.widths), strict=True
            ):
                if abs(getattr(self, name) - share) > _TOLERANCE:
                    given = getattr(self, name)
                    yield f"{name} must be {share:.7g}, as widths say, got {given!r}"

    def to_fields(self) -> dict[str, Any]:
        """Return JSON values that `from_fields` makes the same config of."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return values | {"widths": [list(layer) for layer in self.widths]}


def from_fields(values: Mapping[str, Any]) -> DispConfig:
    """Read a config from JSON values.

    Raises:
        AdapterError: names every field that is unknown, missing or has a value it may not have.
    """
    known = {item.name for item in fields(DispConfig)}
    check_field_names(values, known, "disp")
    widths = values["widths"]
    if isinstance(widths, list):
        widths = tuple(tuple(layer) if isinstance(layer, list) else layer for layer in widths)
    return DispConfig(**{**values, "widths": widths})


def removed_shares(spec: DecoderSpec, widths: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Return the shares of parameters that widths remove, in 0 .. 1.

    Args:
        spec: of the base, not pruned.
        widths: channels kept by each of `MODULES`, for each layer.

    Returns:
        Of the layers' linears, and of the whole model (biases are counted in neither).
    """
    total = count_linears(spec, widths_of(spec))
    removed = total - count_linears(spec, widths)
    return removed / total, removed / (total + count_fixed(spec))


def _find_problems(config: DispConfig) -> Iterator[str]:
    def is_count(value: object) -> bool:
        return type(value) is int and value >= 1

    def is_layer(value: object) -> bool:
        return isinstance(value, tuple) and len(value) == len(MODULES) and all(map(is_count, value))

    if not isinstance(config.widths, tuple) or not config.widths:
        yield f"widths must be a list of one list for each layer, got {shortened(config.widths)}"
    else:
        wrong = next((i for i, layer in enumerate(config.widths) if not is_layer(layer)), None)
        if wrong is not None:
            yield (
                f"widths: layer {wrong} must have {len(MODULES)} integers of at least 1 "
                f"({', '.join(MODULES)}), got {shortened(config.widths[wrong])}"
            )
    for name in ("remove_linears", "remove_total"):
        share = getattr(config, name)
        if type(share) not in (int, float) or not 0 <= share < 1:
            yield f"{name} must be a number from 0 to below 1, got {shortened(share)}"
    if not is_count(config.align):
        yield f"align must be an integer of at least 1, got {shortened(config.align)}"
    choices = get_args(Residual)
    if config.residual not in choices:
        yield f"residual must be one of {', '.join(choices)}, got {shortened(config.residual)}"
    found = config.dense_fingerprint
    if not isinstance(found, str) or not re.fullmatch("([0-9a-f]{64})?", found):
        yield f"dense_fingerprint must be 64 hexadecimal digits or empty, got {shortened(found)}"
    if config.stat != "full":
        yield f"stat must be 'full', got {shortened(config.stat)}"
