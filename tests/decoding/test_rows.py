"""Rows: penalties, growth and rollback."""

import random

import pytest
import torch

from decoding import Sampler, SamplingParams, build_token_tables
from decoding.penalties import TokenCounts, apply_edits
from decoding.strategies import Adapt

VOCAB = 40
TEXTS = [b"x", b"\n", b"    ", b"\n    ", b" y:", None, b"```", b"`"]


def make_sampler():
    return Sampler(
        build_token_tables([TEXTS[i % len(TEXTS)] for i in range(VOCAB)]), eos_token_ids=(1,)
    )


def penalised_by_reference(logits, params, prompt, generated):
    """Apply bias and penalties to a dense row."""
    logits = logits.clone()
    for token_id, bias in params.logit_bias.items():
        logits[token_id] += bias
    for token_id in range(len(logits)):
        count = generated.count(token_id)
        if token_id in prompt or count:
            value, penalty = logits[token_id], params.repetition_penalty
            logits[token_id] = value / penalty if value > 0 else value * penalty
        logits[token_id] -= params.frequency_penalty * count
        logits[token_id] -= params.presence_penalty * (count > 0)
    return logits


PENALTIES = {
    "repetition": {"repetition_penalty": 1.4},
    "repetition-below-1": {"repetition_penalty": 0.7},
    "presence": {"presence_penalty": 1.1},
    "frequency": {"frequency_penalty": -0.6},
    "all": {
        "repetition_penalty": 1.2,
        "presence_penalty": -0.4,
        "frequency_penalty": 0.3,
        "logit_bias": {3: 2.0, 7: -3.0},
    },
}


def test_penalties_of_a_batch_equal_the_dense_reference():
    torch.manual_seed(0)
    chooser = random.Random(0)
    sampler = make_sampler()
    logits = torch.randn(len(PENALTIES), VOCAB) * 3
    expected, rows = [], []
    for index, kwargs in enumerate(PENALTIES.values()):
        params = SamplingParams(**kwargs)
        prompt, generated = (chooser.choices(range(VOCAB), k=n) for n in (10, 25))
        rows.append(sampler.start(params, prompt, seed=0))
        for token_id in generated:
            rows[-1].append(token_id)
        expected.append(penalised_by_reference(logits[index], params, prompt, generated))
    changed = logits.clone()
    apply_edits(changed, [row.edits(index) for index, row in enumerate(rows)])
    torch.testing.assert_close(changed, torch.stack(expected))


@pytest.mark.parametrize("case", PENALTIES)
def test_penalties_act_in_greedy_sampling(case):
    torch.manual_seed(1)
    sampler = make_sampler()
    params = SamplingParams(temperature=0, **PENALTIES[case])
    prompt = [1, 2, 3]
    row = sampler.start(params, prompt, seed=0)
    for _ in range(30):
        logits = torch.randn(1, VOCAB)
        expected = penalised_by_reference(logits[0], params, prompt, list(row.token_ids))
        token_id = sampler.sample(logits, [row]).token_ids[0]
        assert token_id == expected.argmax().item()
        row.append(token_id)


def test_counts_grow_beyond_their_first_capacity():
    counts = TokenCounts(SamplingParams(repetition_penalty=1.5), [5, 5, 6])
    for token_id in range(1000):
        counts.add(token_id)
        counts.add(token_id)
    assert len(counts) == 1000
    assert sorted(counts.token_ids.tolist()) == list(range(1000))
    assert counts.counts.tolist() == [2.0] * 1000
    assert counts.in_prompt.sum() == 2.0


STRATEGIES = [
    Adapt(),
    Adapt(policy="block_initial", column0=True),
    Adapt(fences_only=True, first=True),
    Adapt(policy="reference", newline_token_ids=(1,), indent_token_ids=(2,)),
]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=["line", "block", "fences", "reference"])
def test_rollback_of_three_tokens_and_readvance_gives_the_same_state(strategy):
    sampler = make_sampler()
    params = SamplingParams(strategy=strategy, repetition_penalty=1.3, frequency_penalty=0.5)
    chooser = random.Random(2)
    for _ in range(20):
        prompt, generated, others = (chooser.choices(range(VOCAB), k=n) for n in (6, 20, 3))
        row, fresh = (sampler.start(params, prompt, seed=4) for _ in range(2))
        for token_id in generated[:-3] + others:
            row.append(token_id)
        row.truncate(len(generated) - 3)
        for token_id in generated[-3:]:
            row.append(token_id)
        for token_id in generated:
            fresh.append(token_id)
        assert row.state == fresh.state
        assert row.token_ids == fresh.token_ids
        assert row.uniform() == fresh.uniform()
        logits = torch.randn(1, VOCAB)
        changed, expected = logits.clone(), logits.clone()
        apply_edits(changed, [row.edits(0)])
        apply_edits(expected, [fresh.edits(0)])
        assert torch.equal(changed, expected)


def test_truncate_beyond_what_there_is_is_refused():
    row = make_sampler().start(SamplingParams(), [], seed=0)
    row.append(1)
    for bad in (-1, 2):
        with pytest.raises(ValueError, match=rf"num_generated must be from 0 to 1, got {bad}"):
            row.truncate(bad)


def test_random_numbers_depend_on_seed_and_position_only():
    sampler = make_sampler()
    row, other = (sampler.start(SamplingParams(), [], seed=seed) for seed in (9, 10))
    forward = []
    for _ in range(200):
        forward.append(row.uniform())
        row.append(0)
    assert len(set(forward)) == 200
    assert other.uniform() not in forward
    for position in (150, 64, 63, 0):
        row.truncate(position)
        assert row.uniform() == forward[position]
