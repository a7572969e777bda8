"""Rows of our sampler over a batch that somebody else runs."""

from typing import Any

import pytest
import torch

from decoding import Sampler, SamplingParams, build_token_tables, parse_strategy
from serve.backends.vllm.asked import Asked
from serve.backends.vllm.rows import LiveRow, Record, RowKeeper

VOCAB = 32
TABLES = build_token_tables([bytes([97 + i % 26]) for i in range(VOCAB)])
MIROSTAT = parse_strategy({"strategy": "mirostat2", "tau": 2.0})


def logits(seed: int) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def asked(key: str = "k", **fields: Any) -> Asked:
    own = {name: fields.pop(name) for name in ("is_traced",) if name in fields}
    params = SamplingParams(**({"max_tokens": 20, "temperature": 1.0} | fields))
    return Asked(params=params, seed=5, key=key, **own)


class Bench:
    """A keeper, and what it has sent."""

    def __init__(self) -> None:
        self.sampler = Sampler(TABLES, eos_token_ids=(0,))
        self.sent: list[Record] = []
        self.keeper = RowKeeper(self.sampler, send=self.sent.extend)

    def draw(self, live: LiveRow, seed: int) -> int:
        """Draw once; check that one token is left; return it."""
        batch = torch.stack([logits(99), logits(seed)])
        before = batch[0].clone()
        self.keeper.draw(batch, {1: live})
        assert torch.equal(batch[0], before)
        assert batch[1].isfinite().sum() == 1
        return int(batch[1].argmax())

    def expected(self, request: Asked, seeds: list[int]) -> list[int]:
        """Return the tokens that the sampler draws by itself."""
        row = self.sampler.start(request.params, [1, 2], seed=request.seed)
        for seed in seeds:
            row.append(self.sampler.sample(logits(seed)[None], [row]).token_ids[0])
        return list(row.token_ids)


@pytest.mark.parametrize("fields", [{}, {"strategy": MIROSTAT}, {"repetition_penalty": 1.3}])
def test_tokens_are_the_samplers_whatever_is_thrown_away(fields: dict[str, Any]) -> None:
    bench, request = Bench(), asked(**fields)
    output_ids: list[int] = []
    live = bench.keeper.start(request, [1, 2], output_ids)
    for seed in range(8):
        if seed % 3 == 0:
            bench.draw(live, 50 + seed)  # of a part of a prompt: nobody appends it
        output_ids.append(bench.draw(live, seed))
    assert output_ids == bench.expected(request, list(range(8)))


def test_token_whose_value_is_not_there_yet_is_the_one_that_was_drawn() -> None:
    bench, request = Bench(), asked(strategy=MIROSTAT)
    output_ids: list[int] = []
    live = bench.keeper.start(request, [1, 2], output_ids)
    for seed in range(6):
        drawn = bench.draw(live, seed)
        if output_ids:
            output_ids[-1] = live.row.token_ids[-1]
        output_ids.append(-1)
    assert [*output_ids[:-1], drawn] == bench.expected(request, list(range(6)))


def test_row_that_comes_back_goes_on() -> None:
    bench, request = Bench(), asked(strategy=MIROSTAT)
    output_ids: list[int] = []
    live = bench.keeper.start(request, [1, 2], output_ids)
    for seed in range(3):
        output_ids.append(bench.draw(live, seed))
    bench.keeper.park(live)
    again = bench.keeper.start(request, [1, 2], list(output_ids))
    assert again is live
    tokens = [*output_ids, bench.draw(again, 3)]
    assert tokens == bench.expected(request, list(range(4)))


def test_row_that_is_new_with_tokens_already_has_them() -> None:
    bench, request = Bench(), asked(repetition_penalty=1.3)
    expected = bench.expected(request, list(range(5)))
    live = bench.keeper.start(request, [1, 2], expected[:4])
    assert bench.draw(live, 4) == expected[4]


def test_trace_is_sent_with_key_and_position() -> None:
    bench, request = Bench(), asked(is_traced=True, temperature=0.5)
    output_ids: list[int] = []
    live = bench.keeper.start(request, [1, 2], output_ids)
    for seed in range(2):
        output_ids.append(bench.draw(live, seed))
    assert [(r["key"], r["position"], r["temperature"]) for r in bench.sent] == [
        ("k", 0, 0.5), ("k", 1, 0.5),
    ]  # fmt: skip
    assert all(record["entropy"] > 0 and record["token_class"] for record in bench.sent)


def test_numbers_that_are_none_end_their_own_sequence() -> None:
    bench = Bench()
    live = [bench.keeper.start(asked(key), [1, 2], []) for key in ("good", "bad")]
    batch = torch.stack([logits(0), torch.full((VOCAB,), float("nan"))])
    bench.keeper.draw(batch, dict(enumerate(live)))
    assert int(batch[0].argmax()) == bench.expected(asked(), [0])[0]
    assert bench.sent == [{"key": "bad", "position": 0, "error": True}]
