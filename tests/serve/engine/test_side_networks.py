"""Sequences with side networks in the engine, over a scripted model."""

from collections.abc import Callable
from typing import Any

import pytest

from serve.engine.engine import Engine
from serve.engine.sequence import LiveRequest, SideAdapter
from tests.serve.engine.engine_client import (
    Collected,
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


def test_caches_are_made_once_for_each_shape(
    make_engine: MakeEngine, model: Any, adapters: Adapters
) -> None:
    engine = make_engine()
    for adapter in (*adapters, *adapters):
        submit(engine, PROMPT, branch(adapter))
    run(engine)
    assert model.side_shapes == [(0,), (1,)]


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
    assert sum(model.num_tokens) == 1 + 3 * 2


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
    first, num_sides = request.sequences[0], []
    while engine.has_work:
        step(engine, collected)
        if first.num_computed < len(PROMPT):
            num_sides.append(len(first.sides))
    assert num_sides[:7] == [2, 2, 2, 2, 2, 1, 1]
    assert engine.scheduler.num_preemptions == 0
    for one in (*old, request):
        assert_as_expected(collected[one], expect_all(one))


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
