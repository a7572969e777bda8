"""Small bases, side networks that say something, and steps that run both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.qst.config import QstConfig
from adapters.qst.network import QstNetwork
from models.batch import PackedBatch, SideBatch
from models.decoder import Decoder
from models.kernels.reference.operations import Attend, blend_side, run_side
from models.kv_cache import KVCache
from models.program import AttentionOp
from models.quantization import quantize_4bit
from models.side import AttachedSide
from models.spec import DecoderSpec, LayerSpec, RotarySpec, canonical_weights
from models.weights import Weight
from tests.models.kernels.random_decoders import make_decoder_parts

DOWNSAMPLES = ("linear", "lora", "adapter", "maxpool", "avgpool")
BLOCK = 16
TOKENS = [(7 * i + 3) % 97 for i in range(32)]


def paper_base(*, is_quantized: bool = False) -> tuple[DecoderSpec, dict[str, Weight]]:
    """Return a random Llama of 4 layers: D = 64, I = 128, H = 4, V = 256."""
    layer = LayerSpec(
        num_attention_heads=4, num_key_value_heads=4, head_dim=16, intermediate_size=128
    )
    inv_freq = tuple(10000.0 ** (-i / 16) for i in range(0, 16, 2))
    spec = DecoderSpec(
        family="llama", vocab_size=256, hidden_size=64, max_position_embeddings=128,
        layers=(layer,) * 4, norm="rms", norm_eps=1e-5, activation="silu", gated_mlp=True,
        rotary=RotarySpec(dim=16, inv_freq=inv_freq),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    weights: dict[str, Weight] = {}
    for name, shape, is_required in canonical_weights(spec):
        tensor = torch.randn(shape, generator=generator)
        if not is_required:
            continue
        weight: Weight = tensor * shape[-1] ** -0.5 if len(shape) == 2 else 1 + tensor * 0.1
        if is_quantized and len(shape) == 2 and name.startswith("layers"):
            weight = quantize_4bit(weight)  # type: ignore[arg-type]
        weights[name] = weight
    return spec, weights


def make_base(kind: str, *, is_quantized: bool = False) -> tuple[DecoderSpec, dict[str, Weight]]:
    """Return `paper_base`, or a random decoder of another family."""
    if kind == "paper":
        return paper_base(is_quantized=is_quantized)
    return make_decoder_parts(kind, is_quantized=is_quantized)


def make_network(
    spec: DecoderSpec, *, seed: int = 0, is_fresh: bool = False, **fields: Any
) -> QstNetwork:
    """Return a side network; unless fresh, one that looks trained: no value is as it began."""
    if "side_attention" not in fields:
        fields = {"reduction": 4, **fields}
    network = QstNetwork(spec, QstConfig(**fields), seed=seed)
    if not is_fresh:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * (0.5 if name == "gamma" else 0.1))
            if not network.is_fork:
                network.get_parameter("alpha").sub_(0.4)
    return network


@dataclass(frozen=True, kw_only=True)
class Stream:
    """One sequence of a test, with at most one side network.

    Attributes:
        tokens: all of it.
        side: what reads it, or None.
        scale: how much of that.
    """

    tokens: Sequence[int]
    side: AttachedSide | None = None
    scale: float = 1.0


def run_streams(
    decoder: Decoder, streams: Sequence[Stream], cuts: Sequence[int] = ()
) -> tuple[list[Tensor], KVCache]:
    """Run sequences together, in steps that end at the positions of `cuts`, then to the end.

    Returns:
        (tokens, V) logits of each sequence, and the base's float32 cache, in which sequence i owns
        the blocks from i * M.
    """
    blocks = -(-max(len(stream.tokens) for stream in streams) // BLOCK)
    count = len(streams)
    cache = decoder.make_cache(num_blocks=blocks * count, dtype=torch.float32)
    side_caches: dict[object, KVCache] = {}
    for stream in streams:
        if stream.side and stream.side.cache_shape not in side_caches:
            side_caches[stream.side.cache_shape] = decoder.make_side_cache(
                stream.side, num_blocks=blocks * count, dtype=torch.float32
            )
    outputs: list[list[Tensor]] = [[] for _ in streams]
    longest = max(len(stream.tokens) for stream in streams)
    for first, last in pairwise((0, *cuts, longest)):
        running = [i for i, stream in enumerate(streams) if len(stream.tokens) > first]
        spans = {i: (first, min(last, len(streams[i].tokens))) for i in running}
        batch = pack_streams(streams, spans, blocks, side_caches)
        parts = decoder.forward(batch, cache).split([b - a for a, b in spans.values()])
        for i, part in zip(running, parts, strict=True):
            outputs[i].append(part)
    return [torch.cat(parts) for parts in outputs], cache


def pack_streams(
    streams: Sequence[Stream],
    spans: Mapping[int, tuple[int, int]],
    blocks: int,
    side_caches: Mapping[object, KVCache],
) -> PackedBatch:
    """Pack tokens first:last of the streams of `spans` into one step, all rows put out."""
    tokens, positions, starts = [], [], [0]
    for i, (first, last) in spans.items():
        tokens += streams[i].tokens[first:last]
        positions += range(first, last)
        starts.append(len(tokens))

    def ints(values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    tables = [[i * blocks + m for m in range(blocks)] for i in spans]
    sides = [(b, streams[i].side, streams[i].scale) for b, i in enumerate(spans)]
    chosen = [(b, side, scale) for b, side, scale in sides if side is not None]
    side = SideBatch(
        networks=tuple(s for _, s, _ in chosen),
        caches=tuple(side_caches[s.cache_shape] for _, s, _ in chosen),
        sequences=ints([b for b, _, _ in chosen]),
        block_tables=ints([tables[b] for b, _, _ in chosen]),
        write_starts=ints([0 for _ in chosen]),
        scales=torch.tensor([scale for _, _, scale in chosen]),
    )
    return PackedBatch(
        token_ids=ints(tokens), positions=ints(positions), query_starts=ints(starts),
        context_lens=ints([last for _, last in spans.values()]), block_tables=ints(tables),
        output_rows=ints(range(len(tokens))), side=side if chosen else None,
    )  # fmt: skip


def whole_batch(sequences: Sequence[Sequence[int]]) -> PackedBatch:
    """Pack whole sequences, for `Decoder.hidden_states`."""
    spans = {i: (0, len(tokens)) for i, tokens in enumerate(sequences)}
    blocks = -(-max(map(len, sequences)) // BLOCK)
    return pack_streams([Stream(tokens=tokens) for tokens in sequences], spans, blocks, {})


def attend_whole(batch: PackedBatch) -> Attend:
    """Return causal attention within each whole sequence of a batch; differentiable."""
    lengths = batch.query_starts.diff().tolist()

    def attend(op: AttentionOp, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def causal(*heads: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in heads)
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=op.scale, enable_gqa=True
            )
            return out.transpose(1, 2).flatten(0, 1).flatten(1)

        if len(set(lengths)) == 1:
            return causal(*(x.unflatten(0, (len(lengths), -1)) for x in (q, k, v)))
        parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        return torch.cat([causal(*(x[None] for x in part)) for part in parts])

    return attend


@dataclass(frozen=True)
class FrozenStates:
    """What a base makes of whole sequences: all that a side network reads.

    Attributes:
        batch: the sequences.
        hidden: h[0] .. h[N].
        normed: h[N] after the final norm.
    """

    batch: PackedBatch
    hidden: list[Tensor]
    normed: Tensor


def freeze_states(decoder: Decoder, sequences: Sequence[Sequence[int]]) -> FrozenStates:
    """Run a base on whole sequences."""
    batch = whole_batch(sequences)
    with torch.no_grad():
        hidden = list(decoder.hidden_states(batch))
        return FrozenStates(batch, hidden, decoder.apply_final_norm(hidden[-1]))


def train_logits(decoder: Decoder, network: QstNetwork, states: FrozenStates) -> Tensor:
    """Return the (T, V) logits the way that training computes them."""
    batch = states.batch
    program, positions = network.program(), batch.positions.long()
    side = run_side(program, states.hidden, positions, attend=attend_whole(batch))
    return decoder.logits(blend_side(program, states.normed, side))


def train_loss(decoder: Decoder, network: QstNetwork, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Return the mean next-token cross entropy, in nats."""
    states = freeze_states(decoder, sequences)
    logits = train_logits(decoder, network, states).split([len(s) for s in sequences])
    losses = [
        F.cross_entropy(rows[:-1], torch.tensor(s[1:]), reduction="sum")
        for rows, s in zip(logits, sequences, strict=True)
    ]
    return torch.stack(losses).sum() / sum(len(s) - 1 for s in sequences)
