"""Describe a side network: a narrow decoder that reads the hidden states of the base decoder.

With h[0] the base's embedding output and h[i] its residual stream after layer i:

    s[0] = down[0](h[0])
    u[i] = (1 - gate[i]) * down[i](h[i]) + gate[i] * s[i - 1]
    s[i] = layer[i](u[i])
    out = base_share * final_norm(h[N]) + (1 - base_share) * up(side_norm(s[N]))

`out` goes through the base's LM head. Nothing flows back into the base. Source: Quantized Side
Tuning, arXiv 2401.07159, section 3.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from models.program import Norm, Op, build_layers, rotation
from models.spec import Activation, DecoderSpec, SpecError, canonical_weights
from models.weights import Weight

PoolKind = Literal["max", "avg"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Downsample:
    """From the width of the base to that of the side network: norm(second(activation(first(x)))).

    Attributes:
        first: (K, D), or (side width, D) without `second`; None: pool.
        second: (side width, K), or None.
        activation: between the two, or None.
        norm: of the result, or None.
        pool: without matrices, what is taken of each run of D / side width neighbours.
    """

    first: Tensor | None = None
    second: Tensor | None = None
    activation: Activation | None = None
    norm: Norm | None = None
    pool: PoolKind | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SideNetwork:
    """A side network ready to compute.

    Attributes:
        spec: its layers: as many as the base has, hidden_size the side width, rotary of its head
            dimension; vocab_size and positions are the base's.
        weights: of `side_weights(spec)`, by canonical name: layers and final norm.
        downsamples: one for the embedding, one for each layer.
        gates: (N, side width) float32, the weight of the side stream when layer i mixes.
        up: (D, side width).
        up_bias: (D,), or None.
        base_share: (D,) float32, the weight of the base in the final blend.
    """

    spec: DecoderSpec
    weights: Mapping[str, Weight]
    downsamples: tuple[Downsample, ...]
    gates: Tensor
    up: Tensor
    up_bias: Tensor | None
    base_share: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class SideProgram:
    """A side network as operations: what the executors run.

    Attributes:
        network: the tensors outside of the layers.
        layers: the operations of each layer, over buffers of `widths`; "x" is the stream.
        final_norm: applied to s[N].
        inv_freq, rotary_scale: as in `Program`.
    """

    network: SideNetwork
    layers: tuple[tuple[Op, ...], ...]
    final_norm: Norm
    widths: Mapping[str, int]
    inv_freq: Tensor
    rotary_scale: float


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class AttachedSide:
    """A side network held by a decoder, ready to run; freed with the last reference.

    Attributes:
        spec: the narrow decoder.
        num_bytes: memory that it takes.
        lowered: what the executor made of it.
    """

    spec: DecoderSpec
    num_bytes: int
    lowered: object

    @property
    def cache_shape(self) -> tuple[tuple[int, int], ...]:
        """(KV heads, head dim) of each layer: equal ones share a cache."""
        return tuple((x.num_key_value_heads, x.head_dim) for x in self.spec.layers)


def side_weights(spec: DecoderSpec) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Yield (name, shape, required) of the weights of a side network's layers and final norm."""
    for name, shape, is_required in canonical_weights(spec):
        if name.startswith(("layers.", "final_norm.")):
            yield name, shape, is_required


def build_side_program(network: SideNetwork, base: DecoderSpec) -> SideProgram:
    """Lay out the operations of a side network.

    Raises:
        SpecError: names everything that does not fit the base decoder or the network's own spec.
    """
    spec = network.spec
    width, hidden, num_layers = spec.hidden_size, base.hidden_size, len(base.layers)
    problems = []

    def expect(name: str, found: object, wanted: object) -> None:
        if found != wanted:
            problems.append(f"{name}: {found}, expected {wanted}")

    expect("layers", len(spec.layers), num_layers)
    expect("downsamples", len(network.downsamples), num_layers + 1)
    expect("gates: shape", tuple(network.gates.shape), (num_layers, width))
    expect("up: shape", tuple(network.up.shape), (hidden, width))
    expect("base_share: shape", tuple(network.base_share.shape), (hidden,))
    if network.up_bias is not None:
        expect("up_bias: shape", tuple(network.up_bias.shape), (hidden,))
    for i, down in enumerate(network.downsamples):
        if down.pool is not None:
            expect(f"downsamples.{i}: width left over", hidden % width, 0)
        elif down.first is None:
            problems.append(f"downsamples.{i}: neither a matrix nor a pool")
        else:
            last = down.first if down.second is None else down.second
            expect(f"downsamples.{i}: inputs", down.first.shape[1], hidden)
            expect(f"downsamples.{i}: outputs", last.shape[0], width)
            if down.second is not None:
                expect(f"downsamples.{i}: rank", down.second.shape[1], down.first.shape[0])
    for name, shape, is_required in side_weights(spec):
        if name in network.weights:
            expect(f"{name}: shape", tuple(network.weights[name].shape), shape)
        elif is_required:
            problems.append(f"{name}: missing")
    known = {name for name, _, _ in side_weights(spec)}
    problems += [f"{name}: not a weight of it" for name in sorted(set(network.weights) - known)]
    if problems:
        raise SpecError("the side network does not fit: " + "; ".join(problems))
    layers, final_norm, widths = build_layers(spec, network.weights)
    assert final_norm is not None
    inv_freq, rotary_scale = rotation(spec)
    return SideProgram(
        network=network, layers=layers, final_norm=final_norm, widths=widths, inv_freq=inv_freq,
        rotary_scale=rotary_scale,
    )  # fmt: skip
