"""Requests to an engine over the scripted model, and what came of them."""

from typing import Any

from decoding import SamplingParams
from serve.engine.engine import Engine
from serve.engine.sequence import Branch, ModelVariant, Request, SequenceOutput, SideAdapter


def branch(
    adapter: SideAdapter | None = None,
    scale: float = 1.0,
    *,
    variant: ModelVariant | None = None,
    num_sequences: int = 1,
    **fields: Any,
) -> Branch:
    params = SamplingParams(**({"seed": 7, "max_tokens": 6, "ignore_eos": True} | fields))
    return Branch(
        params=params, num_sequences=num_sequences, variant=variant, adapter=adapter,
        adapter_scale=scale,
    )  # fmt: skip


def submit(engine: Engine, prompt: list[int], *branches: Branch, **fields: Any) -> Request:
    request = Request(prompt_token_ids=prompt, branches=branches, **fields)
    engine.check(request)
    engine.add(request)
    return request


def run(engine: Engine) -> dict[Request, list[SequenceOutput]]:
    collected: dict[Request, list[SequenceOutput]] = {}
    for _ in range(5000):
        for request, outputs in engine.step().items():
            collected.setdefault(request, []).extend(outputs)
        if not engine.has_work:
            assert_all_blocks_are_back(engine)
            return collected
    raise AssertionError("the engine does not come to an end")


def assert_all_blocks_are_back(engine: Engine) -> None:
    assert engine.num_available_cache_blocks == engine.num_cache_blocks
    assert engine.num_available_side_cache_blocks == engine.num_side_cache_blocks


def tokens(outputs: list[SequenceOutput], index: int = 0) -> list[int]:
    return [o.token_id for o in outputs if o.index == index and o.token_id is not None]


def reasons(outputs: list[SequenceOutput]) -> dict[int, str]:
    found = [(o.index, o.finish_reason) for o in outputs if o.finish_reason]
    assert len(dict(found)) == len(found)
    return dict(found)


def assert_as_expected(outputs: list[SequenceOutput], expected: list[Any]) -> None:
    for index, one in enumerate(expected):
        assert tokens(outputs, index) == one.token_ids
    assert reasons(outputs) == {i: one.finish_reason for i, one in enumerate(expected)}
