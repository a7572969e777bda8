import random
from collections.abc import Callable
from typing import Any

import pytest

from decoding import SamplingParams
from decoding.logprobs import token_logprobs
from serve.engine.engine import Engine
from serve.engine.sequence import LiveRequest
from tests.serve.engine import engine_client
from tests.serve.engine.engine_client import (
    Collected,
    assert_as_expected,
    branch,
    reasons,
    run,
    step,
    tokens,
)

MakeEngine = Callable[..., Engine]
Expect = Callable[..., Any]
ExpectAll = Callable[[LiveRequest], list[Any]]
SETTINGS = {
    "roomy": {},
    "short_chunks": {"max_batch_tokens": 8},
    "few_at_once": {"max_running_sequences": 2},
    "preempting": {"num_cache_blocks": 14},
    "no_prefix_caching": {"num_cache_blocks": 20, "prefix_caching": False},
    "odd_blocks": {"block_size": 3, "max_batch_tokens": 11},
}


def make_params(**fields: Any) -> SamplingParams:
    return SamplingParams(**({"seed": 7, "max_tokens": 12} | fields))


def submit(engine: Engine, prompt: list[int], **fields: Any) -> LiveRequest:
    own = {name: fields.pop(name) for name in ("prompt_logprobs", "is_traced") if name in fields}
    alike = branch(**({"max_tokens": 12, "ignore_eos": False} | fields))
    return engine_client.submit(engine, prompt, alike, **own)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_batched_sequences_equal_the_same_sequences_alone(
    settings: dict[str, Any], make_engine: MakeEngine, expect_all: ExpectAll
) -> None:
    engine = make_engine(**settings)
    rng = random.Random(3)
    shared = [rng.randrange(1, 48) for _ in range(17)]
    requests = []
    for i in range(12):
        start = shared[: rng.randrange(18)] if i % 3 else []
        prompt = start + [rng.randrange(1, 48) for _ in range(rng.randrange(1, 14))]
        requests.append(
            submit(
                engine,
                prompt,
                seed=i,
                temperature=(0.0, 1.0)[i % 2],
                top_p=(1.0, 0.8)[i % 4 == 3],
                frequency_penalty=(0.0, 0.5)[i % 5 == 4],
                num_sequences=1 + 2 * (i % 4 == 1),
                ignore_eos=i % 2 == 0,
                max_tokens=rng.randrange(1, 16),
            )
        )
    collected = run(engine)
    for request in requests:
        assert_as_expected(collected[request], expect_all(request))
    assert engine.num_available_cache_blocks == engine.num_cache_blocks


def test_preempted_sequences_keep_their_text(
    make_engine: MakeEngine, expect_all: ExpectAll
) -> None:
    engine = make_engine(num_cache_blocks=9)
    requests = [
        submit(engine, [i + 1, i + 2], seed=i, max_tokens=30, ignore_eos=True) for i in range(4)
    ]
    collected = run(engine)
    assert engine.scheduler.num_preemptions > 0
    for request in requests:
        assert_as_expected(collected[request], expect_all(request))


def test_sequence_that_fills_the_whole_cache_ends(
    make_engine: MakeEngine, expect_all: ExpectAll
) -> None:
    engine = make_engine(num_cache_blocks=5)
    assert engine.limits.max_context_tokens == 20
    request = submit(engine, [1, 2, 3], max_tokens=17, ignore_eos=True)
    other = submit(engine, [1, 2, 4], max_tokens=17, ignore_eos=True)
    collected = run(engine)
    assert_as_expected(collected[request], expect_all(request))
    assert_as_expected(collected[other], expect_all(other))


@pytest.mark.parametrize(
    ("prompt", "fields", "message"),
    [
        ([], {}, "at least one token"),
        ([1, 48], {}, "token ids must be 0 to 47"),
        ([-1], {}, "token ids must be 0 to 47"),
        ([1], {"num_sequences": 0}, "num_sequences must be at least 1, got 0"),
        ([1], {"seed": None}, "max_tokens and seed must be set"),
        ([1] * 30, {"max_tokens": 11}, r"at most 40 tokens together, got 30 \+ 11"),
    ],
    ids=["empty", "id_too_big", "id_negative", "no_sequences", "no_seed", "too_long"],
)
def test_request_that_could_never_run_is_refused(
    prompt: list[int], fields: dict[str, Any], message: str, make_engine: MakeEngine
) -> None:
    engine = make_engine(num_cache_blocks=10)
    with pytest.raises(ValueError, match=message):
        submit(engine, prompt, **fields)


def test_context_is_limited_by_the_positions_of_the_model(make_engine: MakeEngine) -> None:
    assert make_engine(num_cache_blocks=1000).limits.max_context_tokens == 256


def test_steps_stay_within_the_token_budget(make_engine: MakeEngine, model: Any) -> None:
    engine = make_engine(max_batch_tokens=16)
    for i in range(6):
        submit(engine, [i + 1] * (10 + i))
    run(engine)
    assert max(model.num_tokens) == 16


@pytest.mark.parametrize("max_tokens", [1, 5])
def test_sequence_ends_at_max_tokens(max_tokens: int, make_engine: MakeEngine) -> None:
    engine = make_engine()
    request = submit(engine, [1, 2], max_tokens=max_tokens, ignore_eos=True)
    outputs = run(engine)[request]
    assert len(tokens(outputs)) == max_tokens
    assert reasons(outputs) == {0: "length"}


def test_max_tokens_of_zero_generates_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine()
    request = submit(engine, [1, 2], max_tokens=0)
    (output,) = run(engine)[request]
    assert (output.token_id, output.finish_reason) == (None, "length")


def test_stop_token_ends_the_sequence_and_is_reported(
    make_engine: MakeEngine, expect: Expect
) -> None:
    engine = make_engine()
    stop = expect([5, 6], make_params(ignore_eos=True)).token_ids[3]
    request = submit(engine, [5, 6], stop_token_ids=(stop,), ignore_eos=True)
    outputs = run(engine)[request]
    assert tokens(outputs)[-1] == stop
    assert tokens(outputs).count(stop) == 1
    assert reasons(outputs) == {0: "stop"}


def test_end_of_sequence_token_is_held_back_until_min_tokens(make_engine: MakeEngine) -> None:
    engine = make_engine()
    bias = {0: 100.0}
    eager = submit(engine, [1], logit_bias=bias)
    patient = submit(engine, [1], logit_bias=bias, min_tokens=4)
    collected = run(engine)
    assert tokens(collected[eager]) == [0]
    assert len(tokens(collected[patient])) == 5
    assert tokens(collected[patient])[-1] == 0


def test_first_output_tells_the_cached_prompt_tokens(make_engine: MakeEngine) -> None:
    engine = make_engine()
    submit(engine, list(range(1, 13)))
    run(engine)
    request = submit(engine, list(range(1, 15)), ignore_eos=True)
    outputs = run(engine)[request]
    assert [output.cached_prompt_tokens for output in outputs] == [12] + [0] * 11


def test_generated_tokens_are_reused_as_a_prefix(make_engine: MakeEngine) -> None:
    engine = make_engine()
    first = submit(engine, [1, 2, 3], ignore_eos=True)
    said = tokens(run(engine)[first])
    again = submit(engine, [1, 2, 3, *said, 9])
    assert run(engine)[again][0].cached_prompt_tokens == 12


def test_logprobs_and_traces_come_with_the_tokens(make_engine: MakeEngine, expect: Expect) -> None:
    engine = make_engine()
    plain = submit(engine, [3, 4])
    scored = submit(engine, [3, 4], logprobs=2)
    traced = submit(engine, [3, 4], is_traced=True)
    collected = run(engine)
    expected = expect([3, 4], make_params()).logprobs
    assert all(o.logprob is None and o.trace is None for o in collected[plain])
    assert [o.logprob.logprob for o in collected[scored] if o.logprob] == pytest.approx(expected)
    assert all(o.logprob and len(o.logprob.top) == 2 for o in collected[scored])
    assert {o.trace.temperature for o in collected[traced] if o.trace} == {1.0}
    assert all(o.trace and o.trace.entropy > 0 and o.trace.token_class for o in collected[traced])


@pytest.mark.parametrize("max_tokens", [0, 1, 4])
def test_prompt_logprobs_cover_the_prompt_in_bounded_steps(
    max_tokens: int, make_engine: MakeEngine, model: Any, expect_all: ExpectAll
) -> None:
    engine = make_engine(num_cache_blocks=80, max_batch_tokens=256)
    prompt = [1 + i * i % 47 for i in range(200)]
    submit(engine, prompt)
    run(engine)
    model.num_outputs.clear()
    request = submit(engine, prompt, prompt_logprobs=1, max_tokens=max_tokens, num_sequences=2)
    outputs = run(engine)[request]
    scored = next(o.prompt_logprobs for o in outputs if o.sequence_index == 0)
    assert scored is not None
    assert scored[0] is None
    expected = [
        token_logprobs(model.logits(prompt[:i])[None], prompt[i : i + 1], num_top=1)[0]
        for i in range(1, 200)
    ]
    assert [entry[0] for entry in scored[1:] if entry] == pytest.approx([e[0] for e in expected])
    assert [entry[1][0][0] for entry in scored[1:] if entry] == [e[1][0][0] for e in expected]
    assert all(o.prompt_logprobs is None for o in outputs if o is not outputs[0])
    assert max(model.num_outputs) <= 128 + 2
    if max_tokens:
        assert_as_expected(outputs, expect_all(request))


def test_prompt_logprobs_survive_preemption(make_engine: MakeEngine, model: Any) -> None:
    engine = make_engine(num_cache_blocks=21, max_batch_tokens=8, prefix_caching=False)
    old = submit(engine, [1, 2, 3], max_tokens=70, ignore_eos=True)
    for _ in range(3):
        engine.step()
    prompt = [1 + i * i % 47 for i in range(70)]
    echo = submit(engine, prompt, prompt_logprobs=0, max_tokens=2)
    collected: Collected = {}
    while not engine.scheduler.num_preemptions:
        step(engine, collected)
    assert 0 < echo.sequences[0].num_prompt_logprobs < 69
    run(engine, collected)
    scored = collected[echo][0].prompt_logprobs
    assert scored is not None
    expected = [
        token_logprobs(model.logits(prompt[:i])[None], prompt[i : i + 1])[0][0]
        for i in range(1, 70)
    ]
    assert [entry[0] for entry in scored[1:] if entry] == pytest.approx(expected)
    assert reasons(collected[old]) == {0: "length"}


def test_abort_frees_blocks_before_the_next_step(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batch_tokens=8)
    prefilling = submit(engine, [1] * 30)
    engine.step()
    queued = submit(engine, [2] * 30, num_sequences=2)
    assert engine.num_available_cache_blocks < engine.num_cache_blocks
    engine.abort(prefilling)
    engine.abort(queued)
    engine.abort(queued)
    assert engine.num_available_cache_blocks == engine.num_cache_blocks
    collected = run(engine)
    assert reasons(collected[prefilling]) == {0: "abort"}
    assert reasons(collected[queued]) == {0: "abort", 1: "abort"}


def test_abort_of_one_sequence_leaves_its_siblings(
    make_engine: MakeEngine, expect_all: ExpectAll
) -> None:
    engine = make_engine()
    request = submit(engine, [1] * 9, num_sequences=3, ignore_eos=True)
    collected = [output for _ in range(4) for output in engine.step().get(request, [])]
    engine.abort_sequence(request, 1)
    engine.abort_sequence(request, 1)
    engine.abort_sequence(request, 99)
    collected += run(engine)[request]
    assert reasons(collected)[1] == "abort"
    expected = expect_all(request)
    for index in (0, 2):
        assert tokens(collected, index) == expected[index].token_ids


@pytest.mark.parametrize("seed", range(15))
def test_every_request_ends_once_after_a_random_schedule(
    seed: int, make_engine: MakeEngine, model: Any, expect_all: ExpectAll
) -> None:
    rng = random.Random(seed)
    engine = make_engine(
        num_cache_blocks=rng.choice([8, 12, 30]),
        block_size=rng.choice([2, 4]),
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
            most = engine.limits.max_context_tokens - length
            requests.append(
                submit(
                    engine,
                    [1 + i % 3 for i in range(length - 1)] + [rng.randrange(1, 48)],
                    seed=rng.randrange(1000),
                    max_tokens=rng.randrange(0, min(most, 20)),
                    num_sequences=rng.choice([1, 1, 2, 4]),
                    prompt_logprobs=rng.choice([None, None, 0]),
                )
            )
        elif choice < 0.42 and requests:
            engine.abort(rng.choice(requests))
        elif choice < 0.5 and requests:
            request = rng.choice(requests)
            engine.abort_sequence(request, rng.randrange(request.asked.num_sequences))
        else:
            step(engine, collected)
    run(engine, collected)

    assert engine.num_available_cache_blocks == engine.num_cache_blocks
    assert not any(request.is_queued for request in requests)
    for request in requests:
        for index, expected in enumerate(expect_all(request)):
            reason = reasons(collected[request])[index]
            said = tokens(collected[request], index)
            assert said == expected.token_ids[: len(said)]
            if reason in ("stop", "length"):
                assert (reason, len(said)) == (expected.finish_reason, len(expected.token_ids))
