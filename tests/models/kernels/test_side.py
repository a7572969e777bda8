"""Side networks: native against reference, batches against rows alone, the base left alone."""

import dataclasses
import gc
import weakref

import pytest
import torch

from models.decoder import Decoder
from models.kernels.reference.operations import blend_side, run_side
from models.side import build_side_program
from models.spec import SpecError
from tests.models.kernels.random_decoders import KINDS, make_decoder_parts, pack_batch, run_alone
from tests.models.kernels.random_sides import (
    DOWNSAMPLES,
    make_side,
    run_side_alone,
    with_sides,
)

SEQUENCES = [[(7 * i + 3 * s) % 100 for i in range(n)] for s, n in enumerate((37, 5, 64, 1))]
TABLES = [[3, 1, 5, 7], [0, 9, 9, 9], [2, 4, 6, 8], [10, 9, 9, 9]]
SIDE_TABLES = [[8, 6, 4, 2], [10, 9, 9, 9], [7, 5, 3, 1], [0, 9, 9, 9]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("downsample", DOWNSAMPLES)
@pytest.mark.parametrize("kind", KINDS)
def test_native_side_network_equals_reference(
    native: str, kind: str, downsample: str, dtype: torch.dtype
) -> None:
    spec, weights = make_decoder_parts(kind)
    network = make_side(spec, downsample=downsample)
    results = []
    for kernels in (native, "reference"):
        decoder = Decoder(spec, weights, kernels=kernels, head="dense", num_threads=2)  # type: ignore[arg-type]
        side = decoder.attach(network)
        results.append(run_side_alone(decoder, side, SEQUENCES[0], scale=0.7, dtype=dtype))
    tolerance = 5e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=tolerance)
    base = run_alone(Decoder(spec, weights, kernels="reference", head="dense"), SEQUENCES[0])
    assert (results[1] - base).abs().max() > 0.1


@pytest.mark.parametrize("head_dim", [2, 3, 4, 5, 8, 16, 20])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (9, 3), (7, 1)])
def test_native_side_attention_equals_reference_for_any_shape(
    native: str, heads: int, kv_heads: int, head_dim: int
) -> None:
    spec, weights = make_decoder_parts("opt")
    network = make_side(spec, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    results = []
    for kernels in (native, "reference"):
        decoder = Decoder(spec, weights, kernels=kernels, head="dense")  # type: ignore[arg-type]
        results.append(run_side_alone(decoder, decoder.attach(network), SEQUENCES[0]))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=5e-5)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_native_batch_of_side_networks_gives_the_bits_of_its_rows_alone(
    native: str, kind: str, dtype: torch.dtype, threads: int
) -> None:
    spec, weights = make_decoder_parts(kind, is_quantized=True)
    decoder = Decoder(spec, weights, kernels=native, num_threads=threads)  # type: ignore[arg-type]
    sides = [decoder.attach(make_side(spec, seed=1)), decoder.attach(make_side(spec, seed=2))]
    sides.append(decoder.attach(make_side(spec, seed=3, reduction=8, head_dim=8)))
    cache = decoder.make_cache(num_blocks=12, dtype=dtype)
    caches = [decoder.make_side_cache(side, num_blocks=12, dtype=dtype) for side in sides]
    caches[1] = caches[0]
    owners = [0, 1, 2, None]
    steps = [
        [(0, 20), (0, 1), (0, 33), (0, 1)],
        [(20, 21), (1, 2), (33, 60)],
        [(21, 22), (2, 3), (60, 61)],
        [(22, 37), (3, 5)],
    ]
    outputs: list[list[torch.Tensor]] = [[], [], [], []]
    for spans in steps:
        count = len(spans)
        batch = pack_batch(SEQUENCES[:count], TABLES[:count], spans)
        entries = [
            (sides[owner], caches[owner], i, SIDE_TABLES[i], 1.0)
            for i, owner in enumerate(owners[:count])
            if owner is not None
        ]
        logits = decoder.forward(with_sides(batch, entries[::-1]), cache)
        for i, part in enumerate(logits.split([last - first for first, last in spans])):
            outputs[i].append(part)
    for sequence, parts, owner in zip(SEQUENCES, outputs, owners, strict=True):
        together = torch.cat(parts)
        sequence = sequence[: len(together)]
        if owner is None:
            assert torch.equal(together, run_alone(decoder, sequence, dtype))
        else:
            alone = run_side_alone(decoder, sides[owner], sequence, dtype=dtype)
            assert torch.equal(together, alone)


def test_several_side_networks_fill_their_caches_in_one_base_forward(
    kernels: str,
) -> None:
    spec, weights = make_decoder_parts("llama", is_quantized=True)
    decoder = Decoder(spec, weights, kernels=kernels)  # type: ignore[arg-type]
    sides = [decoder.attach(make_side(spec, seed=seed)) for seed in range(3)]
    cache = decoder.make_cache(num_blocks=12, dtype=torch.float32)
    side_cache = decoder.make_side_cache(sides[0], num_blocks=12, dtype=torch.float32)
    sequence = SEQUENCES[0]
    tables = [[i * 4, i * 4 + 1, i * 4 + 2] for i in range(3)]
    batch = pack_batch([sequence], [TABLES[0]], [(0, 30)])
    entries = [(side, side_cache, 0, table, 0.0) for side, table in zip(sides, tables, strict=True)]
    base = decoder.forward(with_sides(batch, entries), cache)
    torch.testing.assert_close(base, run_alone(decoder, sequence[:30]), rtol=0, atol=1e-5)
    for side, table in zip(sides, tables, strict=True):
        rest = pack_batch([sequence], [TABLES[0]], [(30, 37)])
        logits = decoder.forward(with_sides(rest, [(side, side_cache, 0, table, 1.0)]), cache)
        expected = run_side_alone(decoder, side, sequence)[30:]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_base_cache_and_logits_are_the_same_with_any_side_network(
    kernels: str,
) -> None:
    spec, weights = make_decoder_parts("llama", is_quantized=True)
    decoder = Decoder(spec, weights, kernels=kernels)  # type: ignore[arg-type]
    held, outputs = [], []
    for seed in (None, 1, 2):
        cache = decoder.make_cache(num_blocks=12)
        batch = pack_batch(SEQUENCES[:2], TABLES[:2], [(0, 37), (0, 5)])
        if seed is not None:
            side = decoder.attach(make_side(spec, seed=seed))
            side_cache = decoder.make_side_cache(side, num_blocks=12)
            batch = with_sides(batch, [(side, side_cache, 0, SIDE_TABLES[0], 1.0)])
        outputs.append(decoder.forward(batch, cache))
        held.append((*cache.keys, *cache.values))
    for tensors in held[1:]:
        assert all(torch.equal(a, b) for a, b in zip(tensors, held[0], strict=True))
    for output in outputs[1:]:
        assert torch.equal(output[37:], outputs[0][37:])
        assert not torch.equal(output[:37], outputs[0][:37])


def test_keys_and_values_before_the_write_start_are_left_alone(
    kernels: str,
) -> None:
    spec, weights = make_decoder_parts("llama")
    decoder = Decoder(spec, weights, kernels=kernels)  # type: ignore[arg-type]
    side = decoder.attach(make_side(spec))
    cache = decoder.make_cache(num_blocks=4, dtype=torch.float32)
    side_cache = decoder.make_side_cache(side, num_blocks=4, dtype=torch.float32)
    sequence = SEQUENCES[0]
    entries = [(side, side_cache, 0, [3, 2, 1], 1.0)]
    batch = pack_batch([sequence], [[0, 1, 2]], [(0, 37)])
    first = decoder.forward(with_sides(batch, entries), cache)
    marked = [*cache.keys, *cache.values, *side_cache.keys, *side_cache.values]
    for tensor in marked[: len(marked) // 2]:
        tensor[2] = 0
    for tensor in marked[len(marked) // 2 :]:
        tensor[1] = 0
    before = [tensor.clone() for tensor in marked]
    batch = dataclasses.replace(batch, write_starts=torch.tensor([32], dtype=torch.int32))
    second = decoder.forward(with_sides(batch, entries, write_starts=[32]), cache)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)
    for i, (tensor, old) in enumerate(zip(marked, before, strict=True)):
        fresh = 2 if i < len(marked) // 2 else 1
        others = [block for block in range(4) if block != fresh]
        assert torch.equal(tensor[others], old[others])
        assert tensor[fresh].abs().sum() > 0


def test_native_side_attention_ignores_what_another_sequence_left_in_a_block(native: str) -> None:
    spec, weights = make_decoder_parts("llama")
    decoder = Decoder(spec, weights, kernels=native)  # type: ignore[arg-type]
    side = decoder.attach(make_side(spec))
    cache = decoder.make_cache(num_blocks=4, dtype=torch.float32)
    side_cache = decoder.make_side_cache(side, num_blocks=4, dtype=torch.float32)
    for tensor in (*side_cache.keys, *side_cache.values):
        tensor.fill_(float("nan"))
    batch = pack_batch([SEQUENCES[0]], [[2, 0, 3]], [(0, 37)])
    out = decoder.forward(with_sides(batch, [(side, side_cache, 0, [1, 3, 0], 1.0)]), cache)
    assert torch.equal(out, run_side_alone(decoder, side, SEQUENCES[0]))


def test_side_network_is_causal(native: str) -> None:
    spec, weights = make_decoder_parts("llama", is_quantized=True)
    decoder = Decoder(spec, weights, kernels=native)  # type: ignore[arg-type]
    side = decoder.attach(make_side(spec))
    changed = [*SEQUENCES[0][:20], 99, *SEQUENCES[0][21:]]
    first, second = (run_side_alone(decoder, side, s) for s in (SEQUENCES[0], changed))
    assert torch.equal(first[:20], second[:20])
    assert not torch.equal(first[20:], second[20:])


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_are_the_taps(kind: str, kernels: str) -> None:
    spec, weights = make_decoder_parts(kind, is_quantized=True)
    decoder = Decoder(spec, weights, kernels=kernels)  # type: ignore[arg-type]
    batch = pack_batch(SEQUENCES[:3], TABLES[:3], [(0, 37), (0, 5), (0, 64)])
    taps = torch.empty(len(spec.layers) + 1, 106, spec.hidden_size)
    logits = decoder.forward(batch, decoder.make_cache(num_blocks=12), taps=taps)
    states = list(decoder.hidden_states(batch))
    tolerance = 0 if kernels != "reference" else 1e-4
    torch.testing.assert_close(torch.stack(states), taps, rtol=0, atol=tolerance)
    normed = decoder.apply_final_norm(states[-1])
    torch.testing.assert_close(decoder.logits(normed), logits, rtol=0, atol=2e-3)


def test_reference_functions_give_gradients_to_the_side_network_only() -> None:
    spec, weights = make_decoder_parts("llama")
    decoder = Decoder(spec, weights, kernels="reference", head="dense")
    network = make_side(spec)
    leaves = [network.up, network.gates, network.base_share, *network.weights.values()]
    for leaf in leaves:
        leaf.requires_grad_()  # type: ignore[union-attr]
    program = build_side_program(network, spec)
    batch = pack_batch([SEQUENCES[1]], [TABLES[1]], [(0, 5)])
    hidden = list(decoder.hidden_states(batch))

    def attend(op, q, k, v):  # type: ignore[no-untyped-def]
        k, v = (x.repeat_interleave(op.num_heads // op.num_kv_heads, 1) for x in (k, v))
        scores = torch.einsum("qhe,khe->hqk", q, k) * op.scale
        scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
        return torch.einsum("hqk,khe->qhe", scores.softmax(-1), v).flatten(1)

    side = run_side(program, hidden, batch.positions.long(), attend=attend)
    blended = blend_side(program, decoder.apply_final_norm(hidden[-1]), side)
    logits = decoder.logits(blended)
    expected = run_side_alone(decoder, decoder.attach(network), SEQUENCES[1])
    torch.testing.assert_close(logits.detach(), expected, rtol=0, atol=1e-4)
    blended.square().sum().backward()
    assert all(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in leaves)  # type: ignore[union-attr]


def test_side_network_that_does_not_fit_is_refused_with_every_reason() -> None:
    spec, weights = make_decoder_parts("llama")
    decoder = Decoder(spec, weights, kernels="reference")
    network = make_side(spec)
    broken = {**network.weights, "layers.0.q.weight": torch.zeros(3, 3)}
    del broken["final_norm.weight"]
    bad = dataclasses.replace(
        network, weights=broken, up=torch.zeros(2, 2), downsamples=network.downsamples[:-1]
    )
    with pytest.raises(SpecError) as error:
        decoder.attach(bad)
    message = str(error.value)
    assert "downsamples: 3, expected 4" in message
    assert "up: shape: (2, 2), expected (64, 16)" in message
    assert "layers.0.q.weight: shape: (3, 3), expected (16, 16)" in message
    assert "final_norm.weight: missing" in message


def test_side_cache_takes_its_share_of_the_bases_bytes() -> None:
    spec, weights = make_decoder_parts("llama")
    decoder = Decoder(spec, weights, kernels="reference")
    side = decoder.attach(make_side(spec, heads=4, kv_heads=2, head_dim=4))
    cache = decoder.make_side_cache(side, num_blocks=1)
    held = sum(t.nbytes for t in (*cache.keys, *cache.values))
    assert 4 * held == decoder.cache_bytes_per_block()


def test_side_network_is_freed_with_its_last_reference(kernels: str) -> None:
    spec, weights = make_decoder_parts("llama")
    decoder = Decoder(spec, weights, kernels=kernels)  # type: ignore[arg-type]
    side = decoder.attach(make_side(spec))
    run_side_alone(decoder, side, SEQUENCES[1])
    reference = weakref.ref(side)
    del side
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("head", ["int8", "dense"])
@pytest.mark.parametrize("kind", KINDS)
def test_final_states_are_what_the_head_reads(kind: str, kernels: str, head: str) -> None:
    spec, weights = make_decoder_parts(kind, is_quantized=True)
    decoder = Decoder(spec, weights, kernels=kernels, head=head)  # type: ignore[arg-type]
    side = decoder.attach(make_side(spec))
    tolerance = 0 if kernels != "reference" else 1e-4
    for count in (3, 1):
        cache = decoder.make_cache(num_blocks=12)
        side_cache = decoder.make_side_cache(side, num_blocks=12)
        spans = [(0, 37), (0, 5), (0, 64)][:count]
        batch = pack_batch(SEQUENCES[:count], TABLES[:count], spans)
        rows = [spans[0][1] - 1, *range(38, 42)][: 1 + 4 * (count > 1)]
        batch = dataclasses.replace(batch, output_rows=torch.tensor(rows, dtype=torch.int32))
        plain = torch.zeros(len(rows), spec.hidden_size)
        logits = decoder.forward(batch, cache, states=plain)
        torch.testing.assert_close(decoder.logits(plain), logits, rtol=0, atol=tolerance)
        last = list(decoder.hidden_states(batch))[-1][rows]
        torch.testing.assert_close(plain, decoder.apply_final_norm(last), rtol=0, atol=1e-4)
        # Rows of the first sequence have a side network.
        mixed = with_sides(batch, [(side, side_cache, 0, TABLES[0], 1.0)])
        blended = torch.zeros_like(plain)
        logits = decoder.forward(mixed, cache, states=blended)
        torch.testing.assert_close(decoder.logits(blended), logits, rtol=0, atol=tolerance)
        assert not torch.equal(blended[0], plain[0])
        torch.testing.assert_close(blended[1:], plain[1:], rtol=0, atol=tolerance)
