"""Random side networks for the kernel tests."""

import dataclasses

import torch
from torch import Tensor

from models.batch import PackedBatch, SideBatch
from models.decoder import Decoder
from models.kv_cache import KVCache
from models.program import Norm
from models.side import AttachedSide, Downsample, SideNetwork, side_weights
from models.spec import DecoderSpec, LayerSpec, RotarySpec
from models.weights import Weight
from tests.models.kernels.random_decoders import pack_batch

DOWNSAMPLES = ("adapter", "linear", "lora", "max", "avg")


def make_side(
    base: DecoderSpec,
    *,
    seed: int = 0,
    reduction: int = 4,
    downsample: str = "adapter",
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 4,
) -> SideNetwork:
    """Return a random side network for a decoder; its share of the result is about half."""
    generator = torch.Generator().manual_seed(seed)
    width = base.hidden_size // reduction
    rotary = base.rotary and RotarySpec(
        dim=head_dim, inv_freq=tuple(100.0 ** (-i / head_dim) for i in range(0, head_dim, 2))
    )
    layer = LayerSpec(
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        intermediate_size=24,
    )  # fmt: skip
    spec = dataclasses.replace(
        base, hidden_size=width, rotary=rotary, layers=(layer,) * len(base.layers),
        learned_positions_offset=None, final_norm=True,
    )  # fmt: skip

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    def make_down() -> Downsample:
        if downsample in ("max", "avg"):
            return Downsample(pool=downsample)  # type: ignore[arg-type]
        if downsample == "linear":
            return Downsample(first=matrix(width, base.hidden_size))
        first, second = matrix(8, base.hidden_size), matrix(width, 8)
        if downsample == "lora":
            return Downsample(first=first, second=second)
        norm = Norm(weight=1 + 0.1 * matrix(1, width)[0], bias=matrix(1, width)[0], eps=1e-5)
        return Downsample(first=first, second=second, activation="silu", norm=norm)

    weights: dict[str, Weight] = {}
    for name, shape, _ in side_weights(spec):
        tensor = torch.randn(shape, generator=generator)
        weights[name] = tensor * shape[-1] ** -0.5 if len(shape) == 2 else 1 + 0.1 * tensor
    return SideNetwork(
        spec=spec,
        weights=weights,
        downsamples=tuple(make_down() for _ in range(len(base.layers) + 1)),
        gates=torch.rand(len(base.layers), width, generator=generator),
        up=matrix(base.hidden_size, width),
        up_bias=matrix(1, base.hidden_size)[0],
        base_share=0.4 + 0.2 * torch.rand(base.hidden_size, generator=generator),
    )


def with_sides(
    batch: PackedBatch,
    entries: list[tuple[AttachedSide, KVCache, int, list[int], float]],
    *,
    write_starts: list[int] | None = None,
) -> PackedBatch:
    """Add (network, cache, sequence, block table, scale) entries to a batch."""
    networks, caches, sequences, tables, scales = zip(*entries, strict=True)
    side = SideBatch(
        networks=networks, caches=caches, sequences=torch.tensor(sequences, dtype=torch.int32),
        block_tables=torch.tensor(tables, dtype=torch.int32), scales=torch.tensor(scales),
        write_starts=torch.tensor(write_starts or [0] * len(entries), dtype=torch.int32),
    )  # fmt: skip
    return dataclasses.replace(batch, side=side)


def run_side_alone(
    decoder: Decoder,
    side: AttachedSide,
    sequence: list[int],
    *,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the (len, V) logits of one sequence with one side network, in one step."""
    table = [*range(-(-len(sequence) // 16))]
    cache = decoder.make_cache(num_blocks=len(table), dtype=dtype)
    side_cache = decoder.make_side_cache(side, num_blocks=len(table), dtype=dtype)
    batch = pack_batch([sequence], [table], [(0, len(sequence))])
    return decoder.forward(with_sides(batch, [(side, side_cache, 0, table, scale)]), cache)
