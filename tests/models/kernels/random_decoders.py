"""Random decoders and programs for the kernel tests."""

from collections.abc import Callable

import torch
from torch import Tensor

from models.batch import PackedBatch
from models.decoder import Decoder
from models.kernels.native.executor import NativeExecutor
from models.kernels.reference.executor import ReferenceExecutor
from models.program import LOGITS, EmbedOp, LinearOp, Program
from models.quantization import quantize_4bit
from models.spec import DecoderSpec, LayerSpec, RotarySpec, canonical_weights
from models.weights import LowRank, Matrix, Weight

VOCAB, HIDDEN = 100, 64
KINDS = ("llama", "qwen3", "opt", "phi", "neox")


def _rotary(dim: int) -> RotarySpec:
    return RotarySpec(dim=dim, inv_freq=tuple(10000.0 ** (-i / dim) for i in range(0, dim, 2)))


def _architecture(kind: str) -> dict[str, object]:
    layer_norm = {"norm": "layer", "gated_mlp": False}
    return {
        "llama": {"norm": "rms", "activation": "silu", "gated_mlp": True, "rotary": _rotary(16)},
        "qwen3": {
            "norm": "rms", "activation": "silu", "gated_mlp": True, "rotary": _rotary(16),
            "qk_norm": True, "tied_head": True,
        },
        "opt": {
            **layer_norm, "activation": "relu", "learned_positions_offset": 2, "tied_head": True,
        },
        "phi": {
            **layer_norm, "activation": "gelu_tanh", "rotary": _rotary(8), "residual": "parallel",
            "shared_norm": True,
        },
        "neox": {
            **layer_norm, "activation": "gelu", "rotary": _rotary(8), "residual": "parallel",
        },
    }[kind]  # fmt: skip


def make_decoder_parts(
    kind: str,
    *,
    is_quantized: bool = False,
    is_pruned: bool = False,
    is_low_rank: bool = False,
    num_kv_heads: int = 2,
    num_heads: int = 4,
) -> tuple[DecoderSpec, dict[str, Weight]]:
    """Return a random three-layer decoder of an architecture."""
    generator = torch.Generator().manual_seed(7)

    def kept(count: int) -> tuple[int, ...] | None:
        chosen = torch.randperm(HIDDEN, generator=generator)[:count]
        return tuple(sorted(chosen.tolist())) if is_pruned else None

    layers = tuple(
        LayerSpec(
            num_attention_heads=num_heads, num_key_value_heads=num_kv_heads, head_dim=16,
            intermediate_size=160 + 16 * i * is_pruned, attn_in=kept(48), attn_out=kept(32),
            mlp_in=kept(48), mlp_out=kept(40),
        )
        for i in range(3)
    )  # fmt: skip
    spec = DecoderSpec(
        family=kind, vocab_size=VOCAB, hidden_size=HIDDEN, max_position_embeddings=128,
        layers=layers, norm_eps=1e-5, **_architecture(kind),  # type: ignore[arg-type]
    )  # fmt: skip
    weights: dict[str, Weight] = {}
    for name, shape, _ in canonical_weights(spec):
        tensor = torch.randn(shape, generator=generator)
        weight: Weight = tensor * 0.1
        if len(shape) == 2:
            weight = tensor * shape[1] ** -0.5
        elif name.endswith("norm.weight"):
            weight = 1 + tensor * 0.1
        if len(shape) == 2 and name.startswith("layers"):
            if is_low_rank and name.split(".")[2] in ("q", "down"):
                left = torch.randn(shape[0], 16, generator=generator) * 0.2
                right = torch.randn(16, shape[1], generator=generator) * 0.2
                weight = LowRank(
                    left=quantize_4bit(left) if is_quantized else left,
                    right=quantize_4bit(right) if is_quantized else right,
                )
            elif is_quantized:
                weight = quantize_4bit(weight)  # type: ignore[arg-type]
        weights[name] = weight
    return spec, weights


def pack_batch(
    sequences: list[list[int]],
    block_tables: list[list[int]],
    spans: list[tuple[int, int]],
    *,
    all_rows: bool = True,
) -> PackedBatch:
    """Pack tokens span[0]:span[1] of each sequence into one step."""
    starts, positions, tokens = [0], [], []
    for sequence, (first, last) in zip(sequences, spans, strict=True):
        tokens += sequence[first:last]
        positions += range(first, last)
        starts.append(len(tokens))
    rows = range(len(tokens)) if all_rows else [start - 1 for start in starts[1:]]

    def ints(values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    return PackedBatch(
        token_ids=ints(tokens), positions=ints(positions), query_starts=ints(starts),
        context_lens=ints([last for _, last in spans]), block_tables=ints(block_tables),
        output_rows=ints(list(rows)),
    )  # fmt: skip


def run_alone(decoder: Decoder, sequence: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the (len, V) logits of a sequence computed in one step by itself."""
    blocks = -(-len(sequence) // 16)
    cache = decoder.make_cache(num_blocks=blocks, dtype=dtype)
    return decoder.forward(pack_batch([sequence], [[*range(blocks)]], [(0, len(sequence))]), cache)


def run_linear(
    make_executor: Callable[[Program], NativeExecutor | ReferenceExecutor],
    rows: Matrix,
    *ops: LinearOp,
) -> Tensor:
    """Run linears whose input buffer "x" holds `rows` (T, width); return the logits."""
    width = rows.shape[1]
    embed = EmbedOp(dst="x", table=rows, positions_table=None, positions_offset=0)
    outputs = max(p.offset + p.weight.shape[0] for op in ops for p in op.pieces if op.dst == LOGITS)
    program = Program(
        ops=(embed, *ops), widths={"x": width, "y": 4096}, inv_freq=torch.empty(0),
        rotary_scale=1.0, num_layers=1, vocab_size=outputs,
    )  # fmt: skip
    executor = make_executor(program)
    layer = LayerSpec(num_attention_heads=1, num_key_value_heads=1, head_dim=1, intermediate_size=1)
    spec = DecoderSpec(
        family="test", vocab_size=rows.shape[0], hidden_size=width, max_position_embeddings=1024,
        layers=(layer,), norm="rms", norm_eps=1e-5, activation="silu", gated_mlp=True,
    )  # fmt: skip
    cache = executor.make_cache(spec, 1, 16, torch.float32)
    count = rows.shape[0]
    return executor.forward(pack_batch([[*range(count)]], [[0]], [(0, count)]), cache)
