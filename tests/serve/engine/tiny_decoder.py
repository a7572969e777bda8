"""A small decoder with random weights under an engine, and what both give."""

import random
from typing import Any

import pytest
import torch

from decoding import Sampler, build_token_tables
from models.decoder import Decoder, KernelChoice
from models.kernels.native.executor import is_native_available
from models.pruning import MODULES, LayerSelection, prune_spec, slice_weight, widths_of
from models.quantization import quantize_4bit
from models.spec import DecoderSpec, LayerSpec, RotarySpec, canonical_weights
from models.weights import Weight
from serve.engine.engine import Engine
from serve.engine.limits import EngineLimits
from serve.engine.sequence import LiveRequest
from serve.requests import TokenOutput

VOCAB_SIZE = 96
KERNELS = [
    "reference",
    pytest.param(
        "native",
        marks=pytest.mark.skipif(
            not is_native_available("auto"), reason="no native kernels for this processor"
        ),
    ),
]
Answer = list[list[TokenOutput]]


def _make_parts() -> tuple[DecoderSpec, dict[str, torch.Tensor]]:
    """Return two layers of a Llama, and its dense weights."""
    layer = LayerSpec(
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=96
    )
    spec = DecoderSpec(
        family="llama",
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        max_position_embeddings=512,
        layers=(layer, layer),
        norm="rms",
        norm_eps=1e-5,
        activation="silu",
        gated_mlp=True,
        rotary=RotarySpec(dim=16, inv_freq=tuple(10000.0 ** (-i / 8) for i in range(8))),
        tied_head=True,
    )
    generator = torch.Generator().manual_seed(0)
    return spec, {
        name: torch.randn(shape, generator=generator) * 0.3
        for name, shape, is_required in canonical_weights(spec)
        if is_required
    }


def _quantize(weights: dict[str, torch.Tensor]) -> dict[str, Weight]:
    return {
        name: quantize_4bit(tensor) if name.startswith("layers") and tensor.dim() == 2 else tensor
        for name, tensor in weights.items()
    }


def make_decoder(kernels: KernelChoice) -> Decoder:
    """Return two layers of a 4-bit Llama."""
    spec, weights = _make_parts()
    return Decoder(spec, _quantize(weights), kernels=kernels, num_threads=1)


def make_variant(decoder: Decoder, seed: int) -> Decoder:
    """Return a variant of `make_decoder`'s, which keeps two thirds of the channels at random."""
    spec, weights = _make_parts()
    rng = random.Random(seed)
    selections = tuple(
        LayerSelection(
            **{
                module: tuple(sorted(rng.sample(range(width), width * 2 // 3)))
                for module, width in zip(MODULES, widths, strict=True)
            }
        )
        for widths in widths_of(spec)
    )
    sliced = {name: slice_weight(name, w, spec, selections) for name, w in weights.items()}
    return Decoder(prune_spec(spec, selections), _quantize(sliced), base=decoder)


def make_engine(decoder: Decoder, **settings: Any) -> Engine:
    tables = build_token_tables([None, *(bytes([32 + i]) for i in range(VOCAB_SIZE - 1))])
    limits = EngineLimits(**({"num_cache_blocks": 64} | settings))
    return Engine(decoder, Sampler(tables, eos_token_ids=(0,)), limits, eos_token_ids=(0,))


def run(engine: Engine, requests: list[LiveRequest]) -> list[Answer]:
    """Run requests, two more joining at each step, and give each one's outputs by sequence."""
    answers = {request: [[] for _ in range(request.asked.num_sequences)] for request in requests}
    waiting = list(requests)
    while waiting or engine.has_work:
        for request in waiting[:2]:
            engine.check(request.asked)
            engine.add(request)
        del waiting[:2]
        for request, outputs in engine.step().items():
            for output in outputs:
                answers[request][output.sequence_index].append(output)
    return list(answers.values())


def assert_equal(
    outputs: list[TokenOutput], expected: list[TokenOutput], *, is_exact: bool
) -> None:
    assert [o.token_id for o in outputs] == [o.token_id for o in expected]
    tolerance = 0.0 if is_exact else 1e-4
    scored = [(o.logprob, e.logprob) for o, e in zip(outputs, expected, strict=True)]
    scored += zip(outputs[0].prompt_logprobs or [], expected[0].prompt_logprobs or [], strict=True)
    for ours, theirs in scored:
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert ours.logprob == pytest.approx(theirs.logprob, abs=tolerance, rel=0)
            assert [pair[0] for pair in ours.top] == [pair[0] for pair in theirs.top]
