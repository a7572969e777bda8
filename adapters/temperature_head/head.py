"""Temperature heads as adapter folders."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.format import (
    AdapterConfig,
    AdapterError,
    Host,
    StoredAdapter,
    check_base,
    collect_problems,
    write_adapter,
)

METHOD = "temperature"
MAX_TEMPERATURE = 2.0
_MAX_WIDTH = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadConfig:
    """What `fields` of a temperature head's config hold.

    Attributes:
        width: K, middle units, 1 .. 4096.
        least, most: bounds of the temperature, 0 <= least < most <= 2.

    Raises:
        AdapterError: a value is not allowed.
    """

    width: int = 32
    least: float = 0.1
    most: float = 1.5

    def __post_init__(self) -> None:
        problems = []
        if not _is_number(self.width, int) or not 1 <= self.width <= _MAX_WIDTH:
            problems.append(f"width must be a whole number from 1 to {_MAX_WIDTH}")
        bounds = (self.least, self.most)
        if not all(_is_number(bound, int | float) for bound in bounds) or not (
            0 <= self.least < self.most <= MAX_TEMPERATURE
        ):
            problems.append(
                f"least and most must be numbers with 0 <= least < most <= {MAX_TEMPERATURE:g}, "
                f"got {self.least!r} and {self.most!r}"
            )
        if problems:
            raise AdapterError("; ".join(problems))


def _is_number(value: object, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TemperatureHead:
    """T = least + (most - least) * sigmoid(second . silu(first @ state + bias) + offset).

    Attributes:
        config: its sizes.
        first: (K, D) float32.
        bias: (K,) float32.
        second: (K,) float32.
        offset: () float32.
    """

    config: HeadConfig
    first: Tensor
    bias: Tensor
    second: Tensor
    offset: Tensor

    def temperatures(self, states: Tensor) -> Tensor:
        """Return (N,) temperatures of (N, D) states: final states of the model after its norm."""
        middle = F.silu(states @ self.first.T + self.bias)
        share = (middle @ self.second + self.offset).sigmoid()
        return self.config.least + (self.config.most - self.config.least) * share

    def temperature(self, state: Tensor) -> float:
        """Return the temperature for the token after a (D,) state."""
        return float(self.temperatures(state[None]))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, as they are stored."""
        return {name: getattr(self, name) for name in _shapes(self.config, self.first.shape[1])}


def _shapes(config: HeadConfig, hidden_size: int) -> dict[str, tuple[int, ...]]:
    return {
        "first": (config.width, hidden_size), "bias": (config.width,), "second": (config.width,),
        "offset": (),
    }  # fmt: skip


def build_head(stored: StoredAdapter, host: Host) -> TemperatureHead:
    """Hold a head against what it is to be attached to, and make it ready.

    Raises:
        AdapterError: it was not trained on this, or has tensors that are missing, unknown,
            misshapen or not finite; every one is named.
    """
    config = _parse(stored.config.fields)
    shapes = _shapes(config, host.spec.hidden_size)

    def check_tensors() -> None:
        problems = [
            f"{name}: not a tensor of a temperature head" for name in stored.tensors.keys() - shapes
        ]
        for name, shape in shapes.items():
            tensor = stored.tensors.get(name)
            if tensor is None:
                problems.append(f"{name}: missing")
            elif tuple(tensor.shape) != shape or not tensor.is_floating_point():
                problems.append(
                    f"{name}: {tensor.dtype} {tuple(tensor.shape)}, expected floats {shape}"
                )
            elif not tensor.isfinite().all():
                problems.append(f"{name}: holds values that are not finite")
        if problems:
            raise AdapterError("tensors do not fit the temperature head: " + "; ".join(problems))

    if problems := collect_problems(lambda: check_base(stored.config, host), check_tensors):
        raise AdapterError("; ".join(problems))
    tensors = {name: tensor.float().contiguous() for name, tensor in stored.tensors.items()}
    return TemperatureHead(config=config, **tensors)


def describe_head(stored: StoredAdapter) -> list[tuple[str, str]]:
    """Return rows of name and value that say what a head is.

    Raises:
        AdapterError: a field is unknown or has a value it may not have.
    """
    config = _parse(stored.config.fields)
    return [
        ("temperatures", f"{config.least:g} to {config.most:g}"),
        ("width", str(config.width)),
    ]


def _parse(given: Mapping[str, Any]) -> HeadConfig:
    known = {field.name for field in fields(HeadConfig)}
    if given.keys() != known:
        raise AdapterError(
            f"fields of a temperature head are {', '.join(sorted(known))}; got "
            f"{', '.join(sorted(given)) or 'none'}"
        )
    return HeadConfig(**given)


def save_head(
    folder: Path, head: TemperatureHead, host: Host, *, description: str, training: dict[str, Any]
) -> None:
    """Write a head as an adapter; one that was there is replaced as a whole or not at all.

    Raises:
        AdapterError: a number is not finite, or the folder cannot be written.
    """
    if not all(bool(torch.isfinite(tensor).all()) for tensor in head.tensors.values()):
        raise AdapterError(f"{folder}: the head has numbers that are not finite")
    about = AdapterConfig(
        method=METHOD, base_id=host.model_id, base_fingerprint=host.fingerprint,
        base_quantization=host.quantization, chain=host.chain, description=description,
        fields=asdict(head.config), training=training,
    )  # fmt: skip
    write_adapter(folder, about, head.tensors)
