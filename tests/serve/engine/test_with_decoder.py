"""The engine over a real decoder with random weights, the real sampler, nothing scripted."""

import random
from typing import Any

import pytest

from models.decoder import Decoder
from serve.engine.sequence import LiveRequest
from tests.serve.engine.engine_client import branch, make_live
from tests.serve.engine.tiny_decoder import (
    KERNELS,
    VOCAB_SIZE,
    Answer,
    assert_equal,
    make_decoder,
    make_engine,
    run,
)


@pytest.fixture(scope="module", params=KERNELS)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return make_decoder(request.param)


def make_requests() -> list[LiveRequest]:
    rng = random.Random(5)
    shared = [rng.randrange(1, VOCAB_SIZE) for _ in range(70)]
    requests = []
    for i in range(9):
        start = shared[: rng.choice([0, 40, 70])]
        prompt = start + [rng.randrange(1, VOCAB_SIZE) for _ in range(rng.randrange(1, 40))]
        alike = branch(
            seed=i,
            temperature=(0.0, 0.8, 1.2)[i % 3],
            top_k=(0, 20)[i % 2],
            repetition_penalty=(1.0, 1.1)[i % 4 == 3],
            logprobs=2,
            max_tokens=rng.randrange(4, 30),
            num_sequences=1 + 2 * (i == 4),
        )
        requests.append(make_live(prompt, alike, prompt_logprobs=1 if i == 7 else None))
    return requests


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


def test_greedy_text_equals_a_whole_forward_for_each_token(decoder: Decoder) -> None:
    prompt = [5, 9, 17, 33, 60, 2, 41]
    engine = make_engine(decoder, max_batch_tokens=64)
    answers = run(engine, [make_live(prompt, branch(temperature=0.0, max_tokens=12))])
    said = [output.token_id for output in answers[0][0]]
    one = branch(temperature=0.0, max_tokens=1)
    for i in range(12):
        fresh = make_engine(decoder, max_batch_tokens=64)
        (answer,) = run(fresh, [make_live([*prompt, *said[:i]], one)])
        assert answer[0][0].token_id == said[i]
