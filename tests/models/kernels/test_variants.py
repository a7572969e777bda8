"""A decoder and its pruned variants: what they share, and for how long."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch

from models.decoder import Decoder
from models.kernels.cuda.executor import CudaExecutor
from models.program import Norm, build_program
from models.pruning import prune_spec, slice_weight
from models.quantization import quantize_4bit
from models.spec import DecoderSpec, SpecError
from models.weights import Weight, dense
from tests.models.kernels.random_decoders import KINDS, make_decoder_parts, pack_batch, run_alone
from tests.models.kernels.random_sides import make_side, run_side_alone
from tests.models.random_selections import WIDTHS, random_selections, whole_selections

SEQUENCE = [(7 * i + 3) % 100 for i in range(40)]
Parts = tuple[DecoderSpec, dict[str, Weight]]


def make_parts(kind: str = "llama", widths: tuple[int, ...] = WIDTHS) -> tuple[Parts, Parts]:
    """Return a base with 16-bit norms and a variant, which share what is not sliced."""
    spec, weights = make_decoder_parts(kind)
    chosen = random_selections(spec, widths) if widths else whole_selections(spec)
    weights = {n: dense(w).bfloat16() if dense(w).ndim == 1 else w for n, w in weights.items()}
    pruned = dict(weights)
    for name, weight in weights.items():
        assert isinstance(weight, torch.Tensor)
        sliced = slice_weight(name, weight, spec, chosen)
        is_linear = weight.ndim == 2 and name.startswith("layers.")
        if sliced is not weight:
            pruned[name] = quantize_4bit(sliced) if is_linear else sliced
        if is_linear:
            weights[name] = quantize_4bit(weight)
            if sliced is weight:
                pruned[name] = weights[name]
    return (spec, weights), (prune_spec(spec, chosen), pruned)


@pytest.fixture
def make(kernels: str) -> Callable[..., Decoder]:
    def make(parts: Parts, **options: object) -> Decoder:
        return Decoder(*parts, **({"kernels": kernels, "num_threads": 2} | options))  # type: ignore[arg-type]

    return make


def program_of(decoder: Decoder):  # type: ignore[no-untyped-def]
    return decoder._executor.program  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", KINDS)
def test_variant_computes_the_bits_of_a_decoder_of_its_own(
    make: Callable[..., Decoder], kind: str
) -> None:
    base, pruned = make_parts(kind)
    variant = make(pruned, base=make(base))
    assert torch.equal(run_alone(variant, SEQUENCE), run_alone(make(pruned), SEQUENCE))


@pytest.mark.parametrize("kind", KINDS)
def test_variant_that_removes_nothing_is_its_base_and_adds_no_bytes(
    make: Callable[..., Decoder], kind: str
) -> None:
    base, whole = make_parts(kind, ())
    decoder = make(base)
    variant = make(whole, base=decoder)
    assert torch.equal(run_alone(variant, SEQUENCE), run_alone(decoder, SEQUENCE))
    assert variant.num_bytes == 0
    assert decoder.num_bytes > 0


@pytest.mark.parametrize("kind", KINDS)
def test_variant_takes_bytes_for_its_own_matrices_only(
    make: Callable[..., Decoder], kind: str
) -> None:
    base, pruned = make_parts(kind)
    own = {n: w for n, w in pruned[1].items() if w is not base[1][n]}
    shared = set(pruned[1]) - set(own)
    assert {"embed.weight", "layers.0.attn_norm.weight", "layers.2.attn_norm.weight"} <= shared
    variant, alone = make(pruned, base=make(base)), make(pruned)
    embedding = dense(base[1]["embed.weight"]).nbytes
    assert alone.num_bytes - variant.num_bytes > 1.25 * embedding  # and an 8-bit head, and norms
    # Panels are padded to 16 outputs, and what no group of inputs divides becomes float32.
    assert variant.num_bytes < sum(dense(w).nbytes * 1.6 for w in own.values())


def test_embedding_norms_and_head_are_the_bases_own_objects(make: Callable[..., Decoder]) -> None:
    base, pruned = make_parts("opt")
    decoder = make(base)
    programs = [program_of(d) for d in (decoder, make(pruned, base=decoder))]
    embeds, heads = ([p.ops[i] for p in programs] for i in (0, -1))
    assert embeds[0].table is embeds[1].table is base[1]["embed.weight"]
    assert embeds[0].positions_table is embeds[1].positions_table
    assert heads[0].pieces[0].weight is heads[1].pieces[0].weight
    norms = [
        [op.prologue for op in p.ops if isinstance(getattr(op, "prologue", None), Norm)]
        for p in programs
    ]
    assert len(norms[0]) == 7
    for first, second in zip(*norms, strict=True):
        assert first.weight is second.weight
        assert first.bias is second.bias
        assert first.weight.dtype == torch.float32


def test_head_panels_lie_in_the_same_place(native: str) -> None:
    base, pruned = make_parts("llama")
    decoder = Decoder(*base, kernels=native, num_threads=1)  # type: ignore[arg-type]
    variant = Decoder(*pruned, base=decoder)
    places = []
    for lowering in (d._executor._lowering for d in (decoder, variant)):  # type: ignore[attr-defined]
        panels = lowering._panels[id(program_of(decoder).head.pieces[0].weight)]
        table = lowering._tensors[id(base[1]["embed.weight"])]
        places.append((panels.data.data_ptr(), table.data_ptr()))
    assert places[0] == places[1]


def test_weights_that_are_equal_but_not_the_same_object_are_not_shared(
    make: Callable[..., Decoder],
) -> None:
    base, whole = make_parts("llama", ())
    embedding = dense(base[1]["embed.weight"]).clone() + 1
    variant = make((whole[0], whole[1] | {"embed.weight": embedding}), base=make(base))
    assert variant.num_bytes == embedding.nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_variant_outlives_its_base(make: Callable[..., Decoder], kind: str) -> None:
    base, pruned = make_parts(kind)
    decoder = make(base)
    variant = make(pruned, base=decoder)
    before = run_alone(variant, SEQUENCE)
    base[1].clear()
    del decoder
    gc.collect()
    filler = [torch.full((64, 96), float("nan")) for _ in range(200)]  # takes memory that was freed
    assert torch.equal(run_alone(variant, SEQUENCE), before)
    assert len(filler) == 200


def test_base_outlives_its_variants(make: Callable[..., Decoder]) -> None:
    base, pruned = make_parts()
    decoder = make(base)
    before = run_alone(decoder, SEQUENCE)
    for _ in range(3):
        run_alone(make(pruned, base=decoder), SEQUENCE)
        gc.collect()
    assert torch.equal(run_alone(decoder, SEQUENCE), before)


def test_threads_are_shared_and_end_with_their_last_user(native: str) -> None:
    base, pruned = make_parts()
    decoder = Decoder(*base, kernels=native, num_threads=4)  # type: ignore[arg-type]
    variant = Decoder(*pruned, base=decoder)
    pools = [weakref.ref(d._executor._pool) for d in (decoder, variant)]  # type: ignore[attr-defined]
    assert pools[0]() is pools[1]() is not None
    del decoder
    gc.collect()
    assert pools[0]() is not None
    run_alone(variant, SEQUENCE)
    del variant
    gc.collect()
    assert pools[0]() is None


@pytest.mark.parametrize("kind", KINDS)
def test_one_cache_serves_base_and_variant(make: Callable[..., Decoder], kind: str) -> None:
    base, pruned = make_parts(kind)
    decoder = make(base)
    variant = make(pruned, base=decoder)
    cache = decoder.make_cache(num_blocks=8, dtype=torch.float32)
    own = variant.make_cache(num_blocks=8, dtype=torch.float32)
    for ours, theirs in ((cache.keys, own.keys), (cache.values, own.values)):
        assert [(t.shape, t.dtype) for t in ours] == [(t.shape, t.dtype) for t in theirs]
    assert variant.cache_bytes_per_block() == decoder.cache_bytes_per_block()
    tables = {decoder: [[3, 0, 5]], variant: [[1, 4, 2]]}
    outputs: dict[Decoder, list[torch.Tensor]] = {decoder: [], variant: []}
    for span in ((0, 17), (17, 18), (18, 39), (39, 40)):
        for which, table in tables.items():
            outputs[which].append(which.forward(pack_batch([SEQUENCE], table, [span]), cache))
    for which, parts in outputs.items():
        expected = run_alone(which, SEQUENCE)
        torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=1e-4)


def test_greedy_tokens_with_a_cache_are_those_without(make: Callable[..., Decoder]) -> None:
    base, pruned = make_parts()
    variant = make(pruned, base=make(base))
    cache = variant.make_cache(num_blocks=5, dtype=torch.float32)
    tokens, first = [5, 17, 42], 0
    table = [[2, 0, 4, 1, 3]]
    while len(tokens) < 67:
        logits = variant.forward(pack_batch([tokens], table, [(first, len(tokens))]), cache)
        first = len(tokens)
        assert int(run_alone(variant, tokens)[-1].argmax()) == int(logits[-1].argmax())
        tokens.append(int(logits[-1].argmax()))
    assert len(set(tokens)) > 5


@pytest.mark.parametrize("kind", KINDS)
def test_side_network_reads_a_variant(native: str, kind: str) -> None:
    base, pruned = make_parts(kind)
    network = make_side(pruned[0])
    results = []
    for kernels in (native, "reference"):
        decoder = Decoder(*base, kernels=kernels, head="dense", num_threads=2)  # type: ignore[arg-type]
        variant = Decoder(*pruned, base=decoder)
        results.append(run_side_alone(variant, variant.attach(network), SEQUENCE, scale=0.7))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=2e-2)
    assert (results[1] - run_alone(variant, SEQUENCE)).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_a_variant_can_be_walked(make: Callable[..., Decoder], kind: str) -> None:
    base, pruned = make_parts(kind)
    variant = make(pruned, base=make(base))
    batch = pack_batch([SEQUENCE], [[0, 1, 2]], [(0, 40)])
    states = list(variant.hidden_states(batch))
    logits = variant.logits(variant.apply_final_norm(states[-1]))
    cache = variant.make_cache(num_blocks=3)
    torch.testing.assert_close(logits, variant.forward(batch, cache), rtol=0, atol=2e-2)


def test_variant_has_its_bases_kernels_and_head(native: str) -> None:
    base, pruned = make_parts()
    for options in ({"kernels": "reference"}, {"kernels": native, "head": "dense"}):
        decoder = Decoder(*base, **options, num_threads=1)  # type: ignore[arg-type]
        variant = Decoder(*pruned, base=decoder)
        assert variant.kernels == decoder.kernels
        head = program_of(decoder).head.pieces[0].weight
        assert program_of(variant).head.pieces[0].weight is head


def test_decoder_of_another_shape_is_no_variant() -> None:
    base, _ = make_parts("llama")
    other, _ = make_parts("opt")
    decoder = Decoder(*base, kernels="reference")
    with pytest.raises(SpecError, match=r"not a variant of the base: family, norm, .* must be"):
        Decoder(*other, base=decoder)
    fewer = make_decoder_parts("llama", num_kv_heads=4)
    with pytest.raises(SpecError, match="attention heads of the layers must be the base's"):
        Decoder(*fewer, base=decoder)


@pytest.mark.parametrize("kind", KINDS)
def test_cuda_executor_shares_embedding_and_head(kind: str) -> None:
    """Its parts that need no GPU, on the CPU."""
    (spec, weights), (pruned, sliced) = make_parts(kind)
    head = dense(weights["embed.weight" if spec.tied_head else "head.weight"])
    vectors: dict = {}
    programs = [
        build_program(s, {n: dense(w) for n, w in held.items()} | {
            n: w for n, w in held.items() if n in ("embed.weight", "positions.weight", "head.bias")
        }, head, vectors)
        for s, held in ((spec, weights), (pruned, sliced))
    ]  # fmt: skip
    base = CudaExecutor(programs[0], "cpu", torch.bfloat16)
    variant = CudaExecutor(programs[1], "cpu", torch.bfloat16, base=base)
    alone = CudaExecutor(programs[1], "cpu", torch.bfloat16)
    assert variant.program.ops[0].table is base.program.ops[0].table  # type: ignore[union-attr]
    assert variant.program.head.pieces[0].weight is base.program.head.pieces[0].weight
    assert alone.num_bytes - variant.num_bytes >= head.numel() * 2
    cache = base.make_cache(spec, 3, 16, torch.float32)
    batch = pack_batch([SEQUENCE], [[2, 0, 1]], [(0, 40)])
    assert torch.equal(variant.forward(batch, cache), alone.forward(batch, cache))
