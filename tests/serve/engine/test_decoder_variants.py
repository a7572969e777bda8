"""The engine over a real decoder and its variants: what is shared changes no bit."""

import random
from typing import Any

import pytest
import torch

from models.decoder import Decoder
from serve.engine.sequence import LiveRequest, ModelVariant, SideAdapter
from tests.adapters.side_decoders import make_network
from tests.serve.engine.engine_client import Branch, branch, branches_of, make_live
from tests.serve.engine.tiny_decoder import (
    KERNELS,
    VOCAB_SIZE,
    Answer,
    assert_equal,
    make_decoder,
    make_engine,
    make_variant,
    run,
)

PROMPT = [random.Random(2).randrange(1, VOCAB_SIZE) for _ in range(90)]
Kind = tuple[ModelVariant | None, SideAdapter | None]


@pytest.fixture(scope="module", params=KERNELS)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return make_decoder(request.param)


@pytest.fixture(scope="module")
def kinds(decoder: Decoder) -> list[Kind]:
    """The base and two variants, each alone and with a side network of its own."""
    found: list[Kind] = []
    for i in range(3):
        on = decoder if i == 0 else make_variant(decoder, seed=i)
        network = make_network(on.spec, seed=i, reduction=4)
        side = SideAdapter(on.attach(network.side_network()), str(i))
        variant = None if i == 0 else ModelVariant(on, str(i))
        found += [(variant, None), (variant, side)]
    return found


def ask_of(kind: Kind, scale: float = 1.0, **fields: Any) -> Branch:
    settings = {"seed": 1, "temperature": 0.9, "logprobs": 1, "max_tokens": 8} | fields
    return branch(kind[1], scale, variant=kind[0], **settings)


def alone(decoder: Decoder, request: LiveRequest, **settings: Any) -> Answer:
    """Give what each branch says in an engine of its own, which reuses nothing."""
    prompt = list(request.asked.prompt_token_ids)
    return [
        run(make_engine(decoder, prefix_caching=False, **settings), [make_live(prompt, one)])[0][0]
        for one in branches_of(request)
    ]


def assert_same(decoder: Decoder, answer: Answer, expected: Answer) -> None:
    for outputs, expected_outputs in zip(answer, expected, strict=True):
        assert_equal(outputs, expected_outputs, is_exact=decoder.kernels != "reference")


def make_requests(kinds: list[Kind]) -> list[LiveRequest]:
    rng = random.Random(4)
    requests = []
    for i in range(6):
        prompt = PROMPT[: rng.choice([0, 40, 70])]
        prompt += [rng.randrange(1, VOCAB_SIZE) for _ in range(rng.randrange(1, 30))]
        branches = [
            ask_of(rng.choice(kinds), rng.choice([0.0, 1.0]), seed=i,
                   max_tokens=rng.randrange(20, 50))
            for _ in range(1 + 2 * (i % 3 == 0))
        ]  # fmt: skip
        requests.append(make_live(prompt, *branches))
    return requests


@pytest.fixture(scope="module")
def mixed_alone(decoder: Decoder, kinds: list[Kind]) -> Answer:
    """What each branch of `make_requests` gives in an engine of its own."""
    return [outputs for request in make_requests(kinds) for outputs in alone(decoder, request)]


@pytest.mark.parametrize(
    "settings",
    [
        {"max_batch_tokens": 24, "max_running_sequences": 4},
        {"num_cache_blocks": 18},
        {"prefix_caching": False, "max_batch_tokens": 100},
    ],
    ids=["chunked", "preempted", "no_prefix_caching"],
)
def test_mixed_steps_equal_separate_runs(
    decoder: Decoder, kinds: list[Kind], mixed_alone: Answer, settings: dict[str, Any]
) -> None:
    engine = make_engine(decoder, **settings)
    answers = run(engine, make_requests(kinds))
    assert engine.error is None
    assert (engine.scheduler.num_preemptions > 0) == ("num_cache_blocks" in settings)
    assert_same(decoder, [outputs for answer in answers for outputs in answer], mixed_alone)


@pytest.mark.parametrize(
    "settings",
    [{"max_batch_tokens": 24, "max_running_sequences": 4}, {"num_cache_blocks": 18}],
    ids=["chunked", "preempted"],
)
def test_mixed_steps_over_an_int8_cache_equal_separate_runs(
    decoder: Decoder, kinds: list[Kind], mixed_alone: Answer, settings: dict[str, Any]
) -> None:
    expected = [
        outputs
        for request in make_requests(kinds)
        for outputs in alone(decoder, request, cache_dtype=torch.int8)
    ]
    engine = make_engine(decoder, cache_dtype=torch.int8, **settings)
    answers = run(engine, make_requests(kinds))
    assert (engine.scheduler.num_preemptions > 0) == ("num_cache_blocks" in settings)
    together = [outputs for answer in answers for outputs in answer]
    assert_same(decoder, together, expected)
    assert together != mixed_alone


def test_arms_of_several_models_equal_separate_requests(
    decoder: Decoder, kinds: list[Kind]
) -> None:
    request = make_live(PROMPT, *(ask_of(kind) for kind in kinds))
    engine = make_engine(decoder, num_cache_blocks=100, max_batch_tokens=64)
    (answer,) = run(engine, [request])
    assert engine.scheduler.num_cached_prompt_tokens == 3 * 80
    assert_same(decoder, answer, alone(decoder, request))
    assert len({tuple(output.token_id for output in outputs) for outputs in answer}) == 6


def test_scale_of_zero_is_the_variant_exactly(decoder: Decoder, kinds: list[Kind]) -> None:
    request = make_live(PROMPT, ask_of(kinds[3], 0.0), ask_of(kinds[2]))
    off, plain = run(make_engine(decoder), [request])[0]
    assert_same(decoder, [off], [plain])


def test_switching_models_in_a_conversation_equals_a_cold_run(
    decoder: Decoder, kinds: list[Kind]
) -> None:
    engine = make_engine(decoder, num_cache_blocks=100)
    prompt = list(PROMPT)
    for kind in (kinds[0], kinds[2], kinds[3], kinds[0]):
        request = make_live(prompt, ask_of(kind))
        (answer,) = run(engine, [request])
        assert_same(decoder, answer, alone(decoder, request))
        prompt += [output.token_id for output in answer[0] if output.token_id is not None]
