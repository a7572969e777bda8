"""The CUDA executor as a whole: on a GPU where there is one, and on the CPU with graphs faked."""

import dataclasses
import gc
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.batch import PackedBatch
from models.decoder import Decoder
from models.kernels.cuda.graphs import Recording
from models.kv_cache import KVCache
from models.pruning import prune_spec, slice_weight
from models.spec import DecoderSpec
from models.weights import Weight
from tests.models.kernels.fake_graphs import fake_cuda
from tests.models.kernels.random_decoders import KINDS, make_decoder_parts, pack_batch, run_alone
from tests.models.kernels.random_sides import DOWNSAMPLES, make_side, with_sides
from tests.models.random_selections import random_selections

SEQUENCES = [[(7 * i + 3 * s) % 100 for i in range(n)] for s, n in enumerate((37, 5, 64))]
TABLES = [[3, 1, 5, 7], [0, 9, 9, 9], [2, 4, 6, 8]]
SIDE_TABLES = [[8, 6, 4, 2], [10, 9, 9, 9], [7, 5, 3, 1]]
PROMPTS = [(0, 30), (0, 3), (0, 62)]
DECODES = [[(30, 31), (3, 4), (62, 63)], [(31, 32), (4, 5), (63, 64)]]
Parts = tuple[DecoderSpec, dict[str, Weight]]
Make = Callable[..., Decoder]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Return what makes a decoder with the CUDA executor."""
    if request.param == "cpu":
        fake_cuda(monkeypatch)

    def make(parts: Parts, base: Decoder | None = None) -> Decoder:
        return Decoder(*parts, kernels="cuda", device=request.param, head="dense", base=base)

    return make


def reference(parts: Parts, base: Decoder | None = None) -> Decoder:
    return Decoder(*parts, kernels="reference", head="dense", base=base)


def make_variant(parts: Parts) -> Parts:
    spec, weights = parts
    chosen = random_selections(spec)
    pruned = {
        name: slice_weight(name, weight, spec, chosen)
        for name, weight in weights.items()
        if isinstance(weight, Tensor)
    }
    return prune_spec(spec, chosen), pruned  # type: ignore[return-value]


def make_cache(decoder: Decoder) -> KVCache:
    return decoder.make_cache(num_blocks=12, dtype=torch.float32)


def decode(decoder: Decoder, cache: KVCache, table: list[int], tokens: int = 3) -> Tensor:
    """Return the logits of the first tokens of a sequence, one step each."""
    batches = (pack_batch(SEQUENCES[:1], [table], [(i, i + 1)]) for i in range(tokens))
    return torch.cat([decoder.forward(batch, cache) for batch in batches]).cpu()


def assert_near(found: Tensor, expected: Tensor) -> None:
    error = (found.cpu() - expected).std() / expected.std()
    assert error < 0.02  # bfloat16 operands


def recordings(decoder: Decoder) -> "list[weakref.ref[Recording]]":
    return [*map(weakref.ref, decoder._executor._recorder._recordings)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", KINDS)
def test_decoder_equals_reference(make: Make, kind: str) -> None:
    parts = make_decoder_parts(kind)
    results = []
    for decoder in (make(parts), reference(parts)):
        cache = make_cache(decoder)
        steps = (pack_batch(SEQUENCES, TABLES, spans) for spans in (PROMPTS, *DECODES))
        results.append(torch.cat([decoder.forward(batch, cache).cpu() for batch in steps]))
    assert_near(*results)


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_and_their_logits_equal_reference(make: Make, kind: str) -> None:
    parts = make_decoder_parts(kind)
    batch = pack_batch(SEQUENCES, TABLES, PROMPTS)
    results = []
    for decoder in (make(parts), reference(parts)):
        states = list(decoder.hidden_states(batch))
        logits = decoder.logits(decoder.apply_final_norm(states[-1]))
        results.append([*states, logits])
    for found, expected in zip(*results, strict=True):
        assert_near(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_4_bit_decoder_equals_reference_on_a_gpu(kind: str) -> None:
    parts = make_decoder_parts(kind, is_quantized=True)
    results = []
    for kernels, device in (("cuda", "cuda"), ("reference", "cpu")):
        decoder = Decoder(*parts, kernels=kernels, device=device, head="dense")  # type: ignore[arg-type]
        cache = make_cache(decoder)
        steps = (pack_batch(SEQUENCES, TABLES, spans) for spans in (PROMPTS, *DECODES))
        results.append(torch.cat([decoder.forward(batch, cache).cpu() for batch in steps]))
    assert_near(*results)


def test_graph_replays_for_other_batches(make: Make) -> None:
    decoder = make(make_decoder_parts("llama"))
    cache = make_cache(decoder)
    decoder.forward(pack_batch(SEQUENCES, TABLES, PROMPTS), cache)
    three = decoder.forward(pack_batch(SEQUENCES, TABLES, DECODES[0]), cache)
    two = decoder.forward(pack_batch(SEQUENCES[:2], TABLES[:2], DECODES[0][:2]), cache)
    torch.testing.assert_close(two, three[:2], rtol=0.02, atol=0.02)


def test_graphs_of_several_shapes_share_memory_and_keep_their_results(make: Make) -> None:
    parts = make_decoder_parts("llama")
    decoder = make(parts)
    cache = make_cache(decoder)
    decoder.forward(pack_batch(SEQUENCES, TABLES, PROMPTS), cache)

    def step(count: int) -> Tensor:
        batch = pack_batch(SEQUENCES[:count], TABLES[:count], DECODES[0][:count])
        return decoder.forward(batch, cache)

    first = {count: step(count) for count in (3, 1, 2)}
    kept = {count: logits.clone() for count, logits in first.items()}
    again = {count: step(count) for count in (1, 2, 3)}
    for count in first:
        assert torch.equal(first[count], kept[count])
        assert torch.equal(first[count], again[count])
    graphs = [recording().graph for recording in recordings(decoder)]  # type: ignore[union-attr]
    assert len(graphs) == 3
    assert len({graph.pool() for graph in graphs}) == 1


def test_logits_of_a_step_can_be_written_and_graphs_replayed_in_any_mode(make: Make) -> None:
    decoder = make(make_decoder_parts("llama"))
    cache = make_cache(decoder)
    with torch.inference_mode():
        first = decode(decoder, cache, TABLES[0])
    second = decode(decoder, cache, TABLES[0])
    assert torch.equal(first, second)
    second[0] = 0


def test_block_table_entries_past_the_context_are_ignored(make: Make) -> None:
    decoder = make(make_decoder_parts("llama"))
    cache = make_cache(decoder)
    decoder.forward(pack_batch(SEQUENCES, TABLES, PROMPTS), cache)
    expected = decoder.forward(pack_batch(SEQUENCES, TABLES, DECODES[0]), cache)
    tables = [TABLES[0], [0, 999, -5, 999], TABLES[2]]
    found = decoder.forward(pack_batch(SEQUENCES, tables, DECODES[0]), cache)
    assert torch.equal(found, expected)


def test_what_another_sequence_left_in_a_block_is_ignored(make: Make) -> None:
    decoder = make(make_decoder_parts("llama"))
    cache, clean = make_cache(decoder), make_cache(decoder)
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(float("nan"))
    table = TABLES[0]
    assert torch.equal(decode(decoder, cache, table), decode(decoder, clean, table))


@pytest.mark.parametrize("downsample", DOWNSAMPLES)
@pytest.mark.parametrize("kind", KINDS)
def test_side_network_equals_reference(make: Make, kind: str, downsample: str) -> None:
    parts = make_decoder_parts(kind)
    network = make_side(parts[0], downsample=downsample)
    results, alone = [], []
    for decoder in (make(parts), reference(parts)):
        side = decoder.attach(network)
        cache = make_cache(decoder)
        side_cache = decoder.make_side_cache(side, num_blocks=12, dtype=torch.float32)
        logits = []
        for spans in (PROMPTS[:1], DECODES[0][:1], DECODES[1][:1]):
            batch = pack_batch(SEQUENCES[:1], TABLES[:1], spans)
            entries = [(side, side_cache, 0, SIDE_TABLES[0], 0.7)]
            logits.append(decoder.forward(with_sides(batch, entries), cache).cpu())
        results.append(torch.cat(logits))
        alone.append(run_alone(decoder, SEQUENCES[0][:32]).cpu())
    assert_near(*results)
    assert (results[0] - alone[0]).std() / alone[0].std() > 0.1


def test_batch_that_mixes_side_networks_and_phases_equals_reference(make: Make) -> None:
    parts = make_decoder_parts("llama")
    networks = [make_side(parts[0], seed=1), make_side(parts[0], seed=2, downsample="max")]
    results = []
    for decoder in (make(parts), reference(parts)):
        sides = [decoder.attach(network) for network in networks]
        cache = make_cache(decoder)
        side_cache = decoder.make_side_cache(sides[0], num_blocks=12, dtype=torch.float32)

        def step(batch: PackedBatch, *entries: tuple[int, int, float]) -> Tensor:
            packed = [
                (sides[s], side_cache, b, SIDE_TABLES[s if s else b], scale)  # noqa: B023
                for s, b, scale in entries
            ]
            return decoder.forward(with_sides(batch, packed), cache).cpu()  # noqa: B023

        pack = pack_batch
        results.append(
            torch.cat((
                # Both prefill sequence 0, one of them for later; sequence 1 has none.
                step(pack(SEQUENCES[:2], TABLES[:2], PROMPTS[:2]), (0, 0, 1.0), (1, 0, 0.0)),
                # One decodes with the other network, one without, and a third begins.
                step(pack(SEQUENCES, TABLES, [(30, 31), (3, 4), (0, 62)]), (1, 0, 1.0)),
                decoder.forward(pack(SEQUENCES, TABLES, DECODES[1][:2] + [(62, 63)]), cache).cpu(),
            ))
        )  # fmt: skip
    assert_near(*results)


def test_step_with_side_networks_leaves_rows_without_alone(make: Make) -> None:
    decoder = make(make_decoder_parts("llama"))
    side = decoder.attach(make_side(decoder.spec))
    side_cache = decoder.make_side_cache(side, num_blocks=12, dtype=torch.float32)
    batch = pack_batch(SEQUENCES, TABLES, PROMPTS)
    entries = [(side, side_cache, 0, SIDE_TABLES[0], 1.0)]
    plain = decoder.forward(batch, make_cache(decoder))
    mixed = decoder.forward(with_sides(batch, entries), make_cache(decoder))
    assert torch.equal(mixed[30:], plain[30:])
    assert not torch.allclose(mixed[:30], plain[:30])


@pytest.mark.parametrize("kind", KINDS)
def test_variant_and_base_over_one_cache_equal_reference(make: Make, kind: str) -> None:
    parts = make_decoder_parts(kind)
    results = []
    for build in (make, reference):
        base = build(parts)
        variant = build(make_variant(parts), base=base)
        cache = make_cache(base)
        logits = []
        for spans in (PROMPTS, *DECODES):
            for decoder, rows in ((base, slice(0, 2)), (variant, slice(2, 3))):
                batch = pack_batch(SEQUENCES[rows], TABLES[rows], spans[rows])
                logits.append(decoder.forward(batch, cache).cpu())
        results.append(torch.cat(logits))
        if build is make:
            graphs = [recording().graph for recording in recordings(variant)]  # type: ignore[union-attr]
            assert len(graphs) == 2
            assert len({graph.pool() for graph in graphs}) == 1
    assert_near(*results)


def test_side_network_on_a_variant_equals_reference(make: Make) -> None:
    parts = make_decoder_parts("llama")
    pruned = make_variant(parts)
    network = make_side(pruned[0])
    results = []
    for build in (make, reference):
        decoder = build(pruned, base=build(parts))
        side = decoder.attach(network)
        cache = make_cache(decoder)
        side_cache = decoder.make_side_cache(side, num_blocks=12, dtype=torch.float32)
        batch = pack_batch(SEQUENCES[:1], TABLES[:1], [(0, 37)])
        batch = with_sides(batch, [(side, side_cache, 0, SIDE_TABLES[0], 1.0)])
        results.append(decoder.forward(batch, cache))
    assert_near(*results)


def test_side_networks_attach_while_another_thread_decodes_and_captures(make: Make) -> None:
    decoder = make(make_decoder_parts("llama"))
    network = make_side(decoder.spec)
    expected = decode(decoder, make_cache(decoder), TABLES[0], 18)
    attached, errors, is_over = [], [], threading.Event()

    def attach() -> None:
        try:
            while not (attached and is_over.is_set()):
                attached[:] = [*attached[-2:], decoder.attach(network)]
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=attach)
    thread.start()
    try:
        for _ in range(2):  # of a new cache each, so with captures
            assert torch.equal(decode(decoder, make_cache(decoder), TABLES[0], 18), expected)
    finally:
        is_over.set()
        thread.join()
    assert errors == []
    side_cache = decoder.make_side_cache(attached[-1], num_blocks=12, dtype=torch.float32)
    batch = pack_batch(SEQUENCES[:1], TABLES[:1], [(0, 37)])
    batch = with_sides(batch, [(attached[-1], side_cache, 0, SIDE_TABLES[0], 1.0)])
    assert decoder.forward(batch, make_cache(decoder)).isfinite().all()


@pytest.mark.parametrize("what", ["attach", "make_cache", "variant"])
def test_nothing_is_allocated_by_another_thread_during_a_capture(make: Make, what: str) -> None:
    parts = make_decoder_parts("llama")
    decoder = make(parts)
    actions: dict[str, Callable[[], object]] = {
        "attach": lambda: decoder.attach(make_side(decoder.spec)),
        "make_cache": lambda: make_cache(decoder),
        "variant": lambda: make(make_variant(parts), base=decoder),
    }
    thread = threading.Thread(target=actions[what])
    recorder = decoder._executor._recorder  # type: ignore[attr-defined]

    def step() -> Tensor:
        if not thread.ident:
            thread.start()
        thread.join(0.1)
        assert thread.is_alive()
        return torch.zeros(1, device=decoder._device)

    recorder.record(step)
    thread.join()


def test_cache_at_the_place_of_one_that_is_gone_meets_no_graph_of_it(make: Make) -> None:
    decoder = make(make_decoder_parts("llama"))
    fresh = make_cache(decoder)
    for _ in range(1000):
        first = make_cache(decoder)
        expected = decode(decoder, first, TABLES[0])
        place = id(first)
        del first
        cache = dataclasses.replace(fresh)
        if id(cache) == place:
            break
    assert id(cache) == place
    assert torch.equal(decode(decoder, cache, TABLES[0]), expected)


def test_graphs_are_freed_with_their_cache_and_others_kept(make: Make) -> None:
    decoder = make(make_decoder_parts("llama"))
    kept, dropped = make_cache(decoder), make_cache(decoder)
    expected = decode(decoder, kept, TABLES[0])
    (first,) = recordings(decoder)
    decode(decoder, dropped, TABLES[0])
    assert len(recordings(decoder)) == 2
    del dropped
    assert [reference() for reference in recordings(decoder)] == [first()]
    assert torch.equal(decode(decoder, kept, TABLES[0]), expected)
    del kept
    assert first() is None
    assert torch.equal(decode(decoder, make_cache(decoder), TABLES[0]), expected)


def test_graphs_of_a_variant_are_freed_with_it_while_the_cache_lives(make: Make) -> None:
    parts = make_decoder_parts("llama")
    base = make(parts)
    variant = make(make_variant(parts), base=base)
    cache = make_cache(base)
    expected = decode(base, cache, TABLES[0])
    decode(variant, cache, TABLES[2])
    assert len(recordings(base)) == 2
    del variant
    gc.collect()
    assert len(recordings(base)) == 1
    assert torch.equal(decode(base, cache, TABLES[0]), expected)
