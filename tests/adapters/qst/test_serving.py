"""A side network on a decoder: what it changes, and what it must leave alone."""

import pytest
import torch

from models.decoder import Decoder
from models.kv_cache import cache_bytes_per_block
from models.side import AttachedSide
from tests.adapters.side_decoders import (
    DOWNSAMPLES,
    TOKENS,
    Stream,
    freeze_states,
    make_base,
    make_network,
    run_streams,
    train_logits,
)
from tests.models.kernels.random_decoders import KINDS

BASES = ("paper", *KINDS)


def make_decoder(kind: str, kernels: str, *, is_quantized: bool = False) -> Decoder:
    spec, weights = make_base(kind, is_quantized=is_quantized)
    return Decoder(spec, weights, kernels=kernels, head="dense", num_threads=2)  # type: ignore[arg-type]


def attach(decoder: Decoder, **fields: object) -> AttachedSide:
    return decoder.attach(make_network(decoder.spec, **fields).side_network())


def logits_of(decoder: Decoder, *streams: Stream, cuts: tuple[int, ...] = ()) -> list[torch.Tensor]:
    return run_streams(decoder, streams, cuts)[0]


@pytest.mark.parametrize("downsample", DOWNSAMPLES)
def test_fresh_side_network_leaves_the_base_as_it_is(kernels: str, downsample: str) -> None:
    decoder = make_decoder("paper", kernels)
    fresh = attach(decoder, downsample=downsample, is_fresh=True)
    with_side, alone = logits_of(decoder, Stream(tokens=TOKENS, side=fresh), Stream(tokens=TOKENS))
    assert (with_side - alone).abs().max() <= 1e-6


@pytest.mark.parametrize("kind", BASES)
def test_fresh_side_network_leaves_every_family_as_it_is(kernels: str, kind: str) -> None:
    decoder = make_decoder(kind, kernels)
    fresh = attach(decoder, is_fresh=True)
    with_side, alone = logits_of(decoder, Stream(tokens=TOKENS, side=fresh), Stream(tokens=TOKENS))
    assert (with_side - alone).abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("kind", "downsample"),
    [*(("paper", name) for name in DOWNSAMPLES), *((kind, "adapter") for kind in KINDS)],
)
def test_serving_computes_what_training_computes(kernels: str, kind: str, downsample: str) -> None:
    trained_on = make_decoder(kind, "reference")
    network = make_network(trained_on.spec, downsample=downsample)
    expected = train_logits(trained_on, network, freeze_states(trained_on, [TOKENS])).detach()
    decoder = make_decoder(kind, kernels)
    side = decoder.attach(network.side_network())
    (served,) = logits_of(decoder, Stream(tokens=TOKENS, side=side))
    (base,) = logits_of(decoder, Stream(tokens=TOKENS))
    torch.testing.assert_close(served, expected, rtol=0, atol=5e-5)
    assert (served - base).abs().max() > 0.1


@pytest.mark.parametrize(
    "fields",
    [
        {"tie_embedding_downsample": True},
        {"gate_shape": "vector", "final_gate": "sigmoid"},
        {"gate_shape": "vector", "final_gate": "sigmoid_swapped"},
        {"downsample_norm": False, "activation": "gelu"},
        {"side_heads": 2, "side_kv_heads": 1, "side_head_dim": 10, "side_intermediate": 24},
        {"side_head_dim": (4, 6, 8, 4), "side_intermediate": (8, 16, 24, 40)},
        {"has_linear_bias": True},
        {"rotary_inv_freq": ()},
        {"reduction": 2, "rank": 5},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_serving_computes_what_training_computes_for_any_config(
    kernels: str, fields: dict[str, object]
) -> None:
    trained_on = make_decoder("paper", "reference")
    network = make_network(trained_on.spec, **fields)
    expected = train_logits(trained_on, network, freeze_states(trained_on, [TOKENS])).detach()
    decoder = make_decoder("paper", kernels)
    side = decoder.attach(network.side_network())
    (served,) = logits_of(decoder, Stream(tokens=TOKENS, side=side))
    torch.testing.assert_close(served, expected, rtol=0, atol=5e-5)


def test_side_cache_takes_the_base_cache_over_the_reduction() -> None:
    decoder = make_decoder("paper", "reference")
    side = attach(decoder)
    base_bytes = decoder.cache_bytes_per_block(dtype=torch.float16)
    assert cache_bytes_per_block(side.spec, 16, torch.float16) * 4 == base_bytes


@pytest.mark.parametrize(
    "cuts", [tuple(range(1, 32)), (5, 16), (16,)], ids=["tokens", "chunks", "blocks"]
)
@pytest.mark.parametrize("kind", BASES)
def test_steps_of_any_length_give_what_one_step_gives(
    kernels: str, kind: str, cuts: tuple[int, ...]
) -> None:
    decoder = make_decoder(kind, kernels)
    stream = Stream(tokens=TOKENS, side=attach(decoder))
    (whole,), (cut,) = logits_of(decoder, stream), logits_of(decoder, stream, cuts=cuts)
    assert (whole - cut).abs().max() <= 1e-5


def test_shorter_sequence_beside_longer_ones_gives_what_it_gives_alone(kernels: str) -> None:
    decoder = make_decoder("paper", kernels)
    side = attach(decoder)
    streams = [Stream(tokens=TOKENS[:n], side=side) for n in (3, 32, 17)]
    together = logits_of(decoder, *streams, cuts=(5, 16))
    for stream, logits in zip(streams, together, strict=True):
        assert (logits_of(decoder, stream)[0] - logits).abs().max() <= 1e-5


@pytest.mark.parametrize("at", [0, 9, 31])
def test_token_changes_nothing_before_it(kernels: str, at: int) -> None:
    decoder = make_decoder("paper", kernels)
    side = attach(decoder)
    changed = [*TOKENS[:at], 200, *TOKENS[at + 1 :]]
    (before,) = logits_of(decoder, Stream(tokens=TOKENS, side=side))
    (after,) = logits_of(decoder, Stream(tokens=changed, side=side))
    assert torch.equal(before[:at], after[:at])
    assert not torch.equal(before[at], after[at])


@pytest.mark.parametrize("is_quantized", [False, True], ids=["dense", "nf4"])
def test_base_cache_is_the_same_whatever_reads_the_base(kernels: str, is_quantized: bool) -> None:
    decoder = make_decoder("paper", kernels, is_quantized=is_quantized)
    sides = [None, attach(decoder, seed=1), attach(decoder, seed=2, reduction=2)]
    caches = [
        run_streams(decoder, [Stream(tokens=TOKENS, side=side)], (11, 12))[1] for side in sides
    ]
    for cache in caches[1:]:
        for one, other in zip(caches[0].keys, cache.keys, strict=True):
            assert torch.equal(one, other)
        for one, other in zip(caches[0].values, cache.values, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)])
@pytest.mark.parametrize("kind", ["paper", "neox"])
def test_mixed_batch_gives_what_its_requests_give_alone(
    kernels: str, kind: str, order: tuple[int, ...]
) -> None:
    decoder = make_decoder(kind, kernels)
    streams = [
        Stream(tokens=TOKENS, side=attach(decoder, seed=1)),
        Stream(tokens=TOKENS[4:], side=attach(decoder, seed=2)),
        Stream(tokens=TOKENS[::-1]),
        Stream(tokens=TOKENS[8:], side=attach(decoder, reduction=2, downsample="lora"), scale=0.5),
    ]
    together = logits_of(decoder, *(streams[i] for i in order), cuts=(7, 8, 9))
    for i, logits in zip(order, together, strict=True):
        alone = logits_of(decoder, streams[i])[0]
        assert (alone - logits).abs().max() <= 1e-5


def test_scale_zero_is_the_base_exactly(kernels: str) -> None:
    decoder = make_decoder("paper", kernels)
    off = Stream(tokens=TOKENS, side=attach(decoder), scale=0.0)
    switched_off, base = logits_of(decoder, off, Stream(tokens=TOKENS), cuts=(9,))
    assert torch.equal(switched_off, base)


def test_scale_goes_from_the_base_to_the_side_network(kernels: str) -> None:
    decoder = make_decoder("paper", kernels)
    side = attach(decoder)
    scales = (0.0, 0.25, 0.5, 1.0)
    outputs = logits_of(decoder, *(Stream(tokens=TOKENS, side=side, scale=s) for s in scales))
    for scale, logits in zip(scales, outputs, strict=True):
        expected = outputs[0] + scale * (outputs[-1] - outputs[0])
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert (outputs[0] - outputs[-1]).abs().max() > 0.1
