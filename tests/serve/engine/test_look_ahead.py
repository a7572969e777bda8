"""Sequences that try tokens before they take one, over a scripted model."""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from decoding import Sampler, SamplingParams, derive_seed
from decoding.penalties import apply_edits
from decoding.spread import measure_spread
from decoding.strategies import LookAheadStrategy
from serve.engine.engine import Engine
from serve.engine.sequence import LiveRequest, SideAdapter
from serve.requests import TokenOutput
from tests.serve.engine.conftest import EOS_TOKEN_ID
from tests.serve.engine.engine_client import (
    Collected,
    assert_all_blocks_are_back,
    branch,
    reasons,
    run,
    step,
    submit,
    tokens,
)

MakeEngine = Callable[..., Engine]
AHEAD = LookAheadStrategy(threshold=1.0, candidates=3, tokens=4)
SETTINGS = {
    "roomy": {},
    "short_chunks": {"max_batch_tokens": 12},
    "few_at_once": {"max_running_sequences": 2},
    "one_probe_at_once": {"max_running_sequences": 4, "max_batch_tokens": 5},
    "preempting": {"num_cache_blocks": 20},
    "odd_blocks": {"block_size": 3, "max_batch_tokens": 17},
}


@torch.inference_mode()
def look_ahead_naively(
    model: Any,
    sampler: Sampler,
    prompt: Sequence[int],
    params: SamplingParams,
    side: SideAdapter | None = None,
) -> tuple[list[int], int]:
    """Return the tokens of one sequence by the definition, and how many of them were hard."""
    strategy, made, num_hard = params.strategy, [], 0
    assert isinstance(strategy, LookAheadStrategy)
    assert params.seed is not None
    assert params.max_tokens is not None
    plain = sampler.start(
        SamplingParams(temperature=params.temperature, frequency_penalty=params.frequency_penalty),
        prompt,
        seed=derive_seed(params.seed, 0),
    )
    while len(made) < params.max_tokens:
        logits = model.logits([*prompt, *made], side)[None]
        edited = logits.clone()
        if (edits := plain.edits(0)) is not None:
            apply_edits(edited, [edits])
        token_id = sampler.sample(logits, [plain]).token_ids[0]
        if float(measure_spread(edited).entropies) > strategy.threshold:
            num_hard += 1
            logprobs = edited[0].double().log_softmax(0)
            order = sorted(range(len(logprobs)), key=lambda i: (-float(logprobs[i]), i))
            best = -math.inf
            for candidate in order[: strategy.candidates]:
                history, found = [*prompt, *made, candidate], [float(logprobs[candidate])]
                for _ in range(min(strategy.tokens, params.max_tokens - len(made) - 1)):
                    after = model.logits(history, side).double().log_softmax(0)
                    history.append(int(after.argmax()))
                    found.append(float(after.max()))
                    if history[-1] == EOS_TOKEN_ID:
                        break
                if (score := sum(found) / len(found)) > best + 1e-9:
                    best, token_id = score, candidate
        plain.append(token_id)
        made.append(token_id)
        if token_id == EOS_TOKEN_ID and not params.ignore_eos:
            break
    return made, num_hard


def submit_some(engine: Engine, adapters: list[SideAdapter]) -> list[LiveRequest]:
    rng = random.Random(5)
    requests = []
    for i in range(10):
        prompt = [rng.randrange(1, 48) for _ in range(rng.randrange(1, 14))]
        fields: dict[str, Any] = {
            "seed": i,
            "temperature": (0.0, 1.0)[i % 2],
            "frequency_penalty": (0.0, 0.5)[i % 5 == 4],
            "max_tokens": rng.randrange(1, 16),
            "ignore_eos": i % 3 > 0,
        }
        if i % 4 < 3:
            fields["strategy"] = AHEAD
        requests.append(submit(engine, prompt, branch([None, *adapters][i % 4 % 3], **fields)))
    return requests


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_tokens_are_those_of_the_definition(
    settings: dict[str, Any],
    make_engine: MakeEngine,
    model: Any,
    sampler: Sampler,
    adapters: list[SideAdapter],
) -> None:
    engine = make_engine(**settings)
    requests = submit_some(engine, adapters)
    collected = run(engine)
    num_hard = 0
    for request in requests:
        params = request.asked.arms[0].params
        if isinstance(params.strategy, LookAheadStrategy):
            side = request.attachments[0].side
            expected, hard = look_ahead_naively(
                model, sampler, request.asked.prompt_token_ids, params, side
            )
            assert tokens(collected[request]) == expected
            num_hard += hard
    assert num_hard > 20
    assert engine.scheduler.num_probes == 0
    if "num_cache_blocks" in settings:
        assert engine.scheduler.num_preemptions


def test_trace_has_what_was_tried(make_engine: MakeEngine) -> None:
    engine = make_engine()
    request = submit(
        engine, [3, 1, 4], branch(strategy=AHEAD, temperature=0.0, max_tokens=12), is_traced=True
    )
    outputs = run(engine)[request]
    traces = [output.trace for output in outputs if output.trace is not None]
    assert len(traces) == 12
    hard = [(o, o.trace) for o in outputs if o.trace is not None and o.trace.candidates]
    assert hard
    for output, trace in hard:
        assert trace.entropy > AHEAD.threshold
        assert len(trace.candidates) == 3
        assert max(trace.candidates, key=lambda of: of[1])[0] == output.token_id
        assert output.logprob is not None
    assert all(trace.entropy <= AHEAD.threshold for trace in traces if not trace.candidates)


def start_looking(engine: Engine, **fields: Any) -> tuple[LiveRequest, Collected]:
    """Step until probes run for a request."""
    collected: Collected = {}
    request = submit(engine, [3, 1, 4], branch(**({"strategy": AHEAD, "max_tokens": 30} | fields)))
    for _ in range(100):
        step(engine, collected)
        if engine.scheduler.num_probes:
            return request, collected
    raise AssertionError("no token was hard")


def test_request_that_ends_while_it_looks_ahead_frees_its_probes(make_engine: MakeEngine) -> None:
    engine = make_engine()
    request, collected = start_looking(engine)
    engine.abort(request)
    run(engine, collected)
    assert reasons(collected[request]) == {0: "abort"}
    assert engine.scheduler.num_probes == 0
    assert not engine.scheduler.running


def test_failed_step_of_probes_ends_their_request_only(
    make_engine: MakeEngine, model: Any, sampler: Sampler
) -> None:
    engine = make_engine()
    request, collected = start_looking(engine)
    model.fails = lambda call: call == model.num_calls
    step(engine, collected)
    assert reasons(collected[request]) == {0: "error"}
    model.fails = lambda call: False
    other = submit(engine, [9, 2], branch(strategy=AHEAD, max_tokens=8))
    expected, _ = look_ahead_naively(model, sampler, [9, 2], other.asked.arms[0].params)
    assert tokens(run(engine)[other]) == expected
    assert_all_blocks_are_back(engine)


def test_fault_of_one_probe_costs_its_own_sequence_only(
    make_engine: MakeEngine, model: Any, sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    request, collected = start_looking(engine)
    other = submit(engine, [9, 2], branch(max_tokens=8))
    sample = Sampler.sample
    probe = next(each for each in engine.scheduler.running if each.parent)

    def fail(self: Sampler, logits: Any, rows: Any, states: Any = None) -> Any:
        if probe.row in rows:
            raise RuntimeError("scripted")
        return sample(self, logits, rows, states)

    monkeypatch.setattr(Sampler, "sample", fail)
    run(engine, collected)
    assert reasons(collected[request]) == {0: "error"}
    assert len(tokens(collected[other])) == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefix_caching": False}, "look_ahead needs prefix caching"),
        ({"max_batch_tokens": 8}, "max_batch_tokens above max_running_sequences"),
        ({"num_cache_blocks": 18}, r"takes 19 blocks of the cache .* it has 18"),
    ],
)
def test_look_ahead_without_room_is_refused(
    make_engine: MakeEngine, settings: dict[str, Any], message: str
) -> None:
    engine = make_engine(**settings)
    with pytest.raises(ValueError, match=message):
        submit(engine, [1] * 10, branch(strategy=AHEAD, max_tokens=26))


def test_tightest_cache_that_is_taken_suffices(
    make_engine: MakeEngine, model: Any, sampler: Sampler
) -> None:
    engine = make_engine(num_cache_blocks=19)
    prompt = [1] * 10
    requests = [
        submit(engine, prompt, branch(strategy=AHEAD, max_tokens=26, seed=i)) for i in range(3)
    ]
    collected = run(engine)
    for request in requests:
        params = request.asked.arms[0].params
        assert tokens(collected[request]) == look_ahead_naively(model, sampler, prompt, params)[0]


def test_outputs_are_of_the_request_only(make_engine: MakeEngine) -> None:
    engine = make_engine()
    request, collected = start_looking(engine, max_tokens=12)
    found: list[TokenOutput] = run(engine, collected)[request]
    assert len(found) == 12
    assert {output.sequence_index for output in found} == {0}
