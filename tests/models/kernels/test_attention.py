"""Attention over caches of floats and 8-bit codes: against float64, the same bits however cut."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from models.decoder import Decoder, Executor
from models.kernels.native.executor import NativeExecutor
from models.kernels.reference.executor import ReferenceExecutor
from models.kv_cache import (
    KEY_GROUP,
    SCALE_BYTES,
    KVCache,
    cache_bytes_per_block,
    dequantize_heads,
    quantize_heads,
)
from models.program import LOGITS, AttentionOp, EmbedOp, LinearOp, Piece, Program
from models.spec import DecoderSpec, LayerSpec
from tests.models.kernels.random_decoders import make_decoder_parts, pack_batch

BLOCK = 16
LONG = [(7 * i) % 100 for i in range(1025)]
SHORT = [(5 * i + 1) % 100 for i in range(40)]
EDGES = (0, 1, 255, 256, 257, 300, 511, 512, 513, 1024, 1025)
CACHES = pytest.mark.parametrize("dtype", [torch.float16, torch.int8], ids=str)


def attention_program(rows: Tensor, heads: int, kv_heads: int, head_dim: int) -> Program:
    """Attend from rows of queries, keys and values, which are not rotated; hand out the result."""
    attention = AttentionOp(
        src="x", dst="y", layer=0, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
        rotary_dim=0, q_norm=None, k_norm=None, eps=1e-5, scale=head_dim**-0.5,
    )  # fmt: skip
    width = heads * head_dim
    out = LinearOp(
        src="y", dst=LOGITS, prologue=None, in_features=width, selects_rows=True,
        pieces=(Piece(weight=torch.eye(width), bias=None, offset=0),),
    )  # fmt: skip
    embed = EmbedOp(dst="x", table=rows, positions_table=None, positions_offset=0)
    return Program(
        ops=(embed, attention, out), widths={"x": rows.shape[1], "y": width},
        inv_freq=torch.empty(0), rotary_scale=1.0, num_layers=1, vocab_size=width,
    )  # fmt: skip


def attention_spec(heads: int, kv_heads: int, head_dim: int) -> DecoderSpec:
    layer = LayerSpec(
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        intermediate_size=1,
    )  # fmt: skip
    return DecoderSpec(
        family="test", vocab_size=1, hidden_size=1, max_position_embeddings=4096, layers=(layer,),
        norm="rms", norm_eps=1e-5, activation="silu", gated_mlp=True,
    )  # fmt: skip


def make_executor(kernels: str, program: Program, threads: int = 2) -> Executor:
    if kernels == "reference":
        return ReferenceExecutor(program)
    return NativeExecutor(program, kernels=kernels, num_threads=threads)


def rounded(heads: Tensor, group: int) -> Tensor:
    return dequantize_heads(quantize_heads(heads, group), heads.shape[-1], group)


def attend_float64(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(T, H, E) queries over (T, K, E) keys and values, causally."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("the,she->hts", q.double(), k) * q.shape[2] ** -0.5
    seen = torch.ones(len(q), len(q)).tril().bool()
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hts,she->the", weights, v)


@pytest.mark.parametrize("head_dim", [64, 16, 40, 3])
def test_int8_attention_equals_float64_over_the_stored_codes(kernels: str, head_dim: int) -> None:
    heads, kv_heads, length = 6, 2, 530
    generator = torch.Generator().manual_seed(head_dim)
    rows = torch.randn(length, heads + 2 * kv_heads, head_dim, generator=generator)
    rows[:, heads:] *= 2 ** torch.randn(length, 2 * kv_heads, 1, generator=generator)
    rows[3, heads:] = 0
    q, k, v = rows.split((heads, kv_heads, kv_heads), 1)
    expected = attend_float64(q, rounded(k, KEY_GROUP), rounded(v, head_dim))
    executor = make_executor(kernels, attention_program(rows.flatten(1), heads, kv_heads, head_dim))
    spec = attention_spec(heads, kv_heads, head_dim)
    table = torch.randperm(40, generator=generator).tolist()
    cache = executor.make_cache(spec, 40, BLOCK, torch.int8)
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(-1)  # codes and, as bfloat16, not a number
    cuts = (0, 256, 512, 513, 530)
    parts = [
        executor.forward(pack_batch([[*range(length)]], [table], [span]), cache)
        for span in zip(cuts, cuts[1:], strict=False)
    ]
    out = torch.cat(parts).view(length, heads, head_dim)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head_dim", [64, 40, 8])
def test_native_int8_cache_holds_the_codes_of_the_reference(native: str, head_dim: int) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(20, 4, head_dim, generator=generator)
    executor = make_executor(native, attention_program(rows.flatten(1), 2, 1, head_dim))
    cache = executor.make_cache(attention_spec(2, 1, head_dim), 2, BLOCK, torch.int8)
    executor.forward(pack_batch([[*range(20)]], [[1, 0]], [(0, 20)]), cache)
    for stored, heads, group, is_turned in (
        (cache.keys[0], rows[:, 2], KEY_GROUP, True),
        (cache.values[0], rows[:, 3], head_dim, head_dim % 16 != 0),
    ):
        codes, scales = stored[[1, 0], 0].tensor_split([head_dim * BLOCK], 1)
        shape = (2, head_dim, BLOCK) if is_turned else (2, BLOCK, head_dim)
        codes = codes.view(shape).transpose(1, 2) if is_turned else codes.view(shape)
        scales = scales.reshape(2, -1, BLOCK, SCALE_BYTES).transpose(1, 2).flatten(2)
        found = torch.cat((codes, scales), 2).flatten(0, 1)[:20]
        assert torch.equal(found, quantize_heads(heads, group))


def test_rounded_heads_are_within_half_a_step() -> None:
    heads = torch.randn(50, 64) * 10 ** torch.linspace(-30, 30, 50)[:, None]
    error = (rounded(heads, 64) - heads).abs().amax(1)
    assert (error <= 0.505 * heads.abs().amax(1) / 127).all()


def run_spans(
    decoder: Decoder, dtype: torch.dtype, spans: Sequence[tuple[int, int]], *, neighbours: int
) -> Tensor:
    """Return the logits of LONG's tokens, computed in spans beside short sequences."""
    num_blocks = -(-len(LONG) // BLOCK)
    cache = decoder.make_cache(num_blocks=num_blocks + 3 * neighbours, dtype=dtype)
    table = [*range(num_blocks)][::-1]
    outputs = []
    for first, last in spans:
        beside = [SHORT] * neighbours
        blocks = [[num_blocks + 3 * i + j for j in range(3)] for i in range(neighbours)]
        tables = [table, *(own + [0] * (num_blocks - 3) for own in blocks)]
        ends = [(39, 40) if first else (0, 39)] * neighbours
        batch = pack_batch([LONG, *beside], tables, [(first, last), *ends])
        outputs.append(decoder.forward(batch, cache)[: last - first])
    return torch.cat(outputs)


@CACHES
@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(9, 3), (8, 1)], ids=["grouped", "more_than_an_item"]
)
def test_bits_do_not_depend_on_chunks_neighbours_or_threads(
    native: str, dtype: torch.dtype, heads: int, kv_heads: int
) -> None:
    spec, weights = make_decoder_parts("llama", num_heads=heads, num_kv_heads=kv_heads)
    chunks = [*zip(EDGES, EDGES[1:], strict=False)]
    results = []
    for threads, spans, neighbours in (
        (1, [(0, len(LONG))], 0),
        (1, chunks, 2),
        (2, chunks, 0),  # decodes in parts
        (3, chunks, 30),  # in whole items
        (4, chunks, 1),
    ):
        decoder = Decoder(spec, weights, kernels=native, num_threads=threads)  # type: ignore[arg-type]
        results.append(run_spans(decoder, dtype, spans, neighbours=neighbours))
    for other in results[1:]:
        assert torch.equal(results[0], other)


@CACHES
def test_long_context_equals_reference(native: str, dtype: torch.dtype) -> None:
    spec, weights = make_decoder_parts("llama", num_heads=6, num_kv_heads=2)
    native_logits, reference = (
        run_spans(
            Decoder(spec, weights, kernels=kernels, head="dense"),  # type: ignore[arg-type]
            dtype, [(0, 900), (900, 1024), (1024, 1025)], neighbours=1,
        )
        for kernels in (native, "reference")
    )  # fmt: skip
    torch.testing.assert_close(native_logits, reference, rtol=0, atol=2e-2)


def test_int8_cache_takes_half_of_float16_and_its_scales(kernels: str) -> None:
    spec, weights = make_decoder_parts("llama")
    decoder = Decoder(spec, weights, kernels=kernels)  # type: ignore[arg-type]
    cache: KVCache = decoder.make_cache(num_blocks=5, dtype=torch.int8)
    held = sum(t.nbytes for t in (*cache.keys, *cache.values))
    assert 5 * decoder.cache_bytes_per_block(dtype=torch.int8) == held
    wide = attention_spec(9, 3, 64)
    assert cache_bytes_per_block(wide, BLOCK, torch.float16) == 2 * 3 * BLOCK * 128
    assert cache_bytes_per_block(wide, BLOCK, torch.int8) == 3 * BLOCK * (128 + 3 * SCALE_BYTES)
