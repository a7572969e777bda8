"""What a family's reader makes of a config.json."""

from collections.abc import Mapping
from dataclasses import dataclass

from models.spec import DecoderSpec

ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSource:
    """Where a canonical weight lies in a checkpoint.

    Attributes:
        name: tensor name in the checkpoint.
        rows: the rows of it that make the weight, in order; None: all of it.
    """

    name: str
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelDescription:
    """A model as its config.json describes it.

    Attributes:
        spec: the decoder.
        sources: for every canonical weight the config promises, the tensor that holds it.
        head_module: module name of the LM head in the checkpoint; it is never quantised.
        ignored: regular expressions of tensor names that carry no weight of the decoder.
        notes: what a user should know, for example a shortened context.
    """

    spec: DecoderSpec
    sources: Mapping[str, TensorSource]
    head_module: str
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
