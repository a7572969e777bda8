"""A method of variants, as one would be added: all that is its own is in this file.

An adapter has one number for each layer; what attention adds to the residual stream is multiplied
by it.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
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
from models.checkpoints import Derivation
from models.checkpoints.derived import Read

NAME = "louder"


def describe(stored: StoredAdapter) -> list[tuple[str, str]]:
    """Return a row for each layer."""
    factors = stored.tensors["factors"].tolist()
    return [(f"layer {i}", f"times {factor:g}") for i, factor in enumerate(factors)]


def derive(stored: StoredAdapter, host: Host) -> Derivation:
    """Hold an adapter against what it sits on, and say how its weights follow from it."""
    factors = stored.tensors.get("factors", torch.empty(0))
    layers = len(host.spec.layers)

    def check_factors() -> None:
        if tuple(factors.shape) != (layers,):
            raise AdapterError(f"factors: shape {tuple(factors.shape)}, expected ({layers},)")

    if problems := collect_problems(lambda: check_base(stored.config, host), check_factors):
        raise AdapterError("; ".join(problems))

    def multiply(name: str, read: Read) -> Tensor:
        return read(name) * factors[int(name.split(".")[1])]

    names = frozenset(f"layers.{i}.o.weight" for i in range(layers))
    return Derivation(digest=stored.digest, spec=host.spec, changed=names, derive=multiply)


def save(folder: Path, factors: Sequence[float], *, base: Host, chain: Sequence[str] = ()) -> Path:
    """Write an adapter."""
    config = AdapterConfig(
        method=NAME, base_id=base.model_id, base_fingerprint=base.fingerprint,
        base_quantization=base.quantization, chain=tuple(chain), fields={},
        description="louder", training={},
    )  # fmt: skip
    write_adapter(folder, config, {"factors": torch.tensor(factors)})
    return folder
