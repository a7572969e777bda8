"""Describe a fork: the last layers of a decoder computed once more with low-rank differences.

A fork is a side network that has queries and outputs only. With h[i] the base's residual stream
before layer i, N layers and M of them forked, of a token whose logits are wanted:

    f[N - M] = h[N - M]
    f[i + 1] = layer[i](f[i]), each linear but k and v being W + left @ right,
               attending the base's own keys and values of layer i
    out = (1 - scale) * final_norm(h[N]) + scale * final_norm(f[N])

`out` goes through the base's LM head. Nothing flows back into the base and nothing of a fork is
cached: what the base knows of a prompt serves every fork, and of a prompt only the tokens whose
logits are wanted are computed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from models.program import LinearOp, Op, Program
from models.spec import DecoderSpec, SpecError, linear_shapes

_FORKED = ("q", "o", "gate", "up", "down")


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """What is added to a matrix: left @ right.

    Attributes:
        right: (R, in_features) float32.
        left: (out_features, R) float32.
    """

    right: Tensor
    left: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class ForkNetwork:
    """A fork ready to compute.

    Attributes:
        num_layers: M, the layers at the end that are forked.
        deltas: by canonical name of the linear, such as "layers.29.q"; those of `forked_linears`.
    """

    num_layers: int
    deltas: Mapping[str, Delta]


@dataclass(frozen=True, kw_only=True, slots=True)
class ForkProgram:
    """A fork and the operations of the base that it computes once more.

    Attributes:
        network: the differences.
        layers: the base's operations of each forked layer, over buffers of `widths`; "x" is the
            stream.
        first_layer: N - M.
        widths, inv_freq, rotary_scale: as in `Program`.
    """

    network: ForkNetwork
    layers: tuple[tuple[Op, ...], ...]
    first_layer: int
    widths: Mapping[str, int]
    inv_freq: Tensor
    rotary_scale: float


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class AttachedFork:
    """A fork held by a decoder, ready to run; freed with the last reference.

    Attributes:
        num_bytes: memory that it takes.
        lowered: what the executor made of it.
    """

    num_bytes: int
    lowered: object


def forked_linears(spec: DecoderSpec, num_layers: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield (name, (out_features, in_features)) of the linears of the last layers that differ."""
    first = len(spec.layers) - num_layers
    for i, layer in enumerate(spec.layers[first:], first):
        for name, shape in linear_shapes(spec, layer).items():
            if name in _FORKED:
                yield f"layers.{i}.{name}", shape


def build_fork_program(network: ForkNetwork, program: Program) -> ForkProgram:
    """Hold a fork against the operations of a decoder.

    Raises:
        SpecError: names everything that does not fit.
    """
    total = len(program.layers)
    if not 1 <= network.num_layers <= total:
        raise SpecError(f"num_layers must be 1 .. {total}, got {network.num_layers}")
    layers = program.layers[total - network.num_layers :]
    known = {
        name: (piece.weight.shape[0], op.in_features)
        for ops in layers
        for op in ops
        if isinstance(op, LinearOp)
        for name, piece in zip(op.names, op.pieces, strict=True)
    }
    problems = []
    for name, delta in network.deltas.items():
        right, left = delta.right, delta.left
        if name not in known:
            factored = f"{name}.right" in known or f"{name}.left" in known
            problems.append(
                f"{name}: two factors here, which cannot be forked" if factored
                else f"{name}: not a linear of the last {network.num_layers} layers"
            )  # fmt: skip
        elif (left.shape[0], right.shape[1]) != known[name] or left.shape[1] != right.shape[0]:
            problems.append(
                f"{name}: {tuple(left.shape)} @ {tuple(right.shape)}, expected {known[name]}"
            )
    if problems:
        raise SpecError("the side network does not fit: " + "; ".join(problems))
    return ForkProgram(
        network=network, layers=layers, first_layer=total - network.num_layers,
        widths=program.widths, inv_freq=program.inv_freq, rotary_scale=program.rotary_scale,
    )  # fmt: skip
