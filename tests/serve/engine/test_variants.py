"""Sequences of several variants of the base in one engine, over scripted models."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from serve.engine.engine import MAX_FORWARD_FAILURES, Engine
from serve.engine.runner import group_by_variant
from serve.engine.sequence import LiveRequest, ModelVariant, SideAdapter
from tests.serve.engine.engine_client import (
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


def model_of(variant: ModelVariant) -> Any:
    """Give the scripted model of a variant."""
    return variant.model


def test_step_runs_only_what_it_needs(
    make_engine: MakeEngine, model: Any, variants: Variants
) -> None:
    engine = make_engine()
    submit(engine, PROMPT, branch(), branch(seed=8))
    run(engine)
    assert [model_of(variant).num_calls for variant in variants] == [0, 0]
    num_calls = model.num_calls
    submit(engine, PROMPT, branch(variant=variants[1]))
    run(engine)
    assert (model.num_calls, model_of(variants[0]).num_calls) == (num_calls, 0)
    assert engine.num_steps == num_calls + model_of(variants[1]).num_calls


def test_chunks_are_grouped_base_first_then_as_variants_appear(variants: Variants) -> None:
    kinds = [variants[1], None, variants[0], variants[1], None]
    chunks: Any = [
        SimpleNamespace(number=i, sequence=SimpleNamespace(variant=kind))
        for i, kind in enumerate(kinds)
    ]
    groups: Any = group_by_variant(chunks)
    assert [[chunk.number for chunk in group] for group in groups] == [[1, 4], [0, 3], [2]]
    for alike in (chunks[:1], [chunks[0], chunks[3]], [chunks[1], chunks[4]]):
        (group,) = group_by_variant(alike)
        assert group is alike


def test_prefix_cache_never_mixes_models(
    make_engine: MakeEngine, expect_all: ExpectAll, variants: Variants
) -> None:
    engine = make_engine(num_cache_blocks=200)
    for is_known in (False, True):
        for variant in (None, *variants):
            request = submit(engine, PROMPT, branch(variant=variant))
            outputs = run(engine)[request]
            assert outputs[0].cached_prompt_tokens == (29 if is_known else 0)
            assert_as_expected(outputs, expect_all(request))


def test_names_of_one_variant_share_a_prefix(make_engine: MakeEngine, variants: Variants) -> None:
    engine = make_engine()
    submit(engine, PROMPT, branch(variant=variants[0]))
    run(engine)
    again = submit(engine, PROMPT, branch(variant=ModelVariant(variants[0].model, "small")))
    assert run(engine)[again][0].cached_prompt_tokens == 29


def test_side_blocks_of_an_adapter_are_those_of_its_variant(
    make_engine: MakeEngine, expect_all: ExpectAll, adapters: Adapters, variants: Variants
) -> None:
    engine = make_engine(num_cache_blocks=200)
    for is_known in (False, True):
        for variant in (None, *variants):
            request = submit(engine, PROMPT, branch(adapters[0], variant=variant))
            outputs = run(engine)[request]
            assert outputs[0].cached_prompt_tokens == (28 if is_known else 0)
            assert_as_expected(outputs, expect_all(request))


def test_each_variant_computes_a_shared_prompt_once(
    make_engine: MakeEngine, model: Any, expect_all: ExpectAll, variants: Variants
) -> None:
    engine = make_engine(num_cache_blocks=200)
    request = submit(
        engine, PROMPT, branch(num_sequences=2, max_tokens=1),
        branch(variant=variants[0], num_sequences=3, max_tokens=1),
        branch(variant=variants[1], max_tokens=1), branch(max_tokens=1),
    )  # fmt: skip
    assert [s.index for s in engine.scheduler.waiting] == [0, 2, 5]
    assert [s.index for s in request.held] == [1, 3, 4, 6]
    outputs = run(engine)[request]
    assert_as_expected(outputs, expect_all(request))
    assert request.held == []
    cached = {o.sequence_index: o.cached_prompt_tokens for o in outputs}
    assert cached == {0: 0, 1: 29, 2: 0, 3: 29, 4: 29, 5: 0, 6: 29}
    assert sum(model.num_tokens) == 30 + 2
    assert [sum(model_of(v).num_tokens) for v in variants] == [30 + 2, 30]


def test_side_networks_read_along_for_siblings_of_their_variant_only(
    make_engine: MakeEngine,
    model: Any,
    expect_all: ExpectAll,
    adapters: Adapters,
    variants: Variants,
) -> None:
    engine = make_engine(num_cache_blocks=200, max_batch_tokens=64)
    request = submit(
        engine, PROMPT, branch(), branch(adapters[0]), branch(variant=variants[0]),
        branch(adapters[1], variant=variants[0]), branch(adapters[2], variant=variants[0]),
    )  # fmt: skip
    outputs = engine.step()[request]
    assert model.num_side_tokens == [30]
    assert model_of(variants[0]).num_side_tokens == [2 * 30]
    outputs += run(engine)[request]
    assert_as_expected(outputs, expect_all(request))
    cached = {o.sequence_index: o.cached_prompt_tokens for o in reversed(outputs)}
    assert cached == {0: 0, 1: 28, 2: 0, 3: 28, 4: 28}


def test_next_sibling_of_its_variant_follows_an_aborted_one(
    make_engine: MakeEngine, model: Any, expect_all: ExpectAll, variants: Variants
) -> None:
    engine = make_engine(max_batch_tokens=16)
    request = submit(
        engine, PROMPT, branch(num_sequences=2, max_tokens=1),
        branch(variant=variants[0], num_sequences=3, max_tokens=1),
    )  # fmt: skip
    engine.step()
    engine.abort_sequence(request, 2)
    assert [s.index for s in request.held] == [1, 4]
    outputs = run(engine)[request]
    assert reasons(outputs) == {0: "length", 1: "length", 2: "abort", 3: "length", 4: "length"}
    expected = expect_all(request)
    assert [tokens(outputs, i) for i in (0, 1, 3, 4)] == [
        expected[i].token_ids for i in (0, 1, 3, 4)
    ]
    assert sum(model.num_tokens) == 30 + 1


def test_aborted_request_leaves_nothing_held(make_engine: MakeEngine, variants: Variants) -> None:
    engine = make_engine(max_batch_tokens=16)
    branches = [branch(variant=kind, num_sequences=2) for kind in (None, *variants)]
    requests = [submit(engine, PROMPT, *branches) for _ in range(2)]
    engine.step()
    for request in requests:
        engine.abort(request)
        assert request.held == []
    collected = run(engine)
    for request in requests:
        assert reasons(collected[request]) == dict.fromkeys(range(6), "abort")
    assert not any(request.is_queued for request in requests)


def test_preempted_sequence_goes_on_with_its_variant(
    make_engine: MakeEngine, expect_all: ExpectAll, variants: Variants
) -> None:
    engine = make_engine(num_cache_blocks=10)
    kinds = (None, variants[0], variants[1])
    requests = [
        submit(engine, [i + 1], branch(variant=kind, max_tokens=30)) for i, kind in enumerate(kinds)
    ]
    collected = run(engine)
    assert engine.scheduler.num_preemptions > 0
    for request in requests:
        assert_as_expected(collected[request], expect_all(request))


def test_fault_of_a_variant_ends_its_requests_and_no_others(
    make_engine: MakeEngine, expect_all: ExpectAll, variants: Variants
) -> None:
    engine = make_engine()
    model_of(variants[0]).fails = lambda call: call <= MAX_FORWARD_FAILURES + 1
    spared = [submit(engine, PROMPT[:9], branch(variant=kind)) for kind in (None, variants[1])]
    mixed = submit(engine, PROMPT, branch(), branch(variant=variants[0]))
    failed = [
        submit(engine, PROMPT[:5], branch(variant=variants[0], num_sequences=2)) for _ in range(2)
    ]
    collected = engine.step()
    for _ in range(MAX_FORWARD_FAILURES):
        failed.append(submit(engine, PROMPT, branch(variant=variants[0], num_sequences=2)))
        step(engine, collected)
    run(engine, collected)
    for request in (mixed, *failed):
        assert reasons(collected[request]) == {0: "error", 1: "error"}
    for request in spared:
        assert_as_expected(collected[request], expect_all(request))
    assert engine.error is None


def test_variant_that_failed_runs_again(
    make_engine: MakeEngine, expect_all: ExpectAll, variants: Variants
) -> None:
    engine = make_engine()
    model_of(variants[0]).fails = lambda call: call == 2
    failed = submit(engine, PROMPT, branch(), branch(variant=variants[0]))
    assert reasons(run(engine)[failed]) == {0: "error", 1: "error"}
    again = submit(engine, PROMPT, branch(), branch(variant=variants[0]))
    assert_as_expected(run(engine)[again], expect_all(again))


def test_engine_gives_up_on_a_variant_that_always_fails(
    make_engine: MakeEngine, variants: Variants
) -> None:
    engine = make_engine()
    model_of(variants[0]).fails = lambda call: True
    for _ in range(MAX_FORWARD_FAILURES):
        assert engine.error is None
        request = submit(engine, PROMPT, branch(variant=variants[0]))
        assert reasons(run(engine)[request]) == {0: "error"}
    assert engine.error is not None
    assert "forward failed 3 times in a row" in engine.error
