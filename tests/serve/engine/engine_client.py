"""Requests to an engine over the scripted model, and what came of them."""

from typing import Any, NamedTuple

from decoding import SamplingParams
from serve.engine.engine import Engine
from serve.engine.sequence import Attachment, LiveRequest, ModelVariant, SideAdapter
from serve.requests import Arm, GenerationRequest, TokenOutput


class Branch(NamedTuple):
    """An arm, and what is attached to it."""

    arm: Arm
    attachment: Attachment


def branch(
    adapter: SideAdapter | None = None,
    scale: float = 1.0,
    *,
    variant: ModelVariant | None = None,
    num_sequences: int = 1,
    **fields: Any,
) -> Branch:
    params = SamplingParams(**({"seed": 7, "max_tokens": 6, "ignore_eos": True} | fields))
    arm = Arm(params=params, num_sequences=num_sequences, adapter_scale=scale)
    return Branch(arm, Attachment(variant, adapter))


def make_live(prompt: list[int], *branches: Branch, **fields: Any) -> LiveRequest:
    arms = tuple(one.arm for one in branches)
    asked = GenerationRequest(request_id="a", prompt_token_ids=prompt, arms=arms, **fields)
    return LiveRequest(asked, [one.attachment for one in branches])


def branches_of(request: LiveRequest) -> list[Branch]:
    pairs = zip(request.asked.arms, request.attachments, strict=True)
    return [Branch(arm, attachment) for arm, attachment in pairs]


def submit(engine: Engine, prompt: list[int], *branches: Branch, **fields: Any) -> LiveRequest:
    request = make_live(prompt, *branches, **fields)
    engine.check(request.asked)
    engine.add(request)
    return request


Collected = dict[LiveRequest, list[TokenOutput]]


def run(engine: Engine, collected: Collected | None = None) -> Collected:
    """Step until nothing is left; give all outputs, those collected before first."""
    found = {} if collected is None else collected
    for _ in range(5000):
        step(engine, found)
        if not engine.has_work:
            assert_all_blocks_are_back(engine)
            return found
    raise AssertionError("the engine does not come to an end")


def step(engine: Engine, collected: Collected) -> None:
    for request, outputs in engine.step().items():
        collected.setdefault(request, []).extend(outputs)


def assert_all_blocks_are_back(engine: Engine) -> None:
    assert engine.num_available_cache_blocks == engine.num_cache_blocks
    assert engine.num_available_side_cache_blocks == engine.num_side_cache_blocks


def tokens(outputs: list[TokenOutput], index: int = 0) -> list[int]:
    return [o.token_id for o in outputs if o.sequence_index == index and o.token_id is not None]


def reasons(outputs: list[TokenOutput]) -> dict[int, str]:
    found = [(o.sequence_index, o.finish_reason) for o in outputs if o.finish_reason]
    assert len(dict(found)) == len(found)
    return dict(found)


def assert_as_expected(outputs: list[TokenOutput], expected: list[Any]) -> None:
    for index, one in enumerate(expected):
        assert tokens(outputs, index) == one.token_ids
    assert reasons(outputs) == {i: one.finish_reason for i, one in enumerate(expected)}
