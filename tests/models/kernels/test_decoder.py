"""The whole decoder: native against reference, batches against rows alone."""

import pytest
import torch

from models.decoder import Decoder, resolve_kernels
from models.spec import SpecError
from models.weights import dense
from tests.models.kernels.random_decoders import (
    HIDDEN,
    KINDS,
    make_decoder_parts,
    pack_batch,
    run_alone,
)

SEQUENCES = [[(7 * i + 3 * s) % 100 for i in range(n)] for s, n in enumerate((37, 5, 64, 1))]
TABLES = [[3, 1, 5, 7], [0, 9, 9, 9], [2, 4, 6, 8], [10, 9, 9, 9]]


@pytest.mark.parametrize("is_low_rank", [False, True], ids=["full", "low_rank"])
@pytest.mark.parametrize("is_pruned", [False, True], ids=["whole", "pruned"])
@pytest.mark.parametrize("is_quantized", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("kind", KINDS)
def test_native_decoder_equals_reference(
    native: str, kind: str, is_quantized: bool, is_pruned: bool, is_low_rank: bool
) -> None:
    spec, weights = make_decoder_parts(
        kind, is_quantized=is_quantized, is_pruned=is_pruned, is_low_rank=is_low_rank
    )
    logits, taps = [], []
    for kernels in (native, "reference"):
        decoder = Decoder(spec, weights, kernels=kernels, head="dense", num_threads=2)  # type: ignore[arg-type]
        cache = decoder.make_cache(num_blocks=12, dtype=torch.float32)
        spans = [(0, 30), (0, 3), (0, 64)]
        tapped = torch.zeros(4, 97, HIDDEN)
        first = decoder.forward(pack_batch(SEQUENCES[:3], TABLES[:3], spans), cache, taps=tapped)
        mixed = [SEQUENCES[0], SEQUENCES[1], SEQUENCES[3]], [TABLES[0], TABLES[1], TABLES[3]]
        second = decoder.forward(pack_batch(*mixed, [(30, 37), (3, 4), (0, 1)]), cache)
        logits.append(torch.cat((first, second)))
        taps.append(tapped)
    tolerance = 2e-2 if is_quantized else 2e-5
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=tolerance)
    torch.testing.assert_close(taps[0], taps[1], rtol=0, atol=tolerance)
    assert taps[0].std() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_native_batch_gives_the_bits_of_its_rows_alone(
    native: str, kind: str, dtype: torch.dtype
) -> None:
    spec, weights = make_decoder_parts(kind, is_quantized=True)
    decoder = Decoder(spec, weights, kernels=native)  # type: ignore[arg-type]
    cache = decoder.make_cache(num_blocks=12, dtype=dtype)
    steps = [[(0, 20), (0, 1), (0, 33), (0, 1)], [(20, 21), (1, 2), (33, 60)], [(21, 37), (2, 5)]]
    outputs: list[list[torch.Tensor]] = [[], [], [], []]
    for spans in steps:
        count = len(spans)
        logits = decoder.forward(pack_batch(SEQUENCES[:count], TABLES[:count], spans), cache)
        parts = logits.split([last - first for first, last in spans])
        for i, part in enumerate(parts):
            outputs[i].append(part)
    for sequence, parts in zip(SEQUENCES, outputs, strict=True):
        together = torch.cat(parts)
        alone = run_alone(decoder, sequence[: len(together)], dtype)
        assert torch.equal(together, alone)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (7, 1), (8, 1), (12, 2), (6, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_native_attention_equals_reference_for_any_grouping(
    native: str, heads: int, kv_heads: int, dtype: torch.dtype
) -> None:
    spec, weights = make_decoder_parts("llama", num_heads=heads, num_kv_heads=kv_heads)
    results = []
    for kernels in (native, "reference"):
        decoder = Decoder(spec, weights, kernels=kernels, head="dense")  # type: ignore[arg-type]
        cache = decoder.make_cache(num_blocks=8, dtype=dtype)
        parts = [
            decoder.forward(pack_batch([SEQUENCES[2]], [[7, 0, 3, 1]], [span]), cache)
            for span in ((0, 17), (17, 18), (18, 63), (63, 64))
        ]
        results.append(torch.cat(parts))
    tolerance = 2e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=tolerance)


def test_native_attention_ignores_what_another_sequence_left_in_a_block(native: str) -> None:
    spec, weights = make_decoder_parts("llama")
    decoder = Decoder(spec, weights, kernels=native)  # type: ignore[arg-type]
    cache = decoder.make_cache(num_blocks=4, dtype=torch.float32)
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(float("nan"))
    out = decoder.forward(pack_batch([SEQUENCES[0]], [[2, 0, 3, 1]], [(0, 37)]), cache)
    assert torch.equal(out, run_alone(decoder, SEQUENCES[0]))


@pytest.mark.parametrize(("head", "tolerance"), [("int8", 0.01), ("nf4", 0.2), ("dense", 1e-5)])
def test_head_precision_is_what_was_asked_for(head: str, tolerance: float) -> None:
    spec, weights = make_decoder_parts("llama")
    exact = run_alone(Decoder(spec, weights, kernels="reference", head="dense"), SEQUENCES[0])
    rounded = run_alone(
        Decoder(spec, weights, kernels="reference", head=head),  # type: ignore[arg-type]
        SEQUENCES[0],
    )
    error = (exact - rounded).std() / exact.std()
    assert error <= tolerance
    assert (error == 0) == (head == "dense")


def test_low_rank_and_full_weights_of_equal_product_agree() -> None:
    spec, weights = make_decoder_parts("llama", is_low_rank=True)
    full = {name: dense(weight) for name, weight in weights.items()}
    results = [
        run_alone(Decoder(spec, w, kernels="reference", head="dense"), SEQUENCES[0])
        for w in (weights, full)
    ]
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def test_output_rows_select_logits(native: str) -> None:
    spec, weights = make_decoder_parts("llama", is_quantized=True)
    decoder = Decoder(spec, weights, kernels=native)  # type: ignore[arg-type]
    cache = decoder.make_cache(num_blocks=12, dtype=torch.float32)
    batch = pack_batch(SEQUENCES[:2], TABLES[:2], [(0, 37), (0, 5)], all_rows=False)
    logits = decoder.forward(batch, cache)
    expected = [run_alone(decoder, sequence)[-1] for sequence in SEQUENCES[:2]]
    assert torch.equal(logits, torch.stack(expected))


def test_wrong_weights_are_all_named_in_one_message() -> None:
    spec, weights = make_decoder_parts("llama")
    del weights["final_norm.weight"]
    weights["layers.0.q.weight"] = torch.zeros(3, 3)
    weights["layers.9.q.weight"] = torch.zeros(3, 3)
    with pytest.raises(SpecError) as error:
        Decoder(spec, weights, kernels="reference")
    message = str(error.value)
    assert "final_norm.weight: missing" in message
    assert "layers.0.q.weight: shape (3, 3), expected (64, 64)" in message
    assert "layers.9.q.weight: not a weight" in message


@pytest.mark.parametrize(
    ("kernels", "device", "match"),
    [("cuda", "cpu", "'cuda' do not run on device 'cpu'"),
     ("native", "cuda", "'native' do not run on device 'cuda'")],
)  # fmt: skip
def test_kernels_that_cannot_run_are_refused(kernels: str, device: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        resolve_kernels(kernels, device)  # type: ignore[arg-type]


def test_native_cache_refuses_other_block_sizes_and_dtypes(native: str) -> None:
    spec, weights = make_decoder_parts("llama")
    decoder = Decoder(spec, weights, kernels=native)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="block_size must be 16 for native kernels, not 8"):
        decoder.make_cache(num_blocks=1, block_size=8)
    with pytest.raises(ValueError, match="cache dtype must be float16, float32 or int8 on the CPU"):
        decoder.make_cache(num_blocks=1, dtype=torch.bfloat16)


def test_cache_bytes_count_keys_and_values_of_all_layers() -> None:
    spec, weights = make_decoder_parts("llama")
    decoder = Decoder(spec, weights, kernels="reference")
    cache = decoder.make_cache(num_blocks=5, dtype=torch.float32)
    held = sum(t.nbytes for t in (*cache.keys, *cache.values))
    assert 5 * decoder.cache_bytes_per_block(dtype=torch.float32) == held
