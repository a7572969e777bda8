import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from torch import Tensor

from decoding import Sampler, SamplingParams, TokenTables
from serve.engine.engine import Engine
from serve.engine.limits import EngineLimits
from serve.engine.sequence import LiveRequest
from serve.requests import TokenOutput
from tests.serve.engine import engine_client
from tests.serve.engine.engine_client import branch, run

MakeEngine = Callable[..., Engine]


class FaultySampler(Sampler):
    """Raises for rows with the bad seed, at the chosen place once they have that many tokens."""

    BAD_SEED = 666

    def __init__(self, tables: TokenTables, place: str, num_tokens: int) -> None:
        super().__init__(tables)
        self.place = place
        self.num_tokens = num_tokens

    def start(self, params: SamplingParams, *args: Any, **kwargs: Any) -> Any:
        if self.place == "start" and kwargs["seed"] == self.BAD_SEED:
            raise RuntimeError("secret prompt in start")
        row = super().start(params, *args, **kwargs)
        if self.place == "append" and kwargs["seed"] == self.BAD_SEED:
            append = row.append

            def fail(token_id: int) -> None:
                if row.num_generated == self.num_tokens:
                    raise RuntimeError("secret prompt in append")
                append(token_id)

            row.append = fail
        return row

    def sample(self, logits: Tensor, rows: Sequence[Any], states: Tensor | None = None) -> Any:
        for row in rows:
            if (
                self.place == "sample"
                and row.params.seed == self.BAD_SEED
                and row.num_generated == self.num_tokens
            ):
                raise RuntimeError("secret prompt in sample")
        return super().sample(logits, rows, states)


def submit(engine: Engine, prompt: list[int], seed: int = 1, num_sequences: int = 1) -> LiveRequest:
    alike = branch(seed=seed, max_tokens=8, num_sequences=num_sequences)
    return engine_client.submit(engine, prompt, alike)


def ends(outputs: list[TokenOutput]) -> list[str]:
    return [output.finish_reason for output in outputs if output.finish_reason]


@pytest.mark.parametrize(
    ("place", "num_tokens"),
    [("start", 0), ("sample", 0), ("sample", 3), ("append", 3)],
    ids=["start", "first_token", "later_token", "append"],
)
def test_sampling_fault_ends_only_its_own_request(
    place: str,
    num_tokens: int,
    model: Any,
    tables: TokenTables,
    expect_all: Callable[[LiveRequest], list[Any]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = Engine(
        model,
        FaultySampler(tables, place, num_tokens),
        EngineLimits(num_cache_blocks=32, block_size=4),
        eos_token_ids=(),
    )
    good = [submit(engine, [i + 1]) for i in range(3)]
    bad = submit(engine, [9], seed=FaultySampler.BAD_SEED)
    good.append(submit(engine, [7]))
    collected = run(engine)
    assert ends(collected[bad]) == ["error"]
    assert len(collected[bad]) == num_tokens + 1
    for request in good:
        (expected,) = expect_all(request)
        assert [output.token_id for output in collected[request]] == expected.token_ids
    assert engine.num_available_cache_blocks == 32
    assert "RuntimeError" in caplog.text
    assert "secret" not in caplog.text


def test_forward_fault_ends_what_runs_and_spares_what_waits(
    make_engine: MakeEngine, model: Any
) -> None:
    engine = make_engine(max_running_sequences=2)
    running = [submit(engine, [1]), submit(engine, [2] * 9, num_sequences=3)]
    waiting = submit(engine, [3])
    model.fails = lambda call: call == 2
    collected = run(engine)
    assert ends(collected[running[0]]) == ["error"]
    assert ends(collected[running[1]]) == ["error"] * 3
    assert ends(collected[waiting]) == ["length"]
    assert engine.error is None
    assert engine.num_available_cache_blocks == engine.num_cache_blocks


def test_blocks_of_a_failed_step_are_not_reused(make_engine: MakeEngine, model: Any) -> None:
    engine = make_engine()
    model.fails = lambda call: call == 1
    submit(engine, list(range(1, 20)))
    run(engine)
    again = submit(engine, list(range(1, 20)))
    assert run(engine)[again][0].cached_prompt_tokens == 0


def test_engine_gives_up_after_three_forward_faults_in_a_row(
    make_engine: MakeEngine, model: Any
) -> None:
    engine = make_engine(max_running_sequences=1)
    requests = [submit(engine, [i + 1]) for i in range(5)]
    model.fails = lambda call: True
    collected = run(engine)
    assert engine.error == "forward failed 3 times in a row: RuntimeError"
    assert [ends(collected[request]) for request in requests] == [["error"]] * 5
    assert model.num_calls == 3
    assert engine.num_available_cache_blocks == engine.num_cache_blocks
    late = submit(engine, [1])
    assert not engine.has_work
    assert ends(engine.step()[late]) == ["error"]


def test_forward_faults_with_a_success_between_are_forgiven(
    make_engine: MakeEngine, model: Any
) -> None:
    engine = make_engine(max_running_sequences=1)
    for i in range(6):
        submit(engine, [i + 1])
    model.fails = lambda call: call % 3 != 0
    run(engine)
    assert engine.error is None


def test_forward_fault_is_logged_without_its_message(
    make_engine: MakeEngine, model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine()
    submit(engine, [1])
    model.fails = lambda call: True
    with caplog.at_level(logging.DEBUG):
        run(engine)
    assert "forward failed: RuntimeError in forward" in caplog.text
    assert "scripted" not in caplog.text


def test_abandoned_engine_ends_every_request(make_engine: MakeEngine) -> None:
    engine = make_engine(max_running_sequences=2)
    requests = [submit(engine, [i + 1] * 9, num_sequences=2) for i in range(3)]
    engine.step()
    engine.abandon(AssertionError("secret"))
    outputs = engine.take_outputs()
    assert [ends(outputs[request]) for request in requests] == [["error"] * 2] * 3
    assert not engine.has_work
    assert engine.error == "the engine failed: AssertionError"


def test_logits_that_are_not_numbers_end_their_sequence_alone(
    make_engine: MakeEngine, model: Any
) -> None:
    logits = model.logits
    model.logits = lambda seen, *rest: logits(seen, *rest) * (float("nan") if seen[0] == 13 else 1)
    engine = make_engine()
    bad, good = submit(engine, [13, 2]), submit(engine, [1, 2])
    outputs = run(engine)
    assert ends(outputs[bad]) == ["error"]
    assert ends(outputs[good]) == ["length"]
    assert [output.token_id for output in outputs[bad]] == [None]
