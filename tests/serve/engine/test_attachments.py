"""Sequences with side networks, on the base and on its variants, in one engine."""

import gc
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from serve.engine.engine import Engine
from serve.engine.sequence import LiveRequest, ModelVariant, SideAdapter
from tests.serve.engine.engine_client import (
    Branch,
    Collected,
    assert_all_blocks_are_back,
    assert_as_expected,
    branch,
    reasons,
    run,
    step,
    submit,
    tokens,
)

MakeEngine = Callable[..., Engine]
ExpectAll = Callable[[LiveRequest], list[Any]]
Adapters = list[SideAdapter]
Variants = list[ModelVariant]
PROMPT = [1 + i * i % 47 for i in range(30)]
SETTINGS = {
    "roomy": {},
    "short_chunks": {"max_batch_tokens": 8},
    "few_at_once": {"max_running_sequences": 2},
    "few_blocks": {"num_cache_blocks": 14},
    "few_side_blocks": {"num_side_cache_blocks": 16, "max_context_tokens": 40},
    "no_prefix_caching": {"num_cache_blocks": 20, "prefix_caching": False},
    "odd_blocks": {"block_size": 3, "max_batch_tokens": 11},
}


@pytest.fixture(params=["base", "variant"])
def on(request: pytest.FixtureRequest, variants: Variants) -> ModelVariant | None:
    """Give what side networks sit on."""
    return variants[0] if request.param == "variant" else None


def model_of(on: ModelVariant | None, model: Any) -> Any:
    return model if on is None else on.model


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_mixed_step_equals_the_same_sequences_alone(
    settings: dict[str, Any],
    make_engine: MakeEngine,
    expect_all: ExpectAll,
    adapters: Adapters,
    variants: Variants,
) -> None:
    engine = make_engine(**settings)
    rng = random.Random(5)
    requests = []
    for i in range(14):
        start = PROMPT[: rng.randrange(18)] if i % 3 else []
        prompt = start + [rng.randrange(1, 48) for _ in range(rng.randrange(1, 14))]
        branches = [
            branch(
                rng.choice([None, *adapters]), rng.choice([0.0, 0.5, 1.0, 1.0]), seed=i,
                variant=rng.choice([None, None, *variants]), max_tokens=rng.randrange(1, 9),
                num_sequences=rng.choice([1, 1, 2]),
            )
            for _ in range(rng.choice([1, 1, 4]))
        ]  # fmt: skip
        requests.append(submit(engine, prompt, *branches))
    collected = run(engine)
    for request in requests:
        assert_as_expected(collected[request], expect_all(request))
    assert min(model_of(variant, None).num_calls for variant in variants) > 0
    if settings == SETTINGS["few_blocks"]:
        assert engine.scheduler.num_preemptions > 0


def test_scale_of_zero_runs_no_side_network(
    on: ModelVariant | None, make_engine: MakeEngine, model: Any, adapters: Adapters
) -> None:
    engine = make_engine()
    off = submit(engine, PROMPT, branch(adapters[0], 0.0, variant=on))
    outputs = run(engine)[off]
    plain = submit(engine, PROMPT, branch(variant=on))
    assert tokens(outputs) == tokens(run(engine)[plain])
    assert set(model_of(on, model).num_side_tokens) == {0}
    assert model.side_shapes == []


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_first_sequence_that_ends_with_the_prompt_leaves_it_to_its_siblings(
    max_tokens: int,
    on: ModelVariant | None,
    make_engine: MakeEngine,
    model: Any,
    expect_all: ExpectAll,
    adapters: Adapters,
) -> None:
    engine = make_engine()
    first = branch(adapters[0], variant=on, max_tokens=max_tokens)
    request = submit(engine, PROMPT, first, branch(adapters[1], variant=on), branch(variant=on))
    outputs = run(engine)[request]
    assert_as_expected(outputs, expect_all(request))
    assert sum(model_of(on, model).num_tokens) == 30 + (2 + 1) + 2 * 5


def test_sibling_goes_on_when_the_first_sequence_is_aborted(
    on: ModelVariant | None,
    make_engine: MakeEngine,
    model: Any,
    expect_all: ExpectAll,
    adapters: Adapters,
) -> None:
    engine = make_engine(max_batch_tokens=16)
    kinds = (branch(adapter, variant=on, max_tokens=1) for adapter in adapters)
    request = submit(engine, PROMPT, *kinds)
    engine.step()
    engine.abort_sequence(request, 0)
    outputs = run(engine)[request]
    assert reasons(outputs) == {0: "abort", 1: "length", 2: "length"}
    expected = expect_all(request)
    assert [tokens(outputs, i) for i in (1, 2)] == [expected[i].token_ids for i in (1, 2)]
    assert sum(model_of(on, model).num_tokens) == 30 + 2


def test_prompt_logprobs_are_those_of_the_first_sequence(
    on: ModelVariant | None, make_engine: MakeEngine, adapters: Adapters, variants: Variants
) -> None:
    def score(engine: Engine, *branches: Branch) -> Any:
        request = submit(engine, PROMPT, *branches, prompt_logprobs=1)
        return run(engine)[request][0].prompt_logprobs

    engine = make_engine()
    first, other = branch(adapters[0], variant=on), branch(adapters[1], variant=on)
    elsewhere = branch(adapters[0], variant=variants[1])
    cold = score(make_engine(prefix_caching=False), first)
    for branches in ((first, other), (first, elsewhere), (first,)):
        assert score(engine, *branches) == cold
    assert score(engine, other, first) != cold
    assert score(engine, elsewhere, first) != cold


def test_forward_fault_frees_all_blocks(
    on: ModelVariant | None, make_engine: MakeEngine, model: Any, adapters: Adapters
) -> None:
    engine = make_engine(max_batch_tokens=16)
    model_of(on, model).fails = lambda call: call == 2
    request = submit(engine, PROMPT, *(branch(adapter, variant=on) for adapter in adapters))
    assert reasons(run(engine)[request]) == dict.fromkeys(range(3), "error")


@pytest.mark.parametrize("is_idle", [False, True])
@pytest.mark.parametrize("kind", ["side", "variant"])
def test_what_nobody_uses_any_more_is_freed_at_once(
    kind: str, is_idle: bool, make_engine: MakeEngine, model: Any
) -> None:
    class Side:
        """A side network that can be referenced weakly."""

        name = "a"
        cache_shape = (0,)

    engine = make_engine()
    used: Any = Side() if kind == "side" else type(model)(name="small")
    reference = weakref.ref(used)
    own = {"adapter": SideAdapter(used, "a")} if kind == "side" else {}
    if kind == "variant":
        own["variant"] = ModelVariant(used, "small")
    request = submit(engine, PROMPT, branch(**own))
    if not is_idle:
        submit(engine, [1], branch(max_tokens=30))
    engine.step()
    engine.abort(request)
    engine.step()
    assert engine.has_work != is_idle
    gc.disable()
    try:
        del used, own, request
        assert reference() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("seed", range(16))
def test_blocks_balance_after_a_random_schedule(
    seed: int,
    make_engine: MakeEngine,
    model: Any,
    expect_all: ExpectAll,
    adapters: Adapters,
    variants: Variants,
) -> None:
    rng = random.Random(seed)
    num_blocks = rng.choice([8, 12, 30])
    engine = make_engine(
        num_cache_blocks=num_blocks,
        num_side_cache_blocks=rng.choice([num_blocks, num_blocks + 5, 3 * num_blocks]),
        block_size=rng.choice([2, 4]),
        max_batch_tokens=rng.choice([4, 9, 40]),
        max_running_sequences=rng.choice([1, 4]),
        prefix_caching=seed % 5 != 0,
    )
    if seed % 2:
        model.fails = set(rng.sample(range(2, 200), 2)).__contains__
        model_of(variants[0], None).fails = {rng.randrange(2, 60)}.__contains__
    requests: list[LiveRequest] = []
    collected: Collected = {}
    for _ in range(150):
        choice = rng.random()
        if choice < 0.35 and len(requests) < 40:
            length = rng.randrange(1, engine.limits.max_context_tokens - 2)
            most = min(engine.limits.max_context_tokens - length, 20)
            branches = [
                branch(
                    rng.choice([None, None, *adapters]), rng.choice([0.0, 0.7, 1.0]),
                    variant=rng.choice([None, None, *variants]), seed=rng.randrange(1000),
                    max_tokens=rng.randrange(0, most), num_sequences=rng.choice([1, 1, 2]),
                    ignore_eos=False,
                )
                for _ in range(rng.choice([1, 1, 3, 5]))
            ]  # fmt: skip
            prompt = [1 + i % 3 for i in range(length - 1)] + [rng.randrange(1, 48)]
            logprobs = rng.choice([None, None, 0])
            requests.append(submit(engine, prompt, *branches, prompt_logprobs=logprobs))
        elif choice < 0.42 and requests:
            engine.abort(rng.choice(requests))
        elif choice < 0.5 and requests:
            request = rng.choice(requests)
            engine.abort_sequence(request, rng.randrange(request.asked.num_sequences))
        else:
            step(engine, collected)
    run(engine, collected)

    assert_all_blocks_are_back(engine)
    for request in requests:
        ends = reasons(collected[request])
        for index, expected in enumerate(expect_all(request)):
            said = tokens(collected[request], index)
            assert said == expected.token_ids[: len(said)]
            if ends[index] in ("stop", "length"):
                assert (ends[index], len(said)) == (expected.finish_reason, len(expected.token_ids))
