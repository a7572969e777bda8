"""Sequences with side networks in the engine, over a scripted model."""

import gc
import random
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from serve.engine.engine import Engine
from serve.engine.sequence import LiveRequest, SideAdapter
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


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_mixed_batch_equals_the_same_sequences_alone(
    settings: dict[str, Any], make_engine: MakeEngine, expect_all: ExpectAll, adapters: Adapters
) -> None:
    engine = make_engine(**settings)
    rng = random.Random(3)
    requests = []
    for i in range(14):
        start = PROMPT[: rng.randrange(18)] if i % 3 else []
        prompt = start + [rng.randrange(1, 48) for _ in range(rng.randrange(1, 14))]
        branches = [
            branch(
                rng.choice([None, *adapters]), rng.choice([0.0, 0.5, 1.0, 1.0]), seed=i,
                max_tokens=rng.randrange(1, 9), num_sequences=rng.choice([1, 1, 2]),
            )
            for _ in range(rng.choice([1, 1, 3]))
        ]  # fmt: skip
        requests.append(submit(engine, prompt, *branches))
    collected = run(engine)
    for request in requests:
        assert_as_expected(collected[request], expect_all(request))


def test_order_of_a_mixed_batch_does_not_matter(
    make_engine: MakeEngine, expect_all: ExpectAll, adapters: Adapters
) -> None:
    kinds = [None, *adapters]
    for shift in range(4):
        engine = make_engine()
        requests = [submit(engine, PROMPT, branch(kinds[(i + shift) % 4])) for i in range(4)]
        collected = run(engine)
        for request in requests:
            assert_as_expected(collected[request], expect_all(request))


def test_scale_of_zero_runs_no_side_network(
    make_engine: MakeEngine, model: Any, expect: Callable[..., Any], adapters: Adapters
) -> None:
    engine = make_engine()
    request = submit(engine, PROMPT, branch(adapters[0], 0.0))
    outputs = run(engine)[request]
    assert tokens(outputs) == expect(PROMPT, request.asked.arms[0].params).token_ids
    assert set(model.num_side_tokens) == {0}
    assert model.side_shapes == []


def test_caches_are_made_once_for_each_shape(
    make_engine: MakeEngine, model: Any, adapters: Adapters
) -> None:
    engine = make_engine()
    for adapter in (*adapters, *adapters):
        submit(engine, PROMPT, branch(adapter))
    run(engine)
    assert model.side_shapes == [(0,), (1,)]


def test_each_branch_draws_with_its_own_seeds(
    make_engine: MakeEngine, expect: Callable[..., Any], adapters: Adapters
) -> None:
    engine = make_engine()
    request = submit(engine, PROMPT, branch(seed=1, num_sequences=2), branch(adapters[0], seed=1))
    outputs = run(engine)[request]
    params = request.asked.arms[0].params
    assert tokens(outputs, 1) == expect(PROMPT, params, 1).token_ids
    assert tokens(outputs, 2) == expect(PROMPT, params, 0, adapters[0]).token_ids


def test_new_adapter_on_a_cached_conversation_uses_every_base_block(
    make_engine: MakeEngine, expect_all: ExpectAll, adapters: Adapters
) -> None:
    engine = make_engine()
    submit(engine, PROMPT, branch(adapters[0]))
    run(engine)
    counted = engine.scheduler.num_base_cached_prompt_tokens
    switched = submit(engine, PROMPT, branch(adapters[1]))
    engine.step()
    assert engine.scheduler.num_base_cached_prompt_tokens - counted == 28
    assert engine.num_cache_blocks - engine.num_available_cache_blocks == 8
    (sequence,) = switched.sequences
    assert (sequence.num_cached_prompt_tokens, sequence.write_start) == (0, 28)
    again = submit(engine, PROMPT, branch(adapters[0]))
    collected = run(engine)
    assert collected[again][0].cached_prompt_tokens == 28
    assert_as_expected(collected[again], expect_all(again))


def test_conversation_goes_back_and_forth_between_adapters(
    make_engine: MakeEngine, expect_all: ExpectAll, adapters: Adapters
) -> None:
    engine = make_engine()
    said = list(PROMPT)
    kinds = [None, adapters[0], adapters[1], adapters[0], adapters[2], None, adapters[1]]
    for kind in kinds:
        request = submit(engine, said, branch(kind))
        outputs = run(engine)[request]
        assert_as_expected(outputs, expect_all(request))
        said += tokens(outputs)


def test_prompt_asked_of_many_adapters_is_computed_once(
    make_engine: MakeEngine, model: Any, expect_all: ExpectAll, adapters: Adapters
) -> None:
    engine = make_engine(num_cache_blocks=200)
    request = submit(engine, PROMPT, *(branch(kind, max_tokens=1) for kind in (None, *adapters)))
    outputs = run(engine)[request]
    assert_as_expected(outputs, expect_all(request))
    assert sum(model.num_tokens) == 30 + 3 * 2
    assert sum(model.num_side_tokens) == 3 * 30 + 3 * 2
    assert [o.cached_prompt_tokens for o in outputs] == [0, 28, 28, 28]
    model.num_tokens.clear()
    again = submit(engine, PROMPT, *(branch(kind, max_tokens=1) for kind in (None, *adapters)))
    assert_as_expected(run(engine)[again], expect_all(again))
    assert sum(model.num_tokens) == 4 * 2


def test_first_sequence_starts_where_a_sibling_must(
    make_engine: MakeEngine, model: Any, expect_all: ExpectAll, adapters: Adapters
) -> None:
    engine = make_engine()
    for prompt, adapter in ((PROMPT, adapters[0]), (PROMPT[:15], adapters[1])):
        submit(engine, prompt, branch(adapter))
        run(engine)
    model.num_tokens.clear()
    request = submit(engine, PROMPT, *(branch(adapter, max_tokens=1) for adapter in adapters))
    outputs = run(engine)[request]
    assert_as_expected(outputs, expect_all(request))
    assert sum(model.num_tokens) == 30 + 2 * 2
    assert engine.scheduler.num_base_cached_prompt_tokens == 12 + 3 * 28


def test_siblings_compute_the_prompt_themselves_without_room_for_their_side_networks(
    make_engine: MakeEngine, expect_all: ExpectAll, adapters: Adapters
) -> None:
    engine = make_engine(num_side_cache_blocks=20, max_context_tokens=40, max_batch_tokens=8)
    request = submit(engine, PROMPT, *(branch(adapter) for adapter in adapters))
    engine.step()
    assert [side.scale for side in request.sequences[0].sides] == [1.0, 0.0]
    outputs = run(engine)[request]
    assert_as_expected(outputs, expect_all(request))


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_first_sequence_that_ends_with_the_prompt_leaves_it_to_its_siblings(
    max_tokens: int, make_engine: MakeEngine, model: Any, expect_all: ExpectAll, adapters: Adapters
) -> None:
    engine = make_engine()
    first = branch(adapters[0], max_tokens=max_tokens)
    request = submit(engine, PROMPT, first, branch(adapters[1]), branch())
    outputs = run(engine)[request]
    assert_as_expected(outputs, expect_all(request))
    assert sum(model.num_tokens) == 30 + 2 * 2 + 2 * 5


def test_sibling_goes_on_when_the_first_sequence_is_aborted(
    make_engine: MakeEngine, model: Any, expect_all: ExpectAll, adapters: Adapters
) -> None:
    engine = make_engine(max_batch_tokens=16)
    request = submit(engine, PROMPT, *(branch(adapter, max_tokens=1) for adapter in adapters))
    engine.step()
    engine.abort_sequence(request, 0)
    outputs = run(engine)[request]
    assert reasons(outputs) == {0: "abort", 1: "length", 2: "length"}
    expected = expect_all(request)
    assert [tokens(outputs, i) for i in (1, 2)] == [expected[i].token_ids for i in (1, 2)]
    assert sum(model.num_tokens) == 30 + 2
    assert_all_blocks_are_back(engine)


def test_side_networks_of_aborted_siblings_stop_with_the_prompt(
    make_engine: MakeEngine, model: Any, adapters: Adapters
) -> None:
    engine = make_engine(max_batch_tokens=16)
    request = submit(engine, PROMPT, branch(), branch(adapters[0]), branch(adapters[1]))
    engine.step()
    for index in (1, 2):
        engine.abort_sequence(request, index)
    run(engine)
    assert model.num_side_tokens == [32, 28, 0, 0, 0, 0, 0]


def test_preempted_first_sequence_takes_the_side_networks_along_again(
    make_engine: MakeEngine, expect_all: ExpectAll, adapters: Adapters
) -> None:
    engine = make_engine(num_cache_blocks=11, max_batch_tokens=8)
    old = submit(engine, [1, 2], branch(max_tokens=30))
    request = submit(engine, PROMPT, *(branch(adapter) for adapter in adapters))
    for _ in range(4):
        engine.step()
    assert [side.scale for side in request.sequences[0].sides] == [1.0, 0.0, 0.0]
    collected = run(engine)
    assert engine.scheduler.num_preemptions > 0
    assert tokens(collected[request], 2) == expect_all(request)[2].token_ids
    assert reasons(collected[old]) == {0: "length"}


def test_lack_of_side_blocks_preempts_the_youngest_that_has_some(
    make_engine: MakeEngine, expect_all: ExpectAll, adapters: Adapters
) -> None:
    engine = make_engine(num_side_cache_blocks=10, max_context_tokens=40)
    requests = [submit(engine, [i + 1], branch(adapters[i], max_tokens=30)) for i in range(3)]
    plain = submit(engine, [9], branch(max_tokens=30))
    collected: Collected = {}
    while not engine.scheduler.num_preemptions:
        step(engine, collected)
    assert engine.scheduler.waiting == requests[2].sequences
    assert plain.sequences[0] in engine.scheduler.running
    run(engine, collected)
    for request in (*requests, plain):
        assert_as_expected(collected[request], expect_all(request))


def test_side_network_that_reads_along_gives_way_to_one_in_use(
    make_engine: MakeEngine, expect_all: ExpectAll, adapters: Adapters
) -> None:
    engine = make_engine(num_side_cache_blocks=20, max_context_tokens=40, max_batch_tokens=8)
    kinds = (adapters[0], adapters[0], None, None)
    old = [submit(engine, [1, 2, 3], branch(kind, seed=1, max_tokens=10)) for kind in kinds]
    collected = engine.step()
    request = submit(engine, PROMPT, branch(adapters[1]), branch(adapters[2]))
    num_sides = []
    while engine.has_work:
        step(engine, collected)
        if request.sequences[0].num_computed < len(PROMPT):
            num_sides.append(len(request.sequences[0].sides))
    assert num_sides[:7] == [2, 2, 2, 2, 2, 1, 1]
    assert engine.scheduler.num_preemptions == 0
    for one in (*old, request):
        assert_as_expected(collected[one], expect_all(one))


def test_prompt_logprobs_are_those_of_the_first_sequence(
    make_engine: MakeEngine, expect_all: ExpectAll, adapters: Adapters
) -> None:
    engine = make_engine()
    both = (branch(adapters[0]), branch(adapters[1]))

    def score(*branches: Branch) -> Any:
        request = submit(engine, PROMPT, *branches, prompt_logprobs=1)
        return run(engine)[request][0].prompt_logprobs

    cold = score(*both)
    assert cold == score(*both) != score(both[1])


def test_forward_fault_frees_side_blocks(
    make_engine: MakeEngine, model: Any, adapters: Adapters
) -> None:
    engine = make_engine(max_batch_tokens=16)
    model.fails = lambda call: call == 2
    request = submit(engine, PROMPT, *(branch(adapter) for adapter in adapters))
    assert reasons(run(engine)[request]) == dict.fromkeys(range(3), "error")


def test_side_cache_that_cannot_be_made_costs_only_its_requests(
    make_engine: MakeEngine, model: Any, monkeypatch: pytest.MonkeyPatch, adapters: Adapters
) -> None:
    def fail(side: Any, **sizes: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(model, "make_side_cache", fail)
    engine = make_engine()
    for _ in range(4):
        request = submit(engine, PROMPT, branch(), branch(adapters[0]))
        assert reasons(run(engine)[request]) == {0: "error", 1: "error"}
    plain = submit(engine, PROMPT, branch())
    assert reasons(run(engine)[plain]) == {0: "length"}


@pytest.mark.parametrize("is_idle", [False, True])
def test_side_network_that_nobody_uses_any_more_is_freed(
    is_idle: bool, make_engine: MakeEngine
) -> None:
    class Side(SimpleNamespace):
        """Can be referenced weakly."""

    engine = make_engine()
    side: Any = Side(name="a", cache_shape=(0,))
    reference = weakref.ref(side)
    request = submit(engine, PROMPT, branch(SideAdapter(side, "a")))
    if not is_idle:
        submit(engine, [1], branch(max_tokens=30))
    engine.step()
    engine.abort(request)
    engine.step()
    assert engine.has_work != is_idle
    del side, request
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale": 1.5}, "adapter_scale must be 0 to 1, got 1.5"),
        ({"scale": float("nan")}, "adapter_scale must be 0 to 1, got nan"),
    ],
    ids=["above_one", "nan"],
)
def test_scale_out_of_range_is_refused(
    fields: dict[str, Any], message: str, make_engine: MakeEngine, adapters: Adapters
) -> None:
    with pytest.raises(ValueError, match=message):
        submit(make_engine(), [1], branch(adapters[0], **fields))


def test_request_without_arms_is_refused(make_engine: MakeEngine) -> None:
    with pytest.raises(ValueError, match="at least one arm"):
        submit(make_engine(), [1])


@pytest.mark.parametrize("num_blocks", [0, 63])
def test_side_cache_too_small_for_a_sequence_is_refused(
    num_blocks: int, make_engine: MakeEngine
) -> None:
    with pytest.raises(ValueError, match="num_side_cache_blocks must be at least 64, for a"):
        make_engine(num_side_cache_blocks=num_blocks)


@pytest.mark.parametrize("seed", range(12))
def test_blocks_balance_after_a_random_schedule(
    seed: int, make_engine: MakeEngine, model: Any, expect_all: ExpectAll, adapters: Adapters
) -> None:
    rng = random.Random(seed)
    num_blocks, block_size = rng.choice([8, 12, 30]), rng.choice([2, 4])
    engine = make_engine(
        num_cache_blocks=num_blocks,
        num_side_cache_blocks=rng.choice([num_blocks, num_blocks + 5, 3 * num_blocks]),
        block_size=block_size,
        max_batch_tokens=rng.choice([4, 9, 40]),
        max_running_sequences=rng.choice([1, 4]),
        prefix_caching=seed % 5 != 0,
    )
    failing = set(rng.sample(range(2, 200), 2)) if seed % 2 else set()
    model.fails = failing.__contains__
    requests: list[LiveRequest] = []
    collected: Collected = {}
    for _ in range(150):
        choice = rng.random()
        if choice < 0.35 and len(requests) < 40:
            length = rng.randrange(1, engine.limits.max_context_tokens - 2)
            most = min(engine.limits.max_context_tokens - length, 20)
            branches = [
                branch(
                    rng.choice([None, *adapters]), rng.choice([0.0, 0.7, 1.0]),
                    seed=rng.randrange(1000), max_tokens=rng.randrange(0, most),
                    num_sequences=rng.choice([1, 1, 2]), ignore_eos=False,
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
