"""The operations of a decoder, as data: what a step computes, in order.

`build_program` turns a `DecoderSpec` and its weights into a list of few, large operations over
named buffers of float32 rows. The executors in `models.kernels` run it; none of them knows an
architecture.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from models.spec import Activation, DecoderSpec, LayerSpec, SpecError, canonical_weights
from models.weights import LowRank, Matrix, Weight


@dataclass(frozen=True, kw_only=True, slots=True)
class Norm:
    """Normalise a row; then keep some of its channels.

    Attributes:
        weight: (width,) float32.
        bias: (width,) float32 makes it a layer norm; None an RMS norm.
        eps: added to the mean square or the variance.
        indices: (kept,) int32 channels to keep, or None for all.
    """

    weight: Tensor
    bias: Tensor | None
    eps: float
    indices: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Activate:
    """Apply the MLP's activation; gated: act(first half) * second half."""

    kind: Activation
    is_gated: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One matrix of a linear: columns [offset, offset + out_features) of the result."""

    weight: Matrix
    bias: Tensor | None
    offset: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedOp:
    """dst = table[token_ids] (+ positions_table[positions + offset])."""

    dst: str
    table: Matrix
    positions_table: Tensor | None
    positions_offset: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearOp:
    """dst (+)= prologue(src) @ weight.T + bias, for each piece.

    Attributes:
        prologue: applied to each source row first.
        in_features: width of a row after the prologue.
        pieces: matrices that share the input.
        accumulate: add to dst.
        scatter: (outputs,) int32: which column of dst each output is added to.
        selects_rows: compute the batch's output rows only; dst is the logits.
        names: canonical, of the matrices, such as "layers.3.q"; factors of a low-rank one are
            "layers.3.q.right" and "layers.3.q.left", and a right factor that several share has the
            first one's name. Nothing is computed by them.
    """

    src: str
    dst: str
    prologue: Norm | Activate | None
    in_features: int
    pieces: tuple[Piece, ...]
    accumulate: bool = False
    scatter: Tensor | None = None
    selects_rows: bool = False
    names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionOp:
    """dst = causal attention of src's queries over the cached and the step's own keys.

    src holds the queries of all heads, then the keys, then the values, unrotated.
    """

    src: str
    dst: str
    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float
    scale: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TapOp:
    """Hand out the residual stream: tap 0 is the embedding, tap i + 1 what layer i leaves."""

    src: str
    index: int


Op = EmbedOp | LinearOp | AttentionOp | TapOp
LOGITS = "logits"
# Norms and biases as operations have them, in float32, by the id of the weight that comes first.
Vectors: TypeAlias = dict[int, tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """A decoder's operations.

    Attributes:
        ops: in order; the last one makes the logits.
        widths: most columns that an operation uses of each buffer, by name.
        inv_freq: (rotary_dim / 2,) float32, empty without rotation.
        rotary_scale: factor on cos and sin.
        num_layers, vocab_size: of the decoder.
    """

    ops: tuple[Op, ...]
    widths: Mapping[str, int]
    inv_freq: Tensor
    rotary_scale: float
    num_layers: int
    vocab_size: int

    @property
    def embed(self) -> EmbedOp:
        """The first operation."""
        embed = self.ops[0]
        assert isinstance(embed, EmbedOp)
        return embed

    @property
    def layers(self) -> tuple[tuple[Op, ...], ...]:
        """The operations of each layer, without its tap; their stream is the buffer "x"."""
        taps = [i for i, op in enumerate(self.ops) if isinstance(op, TapOp)]
        return tuple(self.ops[i + 1 : j] for i, j in pairwise(taps))

    @property
    def head(self) -> LinearOp:
        """The last operation: final norm and LM head."""
        head = self.ops[-1]
        assert isinstance(head, LinearOp)
        return head


def check_weights(spec: DecoderSpec, weights: Mapping[str, Weight]) -> None:
    """Hold weights against the spec.

    Raises:
        SpecError: names every missing, misshapen and unknown weight.
    """
    problems = []
    unknown = set(weights)
    for name, shape, is_required in canonical_weights(spec):
        unknown.discard(name)
        if name not in weights:
            if is_required:
                problems.append(f"{name}: missing")
        elif tuple(weights[name].shape) != shape:
            problems.append(f"{name}: shape {tuple(weights[name].shape)}, expected {shape}")
    problems += [f"{name}: not a weight of this {spec.family} decoder" for name in sorted(unknown)]
    if problems:
        raise SpecError("weights do not fit the decoder: " + "; ".join(problems))


class _Builder:
    def __init__(
        self, spec: DecoderSpec, weights: Mapping[str, Weight], vectors: Vectors | None = None
    ) -> None:
        self.spec = spec
        self.weights = weights
        self.vectors: Vectors = {} if vectors is None else vectors
        self.ops: list[Op] = []
        self.widths: dict[str, int] = {"x": spec.hidden_size}

    def vector(self, name: str) -> Tensor | None:
        weight = self.weights.get(name)
        if weight is None:
            return None
        assert isinstance(weight, Tensor)
        if id(weight) not in self.vectors:
            self.vectors[id(weight)] = weight, weight.float().contiguous()
        return self.vectors[id(weight)][1]

    def norm(self, name: str, kept: tuple[int, ...] | None = None) -> Norm:
        weight = self.vector(f"{name}.weight")
        assert weight is not None
        indices = None if kept is None else torch.tensor(kept, dtype=torch.int32)
        bias = self.vector(f"{name}.bias")
        return Norm(weight=weight, bias=bias, eps=self.spec.norm_eps, indices=indices)

    def buffer(self, name: str, width: int) -> str:
        self.widths[name] = max(width, self.widths.get(name, 0))
        return name

    def linear(
        self,
        names: list[str],
        *,
        src: str,
        dst: str,
        prologue: Norm | Activate | None = None,
        kept: tuple[int, ...] | None = None,
        accumulate: bool = False,
        selects_rows: bool = False,
    ) -> None:
        """Emit one operation for the full matrices and two for those that share a right factor."""
        scatter = None if kept is None else torch.tensor(kept, dtype=torch.int32)
        pieces, full, offset = [], [], 0
        products: dict[int, list[tuple[str, LowRank, Piece]]] = {}
        for name in names:
            weight = self.weights[f"{name}.weight"]
            bias = self.vector(f"{name}.bias")
            if isinstance(weight, LowRank):
                left = Piece(weight=weight.left, bias=bias, offset=offset)
                products.setdefault(id(weight.right), []).append((name, weight, left))
            else:
                full.append(name)
                pieces.append(Piece(weight=weight, bias=bias, offset=offset))
            offset += weight.shape[0]
        if pieces:
            op = LinearOp(
                src=src, dst=dst, prologue=prologue, in_features=pieces[0].weight.shape[1],
                pieces=tuple(pieces), accumulate=accumulate, scatter=scatter,
                selects_rows=selects_rows, names=tuple(full),
            )  # fmt: skip
            self.ops.append(op)
        for sharing in products.values():
            first, product, _ = sharing[0]
            rank = product.right.shape[0]
            thin = self.buffer("rank", rank)
            right = Piece(weight=product.right, bias=None, offset=0)
            self.ops += [
                LinearOp(src=src, dst=thin, prologue=prologue,
                         in_features=product.right.shape[1], pieces=(right,),
                         names=(f"{first}.right",)),
                LinearOp(src=thin, dst=dst, prologue=None, in_features=rank,
                         pieces=tuple(left for _, _, left in sharing), accumulate=accumulate,
                         scatter=scatter, names=tuple(f"{name}.left" for name, _, _ in sharing)),
            ]  # fmt: skip

    def layer(self, i: int, layer: LayerSpec) -> None:
        spec, prefix = self.spec, f"layers.{i}"
        heads, kv_heads, dim = layer.num_attention_heads, layer.num_key_value_heads, layer.head_dim
        qkv = self.buffer("qkv", (heads + 2 * kv_heads) * dim)
        attended = self.buffer("attended", heads * dim)
        gated = ["gate", "up"] if spec.gated_mlp else ["up"]
        middle = self.buffer("middle", layer.intermediate_size * len(gated))
        names = {n: f"{prefix}.{n}" for n in ("q", "k", "v", "o", "gate", "up", "down")}
        mlp_norm = "attn_norm" if spec.shared_norm else "mlp_norm"

        def attention() -> None:
            self.linear(
                [names[n] for n in ("q", "k", "v")], src="x", dst=qkv,
                prologue=self.norm(f"{prefix}.attn_norm", layer.attn_in),
            )  # fmt: skip
            op = AttentionOp(
                src=qkv, dst=attended, layer=i, num_heads=heads, num_kv_heads=kv_heads,
                head_dim=dim, rotary_dim=spec.rotary.dim if spec.rotary else 0,
                q_norm=self.vector(f"{prefix}.q_norm.weight"),
                k_norm=self.vector(f"{prefix}.k_norm.weight"), eps=spec.norm_eps, scale=dim**-0.5,
            )  # fmt: skip
            self.ops.append(op)

        def attention_out() -> None:
            self.linear([names["o"]], src=attended, dst="x", kept=layer.attn_out, accumulate=True)

        def mlp() -> None:
            norm = self.norm(f"{prefix}.{mlp_norm}", layer.mlp_in)
            self.linear([names[n] for n in gated], src="x", dst=middle, prologue=norm)

        def mlp_out() -> None:
            activate = Activate(kind=spec.activation, is_gated=spec.gated_mlp)
            self.linear(
                [names["down"]], src=middle, dst="x", prologue=activate, kept=layer.mlp_out,
                accumulate=True,
            )  # fmt: skip

        in_parallel = spec.residual == "parallel"
        order = (attention, mlp, attention_out, mlp_out) if in_parallel else (
            attention, attention_out, mlp, mlp_out)  # fmt: skip
        for emit in order:
            emit()


def rotation(spec: DecoderSpec) -> tuple[Tensor, float]:
    """Return the inverse frequencies, empty without rotation, and the factor on cos and sin."""
    rotary = spec.rotary
    inv_freq = torch.tensor(rotary.inv_freq if rotary else [], dtype=torch.float32)
    return inv_freq, rotary.attention_scale if rotary else 1.0


def build_layers(
    spec: DecoderSpec, weights: Mapping[str, Weight]
) -> tuple[tuple[tuple[Op, ...], ...], Norm | None, Mapping[str, int]]:
    """Lay out the operations of the layers alone, whose stream is the buffer "x".

    Returns:
        The operations of each layer, the final norm if there is one, and the buffers' widths.
    """
    builder = _Builder(spec, weights)
    layers = []
    for i, layer in enumerate(spec.layers):
        builder.layer(i, layer)
        layers.append(tuple(builder.ops))
        builder.ops = []
    return tuple(layers), builder.norm("final_norm") if spec.final_norm else None, builder.widths


def build_program(
    spec: DecoderSpec,
    weights: Mapping[str, Weight],
    head: Matrix,
    vectors: Vectors | None = None,
) -> Program:
    """Lay out the operations of a decoder.

    Args:
        spec: the architecture.
        weights: by canonical name; see `canonical_weights`.
        head: (vocab_size, hidden_size) LM head, in whatever precision it is to be computed.
        vectors: those that are known already; the rest is added.

    Raises:
        SpecError: weights are missing, misshapen or unknown.
    """
    check_weights(spec, weights)
    builder = _Builder(spec, {**weights, "head.weight": head}, vectors)
    has_positions = spec.learned_positions_offset is not None
    builder.ops.append(
        EmbedOp(
            dst="x",
            table=weights["embed.weight"],  # type: ignore[arg-type]
            positions_table=weights["positions.weight"] if has_positions else None,  # type: ignore[arg-type]
            positions_offset=spec.learned_positions_offset or 0,
        )
    )
    builder.ops.append(TapOp(src="x", index=0))
    for i, layer in enumerate(spec.layers):
        builder.layer(i, layer)
        builder.ops.append(TapOp(src="x", index=i + 1))
    final = builder.norm("final_norm") if spec.final_norm else None
    builder.linear(["head"], src="x", dst=LOGITS, prologue=final, selects_rows=True)
    inv_freq, rotary_scale = rotation(spec)
    return Program(
        ops=tuple(builder.ops),
        widths=builder.widths,
        inv_freq=inv_freq,
        rotary_scale=rotary_scale,
        num_layers=len(spec.layers),
        vocab_size=spec.vocab_size,
    )
