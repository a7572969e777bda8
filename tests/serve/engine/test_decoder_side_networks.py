"""The engine over a real decoder with side networks: what is shared changes no bit."""

import random
from typing import Any

import pytest

from models.decoder import Decoder
from serve.engine.engine import Engine
from serve.engine.sequence import LiveRequest, SideAdapter
from tests.adapters.side_decoders import make_network
from tests.serve.engine.engine_client import Branch, branch, branches_of, make_live
from tests.serve.engine.tiny_decoder import (
    KERNELS,
    VOCAB_SIZE,
    Answer,
    assert_equal,
    make_decoder,
    make_engine,
    run,
)

PROMPT = [random.Random(2).randrange(1, VOCAB_SIZE) for _ in range(90)]
SHAPES = (
    {"reduction": 4}, {"reduction": 4}, {"reduction": 2, "downsample": "lora"},
    {"side_attention": "base", "side_layers": 1, "rank": 4}, {"side_attention": "base"},
)  # fmt: skip
NUM_FORKS = 2


@pytest.fixture(scope="module", params=KERNELS)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return make_decoder(request.param)


@pytest.fixture(scope="module")
def adapters(decoder: Decoder) -> list[SideAdapter]:
    """Five side networks: two of one shape, and two forks at the end."""
    networks = [make_network(decoder.spec, seed=i, **shape) for i, shape in enumerate(SHAPES)]  # type: ignore[arg-type]
    return [
        SideAdapter(decoder.attach(network.side_network()), str(i))
        for i, network in enumerate(networks)
    ]


def ask_of(adapter: SideAdapter | None = None, scale: float = 1.0, **fields: Any) -> Branch:
    settings = {"seed": 1, "temperature": 0.9, "logprobs": 1, "max_tokens": 8} | fields
    return branch(adapter, scale, **settings)


def alone(decoder: Decoder, prompt: list[int], one: Branch) -> Answer:
    """Give what a branch says in an engine of its own, which reuses nothing."""
    return run(make_engine(decoder, prefix_caching=False), [make_live(prompt, one)])[0]


def assert_same(decoder: Decoder, answer: Answer, expected: Answer) -> None:
    for outputs, expected_outputs in zip(answer, expected, strict=True):
        assert_equal(outputs, expected_outputs, is_exact=decoder.kernels != "reference")


def said(answer: Answer) -> list[int]:
    return [output.token_id for output in answer[0] if output.token_id is not None]


def make_requests(adapters: list[SideAdapter]) -> list[LiveRequest]:
    rng = random.Random(4)
    requests = []
    for i in range(6):
        prompt = PROMPT[: rng.choice([0, 40, 70])]
        prompt += [rng.randrange(1, VOCAB_SIZE) for _ in range(rng.randrange(1, 30))]
        branches = [
            ask_of(
                rng.choice([None, *adapters]), rng.choice([0.5, 1.0]), seed=i,
                max_tokens=rng.randrange(20, 50),
            )
            for _ in range(1 + 2 * (i % 3 == 0))
        ]  # fmt: skip
        requests.append(make_live(prompt, *branches))
    return requests


@pytest.fixture(scope="module")
def mixed_alone(decoder: Decoder, adapters: list[SideAdapter]) -> Answer:
    """What each branch of `make_requests` gives in an engine of its own."""
    return [
        alone(decoder, list(request.asked.prompt_token_ids), one)[0]
        for request in make_requests(adapters)
        for one in branches_of(request)
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"max_batch_tokens": 24, "max_running_sequences": 4},
        {"num_cache_blocks": 18},
        {"num_side_cache_blocks": 14, "max_context_tokens": 160},
        {"prefix_caching": False, "max_batch_tokens": 100},
    ],
    ids=["chunked", "preempted", "few_side_blocks", "no_prefix_caching"],
)
def test_mixed_batch_equals_separate_runs(
    decoder: Decoder,
    adapters: list[SideAdapter],
    mixed_alone: Answer,
    settings: dict[str, Any],
) -> None:
    requests = make_requests(adapters)
    engine = make_engine(decoder, **settings)
    answers = run(engine, requests)
    assert engine.error is None
    is_short = any(name.endswith("cache_blocks") for name in settings)
    assert (engine.scheduler.num_preemptions > 0) == is_short
    assert_same(decoder, [outputs for answer in answers for outputs in answer], mixed_alone)


def test_order_of_a_mixed_batch_changes_nothing(
    decoder: Decoder, adapters: list[SideAdapter]
) -> None:
    kinds = [None, *adapters]
    expected = [alone(decoder, PROMPT, ask_of(kind)) for kind in kinds]
    count = len(kinds)
    for shift in range(count):
        order = [(i + shift) % count for i in range(count)]
        answers = run(make_engine(decoder), [make_live(PROMPT, ask_of(kinds[i])) for i in order])
        for i, answer in zip(order, answers, strict=True):
            assert_same(decoder, answer, expected[i])


def test_switching_the_adapter_of_a_conversation_equals_a_cold_run(
    decoder: Decoder, adapters: list[SideAdapter]
) -> None:
    engine = make_engine(decoder)
    first, second = ask_of(adapters[0]), ask_of(adapters[2])
    prompt = PROMPT + said(run(engine, [make_live(PROMPT, first)])[0]) + PROMPT[:5]
    counted = engine.scheduler.num_base_cached_prompt_tokens
    (answer,) = run(engine, [make_live(prompt, second)])
    assert engine.scheduler.num_base_cached_prompt_tokens - counted == 96
    assert answer[0][0].cached_prompt_tokens == 0
    assert_same(decoder, answer, alone(decoder, prompt, second))
    (again,) = run(engine, [make_live(prompt, first)])
    assert again[0][0].cached_prompt_tokens == 96
    assert_same(decoder, again, alone(decoder, prompt, first))


def test_request_to_several_adapters_equals_separate_requests(
    decoder: Decoder, adapters: list[SideAdapter]
) -> None:
    branches = [ask_of(kind) for kind in (adapters[1], None, *adapters)]
    engine = make_engine(decoder, max_batch_tokens=64)
    (answer,) = run(engine, [make_live(PROMPT, *branches)])
    # The block that a prompt ends in is copied for those without a cache of their own.
    assert engine.scheduler.num_cached_prompt_tokens == 3 * 80 + 3 * 89
    for one, outputs in zip(branches, answer, strict=True):
        assert_same(decoder, [outputs], alone(decoder, PROMPT, one))
    assert len({tuple(said([outputs])) for outputs in answer}) == 6


def test_fork_starts_at_once_on_whatever_the_base_has_cached(
    decoder: Decoder, adapters: list[SideAdapter]
) -> None:
    engine = make_engine(decoder)
    run(engine, [make_live(PROMPT, ask_of())])
    for adapter in adapters[-NUM_FORKS:]:
        one = ask_of(adapter)
        (answer,) = run(engine, [make_live(PROMPT, one)])
        assert answer[0][0].cached_prompt_tokens == 89
        assert_same(decoder, answer, alone(decoder, PROMPT, one))
    assert engine.num_available_side_cache_blocks == engine.num_side_cache_blocks


def test_fork_scores_every_token_of_a_prompt(decoder: Decoder, adapters: list[SideAdapter]) -> None:
    def score(engine: Engine, adapter: SideAdapter | None) -> Answer:
        return run(engine, [make_live(PROMPT, ask_of(adapter), prompt_logprobs=2)])[0]

    answer = score(make_engine(decoder, max_batch_tokens=64), adapters[-1])
    scores = answer[0][0].prompt_logprobs
    assert scores is not None
    assert len(scores) == len(PROMPT)
    assert_same(decoder, answer, score(make_engine(decoder), adapters[-1]))
    assert scores != score(make_engine(decoder), None)[0][0].prompt_logprobs
