"""What whoever starts vLLM tells its workers, as JSON in `VllmConfig.additional_config`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

from models.checkpoints import Checkpoint
from models.side import SideNetwork
from serve.base_model import load_base, load_variant
from serve.model_options import ModelOptions
from serve.options import ConfigError

SUPPORTED = "0.32"
"""The version of vLLM whose interfaces, some of them private, are used."""
KEY = "proa"
"""Of `additional_config`."""

Heads: TypeAlias = tuple[tuple[int, int, int], ...]
"""Attention of a side network: heads, KV heads and width of a head, for each layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the workers load, and what side networks they make room for.

    Attributes:
        model, quantization, cache_dir, dequantize, kernels, threads: see `ModelOptions`.
        variants: folders of the variants, in any order, that the model is made of; none: the base.
        side_heads: attention of the side networks that may come.
        reports: ZeroMQ address that reports of what the sampler did go to; "": nobody reads them.
    """

    model: str | None = None
    quantization: str = "auto"
    cache_dir: str | None = None
    dequantize: bool = False
    kernels: str = "auto"
    threads: int | str = "auto"
    variants: tuple[str, ...] = ()
    side_heads: tuple[Heads, ...] = ()
    reports: str = ""

    @property
    def model_options(self) -> ModelOptions:
        """What is said of the model."""
        return ModelOptions(
            model=self.model, quantization=self.quantization, cache_dir=self.cache_dir,
            dequantize=self.dequantize, kernels=self.kernels, threads=self.threads,
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Return what `read_settings` makes the same settings of."""
        return asdict(self)

    def load(self) -> Checkpoint:
        """Load the base, or the variant.

        Raises:
            CheckpointError, AdapterError: it cannot be found, read or derived.
        """
        base = load_base(self.model_options, report=_silent)
        folders = [Path(folder) for folder in self.variants]
        if not folders:
            return base
        return load_variant(self.model_options, base, folders, report=_silent)


def _silent(_: str) -> None:
    """Report to nobody: whoever started vLLM has loaded the same and reported it."""


def read_settings(additional_config: object) -> Settings | None:
    """Read the settings of a vLLM engine; None: it is not for us.

    Raises:
        ConfigError: they have an unknown field or a bad value; the message names it.
    """
    values = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
    if values is None:
        return None
    if not isinstance(values, Mapping):
        raise ConfigError(f"additional_config.{KEY} must be an object, got {values!r}")
    known = {item.name for item in fields(Settings)}
    if unknown := sorted(set(values) - known):
        raise ConfigError(
            f"additional_config.{KEY}: unknown {', '.join(unknown)}; known: "
            f"{', '.join(sorted(known))}"
        )
    return Settings(**{name: _tuples(value) for name, value in values.items()})


def _tuples(value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_tuples(item) for item in value)
    return value


def heads_of(network: SideNetwork) -> Heads:
    """Return the attention of a side network."""
    return tuple(
        (layer.num_attention_heads, layer.num_key_value_heads, layer.head_dim)
        for layer in network.spec.layers
    )
