import math

import pytest
import torch

from decoding import Sampler, SamplingParams, build_token_tables, token_logprobs
from decoding.spread import measure_spread
from decoding.strategies import Adapt

TEXTS = [b"x", b"\n", b"    ", b"\n    ", None]


def make_sampler():
    return Sampler(build_token_tables(TEXTS))


def test_token_logprobs_equal_log_softmax():
    torch.manual_seed(0)
    logits = torch.randn(4, 3000)
    ids = [0, 5, 2999, 17]
    expected = torch.log_softmax(logits.double(), -1)
    for index, (logprob, top) in enumerate(token_logprobs(logits, ids, num_top=5)):
        assert logprob == pytest.approx(expected[index, ids[index]].item(), abs=1e-5)
        values, columns = expected[index].topk(5)
        assert [token_id for token_id, _ in top] == columns.tolist()
        assert [value for _, value in top] == pytest.approx(values.tolist(), abs=1e-5)


def test_token_logprobs_of_known_log_masses_are_the_same():
    torch.manual_seed(1)
    logits = torch.randn(40, 3000) * 4.0
    ids = list(range(40))
    known = token_logprobs(logits, ids, num_top=3, log_masses=measure_spread(logits).log_masses)
    for (logprob, top), (expected, expected_top) in zip(
        known, token_logprobs(logits, ids, num_top=3), strict=True
    ):
        assert logprob == pytest.approx(expected, abs=1e-5)
        assert [token_id for token_id, _ in top] == [token_id for token_id, _ in expected_top]
        assert [v for _, v in top] == pytest.approx([v for _, v in expected_top], abs=1e-5)


def test_token_logprobs_of_many_rows_equal_those_alone():
    logits = torch.randn(70, 100)
    ids = list(range(70))
    alone = [token_logprobs(logits[i : i + 1], [i], num_top=2)[0] for i in ids]
    assert token_logprobs(logits, ids, num_top=2) == alone


def test_token_logprobs_without_alternatives():
    assert token_logprobs(torch.zeros(1, 4), [2], num_top=0) == [(pytest.approx(-math.log(4)), ())]


def test_token_logprobs_with_more_alternatives_than_tokens():
    assert len(token_logprobs(torch.zeros(1, 4), [2], num_top=20)[0][1]) == 4


def test_entropy_is_that_of_the_unscaled_distribution():
    logits = torch.tensor([[0.0] * 4, [100.0, 0.0, 0.0, 0.0], [0.0, 0.0, -math.inf, -math.inf]])
    spread = measure_spread(logits)
    expected = [math.log(4), 0.0, math.log(2)]
    assert spread.entropies.tolist() == pytest.approx(expected, abs=1e-6)
    assert spread.num_possible.tolist() == [4, 4, 2]
    assert spread.log_masses.tolist() == pytest.approx([math.log(4), 100.0, math.log(2)])


def test_trace_gives_class_temperature_and_entropy():
    logits = torch.zeros(3, 5)
    logits[0, 1] = logits[1, 3] = logits[2, 4] = 60.0
    sampler = make_sampler()
    params = [
        SamplingParams(strategy=Adapt(a=0.9, b=0.25)),
        SamplingParams(strategy=Adapt(a=0.9, b=0.25)),
        SamplingParams(temperature=0),
    ]
    prompts = [[1, 2], [0], [0]]
    rows = [
        sampler.start(p, prompt, seed=1, is_traced=True)
        for p, prompt in zip(params, prompts, strict=True)
    ]
    sampled = sampler.sample(logits, rows)
    assert sampled.classes == ["N0", "N1", "K"]
    assert sampled.temperatures == pytest.approx([0.9, 0.25, 0.0])
    assert sampled.entropies == pytest.approx([0.0] * 3, abs=1e-6)
    assert sampled.logprobs == pytest.approx([0.0] * 3, abs=1e-6)


def test_reports_are_only_for_rows_that_ask():
    sampler = make_sampler()
    rows = [
        sampler.start(SamplingParams(temperature=0), [], seed=0),
        sampler.start(SamplingParams(temperature=0, logprobs=0), [], seed=0),
        sampler.start(SamplingParams(temperature=0, logprobs=2), [], seed=0),
        sampler.start(SamplingParams(temperature=0), [], seed=0, is_traced=True),
    ]
    sampled = sampler.sample(torch.zeros(4, 5), rows)
    assert [value is None for value in sampled.logprobs] == [True, False, False, False]
    assert [len(top) for top in sampled.top] == [0, 0, 2, 0]
    assert [value is None for value in sampled.entropies] == [True, True, True, False]


def test_logprobs_ignore_temperature_bias_and_penalties():
    sampler = make_sampler()
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0]])
    params = SamplingParams(
        temperature=0.5, logit_bias={4: 100.0}, presence_penalty=2.0, logprobs=1
    )
    row = sampler.start(params, [0], seed=0)
    row.append(0)
    sampled = sampler.sample(logits, [row])
    expected = torch.log_softmax(logits, -1)[0]
    assert sampled.token_ids == [4]
    assert sampled.logprobs == pytest.approx([expected[4].item()])
    assert sampled.top[0][0] == (0, pytest.approx(expected[0].item()))
