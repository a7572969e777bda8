"""What whoever starts vLLM tells its workers, as JSON in `VllmConfig.additional_config`."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

from adapters.format import AdapterError, read_config
from adapters.qst.adapter import METHOD as QST
from adapters.qst.config import from_fields
from models.checkpoints import Checkpoint
from models.fork import ForkNetwork
from models.side import SideNetwork
from models.spec import DecoderSpec
from serve.base_model import load_base, load_variant
from serve.config import ServeConfig
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
        model, quantization, cache_dir, dequantize, kernels: see `ModelOptions`.
        variants: folders of the variants, in any order, that the model is made of; none: the base.
        adapters: folders of side networks that may come; room is made for their caches.
        cores: of each rank, on the CPU; none: those that it may use.
        reports: ZeroMQ address that reports of what the sampler did go to; "": nobody reads them.
    """

    model: str | None = None
    quantization: str = "auto"
    cache_dir: str | None = None
    dequantize: bool = False
    kernels: str = "auto"
    variants: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    cores: tuple[tuple[int, ...], ...] = ()
    reports: str = ""

    @property
    def model_options(self) -> ModelOptions:
        """What is said of the model."""
        return ModelOptions(
            model=self.model, quantization=self.quantization, cache_dir=self.cache_dir,
            dequantize=self.dequantize, kernels=self.kernels,
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


def divide_cores(config: ServeConfig) -> list[list[int]]:
    """Divide the cores that this process may use, as many as it has threads, among the ranks.

    Args:
        config: device and threads resolved; on a GPU there is nothing to divide.
    """
    if config.device != "cpu":
        return []
    given = sorted(os.sched_getaffinity(0))[: int(config.threads)]
    size = max(1, len(given) // config.tensor_parallel_size)
    return [
        given[rank * size : (rank + 1) * size] or given[:1]
        for rank in range(config.tensor_parallel_size)
    ]


def cores_of(settings: Settings, rank: int) -> tuple[int, ...]:
    """Return the cores of a rank; none: those that it may use."""
    return settings.cores[rank] if settings.cores else ()


def _tuples(value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_tuples(item) for item in value)
    return value


def find_forms(folders: Iterable[str | Path], spec: DecoderSpec) -> list[Heads]:
    """Return the attention of the side networks in folders, each once; others are passed over.

    Args:
        folders: of adapters.
        spec: of what they sit on.
    """
    found: set[Heads] = set()
    for folder in folders:
        try:
            about = read_config(Path(folder))
            if about.method == QST:
                found.add(_heads(from_fields(about.fields).side_spec(spec)))
        except AdapterError:
            continue  # whoever attaches it is told
    return sorted(found)


def heads_of(network: SideNetwork | ForkNetwork) -> Heads:
    """Return the attention of a side network.

    Raises:
        AdapterError: it is a fork, which reads keys and values that vLLM keeps to itself.
    """
    if isinstance(network, ForkNetwork):
        raise AdapterError(
            "side_attention base: the vllm backend has no forks of the base's last layers; "
            "serve it with --backend native"
        )
    return _heads(network.spec)


def _heads(spec: DecoderSpec) -> Heads:
    return tuple(
        (layer.num_attention_heads, layer.num_key_value_heads, layer.head_dim)
        for layer in spec.layers
    )
