"""Logits that are not numbers, and values at the ends of what is allowed."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding import (
    LogitsError,
    ParameterError,
    Sampler,
    SamplingParams,
    build_token_tables,
    token_logprobs,
)
from decoding.strategies import Adapt, DynaTemp

VOCAB = 300
TABLES = build_token_tables([b"x", b"\n", b"  y"] * (VOCAB // 3))
SAMPLER = Sampler(TABLES, eos_token_ids=(0,))
KINDS = {
    "greedy": SamplingParams(temperature=0),
    "greedy_edited": SamplingParams(temperature=0, repetition_penalty=1.2),
    "dense": SamplingParams(),
    "top_p": SamplingParams(top_p=0.9),
    "top_k": SamplingParams(top_k=5),
    "typical": SamplingParams(typical_p=0.5),
    "dynatemp": SamplingParams(strategy=DynaTemp()),
    "adapt": SamplingParams(strategy=Adapt(), min_p=0.1),
}


def sample(params, logits):
    rows = [SAMPLER.start(params, [7, 8], seed=1, is_traced=True) for _ in logits]
    return SAMPLER.sample(logits, rows)


@pytest.mark.parametrize("params", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("column", [0, 7, 299])
def test_logits_that_are_not_numbers_are_refused(params, bad, column):
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(0))
    logits[1, column] = bad
    with pytest.raises(LogitsError, match="logits are not numbers; are its weights damaged"):
        sample(params, logits)


@pytest.mark.parametrize("params", KINDS.values(), ids=KINDS)
def test_logits_that_are_all_impossible_are_refused(params):
    with pytest.raises(LogitsError, match="not numbers"):
        sample(params, torch.full((1, VOCAB), -math.inf))


@pytest.mark.parametrize("num_top", [0, 3])
def test_log_probabilities_of_what_is_not_a_number_are_refused(num_top):
    logits = torch.zeros(2, VOCAB)
    logits[0, 5] = math.nan
    with pytest.raises(LogitsError, match="not numbers"):
        token_logprobs(logits, [1, 2], num_top=num_top)


# Every field's ends, what lies just inside them, and the middle.
PENALTIES = st.sampled_from([5e-324, 1e-46, 1e-38, 1e-30, 1e-5, 0.5, 1.0, 2.0])
SHARES = st.sampled_from([5e-324, 1e-300, 1e-30, 1e-7, 0.5, 1.0 - 2**-53, 1.0])
STRATEGIES = st.sampled_from(
    [SamplingParams().strategy]
    + [DynaTemp(range=r, exponent=e) for r in (0.0, 5e-324, 2.0) for e in (0.0, 5e-324, 10.0)]
)


@st.composite
def extreme_params(draw):
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 5e-324, 1e-45, 1e-10, 1.0, 2.0])),
        top_p=draw(SHARES),
        top_k=draw(st.sampled_from([-1, 0, 1, VOCAB - 1, VOCAB, 2**31 - 1])),
        min_p=draw(st.sampled_from([0.0, 5e-324, 0.5, 1.0])),
        typical_p=draw(SHARES),
        presence_penalty=draw(st.sampled_from([-2.0, 0.0, 5e-324, 2.0])),
        frequency_penalty=draw(st.sampled_from([-2.0, 0.0, 5e-324, 2.0])),
        repetition_penalty=draw(PENALTIES),
        logit_bias=draw(st.dictionaries(st.integers(0, 9), st.sampled_from([-100.0, 0.0, 100.0]))),
        min_tokens=draw(st.sampled_from([0, 5])),
        stop_token_ids=draw(st.sampled_from([(), (1, 2), tuple(range(2, VOCAB))])),
        logprobs=draw(st.sampled_from([None, 20])),
        strategy=draw(STRATEGIES),
    )


@settings(max_examples=300, deadline=None)
@given(
    params=extreme_params(), scale=st.sampled_from([0.0, 1e-30, 3.0, 1e4]), seed=st.integers(0, 9)
)
def test_extreme_values_that_are_allowed_draw_a_token(params, scale, seed):
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale
    sampled = sample(params, logits)
    assert 0 <= sampled.token_ids[0] < VOCAB
    numbers = [sampled.temperatures[0], sampled.entropies[0], sampled.logprobs[0]]
    assert all(map(math.isfinite, [*numbers, *(value for _, value in sampled.top[0])]))
    if params.min_tokens:
        assert sampled.token_ids[0] not in {0, *params.stop_token_ids}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tiny_repetition_penalty_makes_the_prompts_likely_token_certain(temperature):
    logits = torch.zeros(1, VOCAB)
    logits[0, 7], logits[0, 8], logits[0, 9] = 1.0, -1.0, 5.0
    params = SamplingParams(temperature=temperature, repetition_penalty=1e-38, top_p=0.9)
    assert sample(params, logits).token_ids == [7]


@pytest.mark.parametrize("end_token_ids", [[], [0]])
def test_stop_and_end_tokens_that_leave_none_are_refused(end_token_ids):
    stops = tuple(range(len(end_token_ids), VOCAB))
    params = SamplingParams(min_tokens=2, stop_token_ids=stops)
    with pytest.raises(ParameterError, match="and the end tokens are all 300 tokens"):
        params.check_vocabulary(VOCAB, end_token_ids)
    with pytest.raises(ParameterError, match="and the end tokens are all 300 tokens"):
        Sampler(TABLES, eos_token_ids=end_token_ids).start(params, [], seed=0)


def test_end_token_without_a_logit_holds_nothing_back():
    sampler = Sampler(TABLES, eos_token_ids=[VOCAB, 5000])
    row = sampler.start(SamplingParams(min_tokens=1, temperature=0.0), [], seed=0)
    assert sampler.sample(torch.arange(float(VOCAB))[None], [row]).token_ids == [VOCAB - 1]
