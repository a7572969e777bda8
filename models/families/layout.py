"""Parts that the families' readers share."""

from collections.abc import Callable, Mapping
from typing import cast

from models.families.config_reader import ConfigReader
from models.families.description import ACTIVATIONS, TensorSource
from models.families.errors import CheckpointError
from models.spec import Activation, DecoderSpec, canonical_weights

_NORMS = ("attn_norm", "mlp_norm", "final_norm", "q_norm", "k_norm")


def activation_of(config: ConfigReader, name: str) -> Activation:
    """Return the decoder's activation for a config field.

    Raises:
        CheckpointError: the activation is not supported.
    """
    value = config.get(name)
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise CheckpointError(
            f"config.json: {name} {value!r} is not supported; "
            f"supported: {', '.join(sorted(ACTIVATIONS))}"
        )
    return cast(Activation, ACTIVATIONS[value])


def sources_of(
    spec: DecoderSpec,
    top: Mapping[str, TensorSource],
    layers_prefix: str,
    layer_tensors: Mapping[str, str | TensorSource],
    *,
    has_bias: Callable[[str], bool],
) -> dict[str, TensorSource]:
    """Name the tensor of every canonical weight that a checkpoint of this family must have.

    Args:
        spec: the decoder.
        top: module of each weight outside the layers, by its first part ("embed", "head", ...).
        layers_prefix: what stands before the layer number.
        layer_tensors: module of each weight of a layer, without the prefix.
        has_bias: whether a linear ("q", "down", "head", ...) has a bias.
    """
    sources = {}
    for name, _, _ in canonical_weights(spec):
        parts = name.split(".")
        part, kind = parts[-2:]
        if kind == "bias" and part not in _NORMS and not has_bias(part):
            continue
        if parts[0] == "layers":
            module = layer_tensors[part]
            rows = module.rows if isinstance(module, TensorSource) else None
            local = module.name if isinstance(module, TensorSource) else module
            full = f"{layers_prefix}.{parts[1]}.{local}"
        else:
            full, rows = top[part].name, None
        sources[name] = TensorSource(name=f"{full}.{kind}", rows=rows)
    return sources
