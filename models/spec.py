"""Describe a decoder as data: widths, norms, positions, MLP kind and residual layout.

Every supported architecture is one `DecoderSpec`; the decoder, its kernels and its loaders read
nothing else. The canonical weight names are listed in `canonical_weights`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

NormKind = Literal["rms", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
ResidualLayout = Literal["sequential", "parallel"]


class SpecError(ValueError):
    """A decoder description contradicts itself, or weights contradict it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RotarySpec:
    """Rotary position embedding of the half-split kind (Hugging Face `rotate_half`).

    Attributes:
        dim: number of leading channels of each head that are rotated; even, <= head_dim.
        inv_freq: (dim / 2,) inverse frequencies in radians per position, scaling already applied.
        attention_scale: factor on cos and sin (1.0 but for YaRN-like scalings).
    """

    dim: int
    inv_freq: tuple[float, ...]
    attention_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.dim % 2 or len(self.inv_freq) != self.dim // 2:
            raise SpecError(
                f"rotary dim {self.dim} needs {self.dim // 2} inverse frequencies, "
                f"got {len(self.inv_freq)}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSpec:
    """Widths of one decoder layer.

    The four index tuples are kept indices of the residual stream (strictly increasing); None means
    all of it. They make a pruned layer: its attention and MLP read `*_in` of the normed residual
    and add into `*_out` of it.

    Attributes:
        num_attention_heads, num_key_value_heads, head_dim: attention shape of this layer.
        intermediate_size: MLP middle width of this layer.
        attn_in, attn_out, mlp_in, mlp_out: kept residual channels, or None.
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    attn_in: tuple[int, ...] | None = None
    attn_out: tuple[int, ...] | None = None
    mlp_in: tuple[int, ...] | None = None
    mlp_out: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise SpecError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderSpec:
    """A decoder-only transformer.

    Attributes:
        family: name of the entry in `models.families` that made this, for messages.
        vocab_size: rows of the embedding and of the LM head.
        hidden_size: width of the residual stream.
        max_position_embeddings: longest sequence in tokens.
        layers: one `LayerSpec` each, in order.
        norm: "rms" (no bias) or "layer".
        norm_eps: epsilon under the root.
        qk_norm: RMS norm over each query and key head before the rotation (Qwen3).
        rotary: rotation, or None.
        learned_positions_offset: learned positions are added to the embedding, at position + this
            (OPT: 2); None: none.
        gated_mlp: down(act(gate(x)) * up(x)), else down(act(up(x))).
        activation: MLP activation.
        residual: "sequential", or "parallel": attention and MLP both read the layer's input.
        shared_norm: parallel layout with one norm for both (Phi); GPT-NeoX has two.
        final_norm: whether a norm follows the last layer.
        tied_head: the LM head is the embedding matrix.
    """

    family: str
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    layers: tuple[LayerSpec, ...]
    norm: NormKind
    norm_eps: float
    activation: Activation
    gated_mlp: bool
    rotary: RotarySpec | None = None
    learned_positions_offset: int | None = None
    qk_norm: bool = False
    residual: ResidualLayout = "sequential"
    shared_norm: bool = False
    final_norm: bool = True
    tied_head: bool = False


def linear_shapes(spec: DecoderSpec, layer: LayerSpec) -> dict[str, tuple[int, int]]:
    """Give (out_features, in_features) of every linear of a layer, by canonical name."""

    def width(kept: tuple[int, ...] | None) -> int:
        return spec.hidden_size if kept is None else len(kept)

    query = layer.num_attention_heads * layer.head_dim
    key_value = layer.num_key_value_heads * layer.head_dim
    shapes = {
        "q": (query, width(layer.attn_in)),
        "k": (key_value, width(layer.attn_in)),
        "v": (key_value, width(layer.attn_in)),
        "o": (width(layer.attn_out), query),
        "gate": (layer.intermediate_size, width(layer.mlp_in)),
        "up": (layer.intermediate_size, width(layer.mlp_in)),
        "down": (width(layer.mlp_out), layer.intermediate_size),
    }
    if not spec.gated_mlp:
        del shapes["gate"]
    return shapes


def canonical_weights(spec: DecoderSpec) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Yield (name, shape, required) of every weight the decoder can take.

    Names: `embed.weight`, `positions.weight`, `layers.{i}.{attn_norm,mlp_norm}.{weight,bias}`,
    `layers.{i}.{q,k,v,o,gate,up,down}.{weight,bias}`, `layers.{i}.{q_norm,k_norm}.weight`,
    `final_norm.{weight,bias}`, `head.{weight,bias}`. Linear biases are optional; a layer norm's
    are required.
    """
    hidden = (spec.hidden_size,)

    def norm(name: str) -> Iterator[tuple[str, tuple[int, ...], bool]]:
        yield f"{name}.weight", hidden, True
        if spec.norm == "layer":
            yield f"{name}.bias", hidden, True

    yield "embed.weight", (spec.vocab_size, spec.hidden_size), True
    if spec.learned_positions_offset is not None:
        rows = spec.max_position_embeddings + spec.learned_positions_offset
        yield "positions.weight", (rows, spec.hidden_size), True
    for i, layer in enumerate(spec.layers):
        yield from norm(f"layers.{i}.attn_norm")
        if not spec.shared_norm:
            yield from norm(f"layers.{i}.mlp_norm")
        if spec.qk_norm:
            yield f"layers.{i}.q_norm.weight", (layer.head_dim,), True
            yield f"layers.{i}.k_norm.weight", (layer.head_dim,), True
        for name, shape in linear_shapes(spec, layer).items():
            yield f"layers.{i}.{name}.weight", shape, True
            yield f"layers.{i}.{name}.bias", shape[:1], False
    if spec.final_norm:
        yield from norm("final_norm")
    if not spec.tied_head:
        yield "head.weight", (spec.vocab_size, spec.hidden_size), True
    yield "head.bias", (spec.vocab_size,), False
