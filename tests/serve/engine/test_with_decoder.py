"""The engine over a real decoder with random weights, the real sampler, nothing scripted."""

import random
from typing import Any

import pytest
import torch

from decoding import Sampler, SamplingParams, build_token_tables
from models.decoder import Decoder, KernelChoice
from models.kernels.native import is_native_available
from models.quantization import quantize_4bit
from models.spec import DecoderSpec, LayerSpec, RotarySpec, canonical_weights
from models.weights import Weight
from serve.engine.engine import Engine
from serve.engine.sequence import Request, SequenceOutput

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
Answer = list[list[SequenceOutput]]


@pytest.fixture(scope="module", params=KERNELS)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    """Two layers of a 4-bit Llama."""
    kernels: KernelChoice = request.param
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
    weights: dict[str, Weight] = {}
    for name, shape, is_required in canonical_weights(spec):
        if is_required:
            tensor = torch.randn(shape, generator=generator) * 0.3
            is_linear = name.startswith("layers") and len(shape) == 2
            weights[name] = quantize_4bit(tensor) if is_linear else tensor
    return Decoder(spec, weights, kernels=kernels, num_threads=1)


def make_engine(decoder: Decoder, **settings: Any) -> Engine:
    tables = build_token_tables([None, *(bytes([32 + i]) for i in range(VOCAB_SIZE - 1))])
    defaults: dict[str, Any] = {"eos_token_ids": (0,), "num_cache_blocks": 64}
    return Engine(decoder, Sampler(tables, eos_token_ids=(0,)), **(defaults | settings))


def make_requests() -> list[Request]:
    rng = random.Random(5)
    shared = [rng.randrange(1, VOCAB_SIZE) for _ in range(70)]
    requests = []
    for i in range(9):
        start = shared[: rng.choice([0, 40, 70])]
        prompt = start + [rng.randrange(1, VOCAB_SIZE) for _ in range(rng.randrange(1, 40))]
        params = SamplingParams(
            seed=i,
            temperature=(0.0, 0.8, 1.2)[i % 3],
            top_k=(0, 20)[i % 2],
            repetition_penalty=(1.0, 1.1)[i % 4 == 3],
            logprobs=2,
            max_tokens=rng.randrange(4, 30),
            ignore_eos=True,
        )
        requests.append(
            Request(
                prompt_token_ids=prompt,
                params=params,
                num_sequences=1 + 2 * (i == 4),
                prompt_logprobs=1 if i == 7 else None,
            )
        )
    return requests


def run(engine: Engine, requests: list[Request]) -> list[Answer]:
    """Run requests, two more joining at each step, and give each one's outputs by sequence."""
    answers = {request: [[] for _ in range(request.num_sequences)] for request in requests}
    waiting = list(requests)
    while waiting or engine.has_work:
        for request in waiting[:2]:
            engine.check(request)
            engine.add(request)
        del waiting[:2]
        for request, outputs in engine.step().items():
            for output in outputs:
                answers[request][output.index].append(output)
    return list(answers.values())


@pytest.fixture(scope="module")
def alone(decoder: Decoder) -> list[Answer]:
    """What each of the requests gives in an engine of its own."""
    return [
        run(make_engine(decoder, prefix_caching=False), [request])[0] for request in make_requests()
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_batch_tokens": 24, "max_running_sequences": 4},
        {"num_cache_blocks": 12},
        {"prefix_caching": False, "max_batch_tokens": 100},
    ],
    ids=["whole_prompts", "chunked", "preempted", "no_prefix_caching"],
)
def test_text_does_not_depend_on_the_batch(
    decoder: Decoder, alone: list[Answer], settings: dict[str, Any]
) -> None:
    engine = make_engine(decoder, **settings)
    answers = run(engine, make_requests())
    assert engine.error is None
    assert (engine.scheduler.num_preemptions > 0) == ("num_cache_blocks" in settings)
    for answer, expected in zip(answers, alone, strict=True):
        for outputs, expected_outputs in zip(answer, expected, strict=True):
            assert_equal(outputs, expected_outputs, is_exact=decoder.kernels != "reference")


def assert_equal(
    outputs: list[SequenceOutput], expected: list[SequenceOutput], *, is_exact: bool
) -> None:
    assert [o.token_id for o in outputs] == [o.token_id for o in expected]
    tolerance = 0.0 if is_exact else 1e-4
    scored = [(o.scored, e.scored) for o, e in zip(outputs, expected, strict=True)]
    scored += zip(outputs[0].prompt_logprobs or [], expected[0].prompt_logprobs or [], strict=True)
    for ours, theirs in scored:
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert ours[0] == pytest.approx(theirs[0], abs=tolerance, rel=0)
            assert [pair[0] for pair in ours[1]] == [pair[0] for pair in theirs[1]]


def test_greedy_text_equals_a_whole_forward_for_each_token(decoder: Decoder) -> None:
    prompt = [5, 9, 17, 33, 60, 2, 41]
    params = SamplingParams(seed=0, temperature=0.0, max_tokens=12, ignore_eos=True)
    engine = make_engine(decoder, max_batch_tokens=64)
    answers = run(engine, [Request(prompt_token_ids=prompt, params=params)])
    said = [output.token_id for output in answers[0][0]]
    for i in range(12):
        one = SamplingParams(seed=0, temperature=0.0, max_tokens=1, ignore_eos=True)
        fresh = make_engine(decoder, max_batch_tokens=64)
        (answer,) = run(fresh, [Request(prompt_token_ids=[*prompt, *said[:i]], params=one)])
        assert answer[0][0].token_id == said[i]
