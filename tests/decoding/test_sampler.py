import math

import pytest
import torch

from decoding import Sampler, SamplingParams, build_token_tables, derive_seed
from decoding.strategies import Adapt, DynaTemp

ODD_VOCAB = 1003


def make_sampler(vocab_size=ODD_VOCAB, **options):
    texts = [b"x", b"\n", b"    ", b"\n    ", b" y:", None]
    return Sampler(build_token_tables([texts[i % 6] for i in range(vocab_size)]), **options)


def make_logits(num_rows, vocab_size=ODD_VOCAB, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab_size, generator=generator) * 3.0


MIXED = [
    SamplingParams(temperature=0),
    SamplingParams(),
    SamplingParams(strategy=Adapt(a=1.0, b=0.5)),
    SamplingParams(temperature=0.7, top_p=0.9),
    SamplingParams(temperature=0, repetition_penalty=1.3, logit_bias={3: 5.0}),
    SamplingParams(strategy=Adapt(policy="block_initial", a=1.2, b=0.9), top_k=40),
    SamplingParams(temperature=1.5, min_p=0.1, presence_penalty=0.5),
    SamplingParams(strategy=DynaTemp(range=0.4), typical_p=0.8),
    SamplingParams(temperature=0.9, frequency_penalty=1.0, min_tokens=5, stop_token_ids=(1,)),
    SamplingParams(temperature=2.0, top_p=0.99),
    SamplingParams(strategy=Adapt(a=1.0, b=0.5), temperature=0),
    SamplingParams(strategy=DynaTemp(), logprobs=3),
]


def grow(sampler, params, seeds, num_steps, *, logits_seed=0):
    """Sample several sequences together; the logits depend on the sequence and the step."""
    rows = [
        sampler.start(p, [3, 1, 2, 3], seed=seed) for p, seed in zip(params, seeds, strict=True)
    ]
    for step in range(num_steps):
        logits = torch.cat(
            [make_logits(1, seed=logits_seed + seed * 1000 + step) for seed in seeds]
        )
        sampled = sampler.sample(logits, rows)
        for row, token_id in zip(rows, sampled.token_ids, strict=True):
            row.append(token_id)
    return [row.token_ids for row in rows]


def test_mixed_batch_equals_single_runs():
    sampler = make_sampler(eos_token_ids=(0,))
    seeds = list(range(len(MIXED)))
    together = grow(sampler, MIXED, seeds, 12)
    for index, params in enumerate(MIXED):
        assert grow(sampler, [params], [seeds[index]], 12) == [together[index]]


def test_order_of_rows_does_not_matter():
    sampler = make_sampler()
    seeds = list(range(len(MIXED)))
    forward = grow(sampler, MIXED, seeds, 5)
    backward = grow(sampler, MIXED[::-1], seeds[::-1], 5)
    assert forward == backward[::-1]


@pytest.mark.parametrize("policy", ["line_initial", "block_initial", "reference"])
def test_adapt_with_equal_temperatures_is_plain_sampling(policy):
    options = {"newline_token_ids": (1,), "indent_token_ids": (2,)} if policy == "reference" else {}
    adapt = Adapt(policy=policy, a=0.6, b=0.6, **options)
    sampler = make_sampler()
    for seed in range(5):
        plain = grow(sampler, [SamplingParams(temperature=0.6)], [seed], 30)
        assert grow(sampler, [SamplingParams(strategy=adapt, temperature=0.6)], [seed], 30) == plain


def test_greedy_rows_never_change_with_a_and_b():
    sampler = make_sampler()
    logits = make_logits(1)
    for a, b in ((2.0, 0.1), (0.5, 0.5), (1.0, 0.2)):
        row = sampler.start(SamplingParams(temperature=0, strategy=Adapt(a=a, b=b)), [3], seed=1)
        assert sampler.sample(logits, [row]).token_ids == [logits.argmax().item()]


def test_same_seed_gives_the_same_tokens_and_sequences_of_a_request_differ():
    sampler = make_sampler()
    params = [SamplingParams()]
    first, again = (grow(sampler, params, [7], 10) for _ in range(2))
    assert first == again
    rows = [sampler.start(params[0], [], seed=derive_seed(7, i)) for i in range(8)]
    flat = torch.zeros(8, ODD_VOCAB)
    assert len(set(sampler.sample(flat, rows).token_ids)) > 4


@pytest.mark.parametrize("is_hot", [True, False], ids=["hot", "cold"])
def test_frequencies_match_the_softmax_at_the_positions_temperature(is_hot):
    """1e5 draws, chi-square; fails by chance with probability 1e-3, at fixed seeds never."""
    sampler = make_sampler(12)
    logits = torch.linspace(-1.0, 1.5, 12)
    strategy = Adapt(a=1.3, b=0.6)
    rows = [sampler.start(SamplingParams(strategy=strategy), [3], seed=s) for s in range(250)]
    counts = torch.zeros(12)
    blank, text = 2, 0
    batch = logits.expand(250, -1).contiguous()
    if not is_hot:
        for row in rows:
            row.append(text)
    for _ in range(400):
        sampled = sampler.sample(batch, rows)
        assert sampled.temperatures[0] == pytest.approx(1.3 if is_hot else 0.6)
        counts += torch.bincount(torch.tensor(sampled.token_ids), minlength=12)
        for row in rows:
            row.append(blank if is_hot else text)
    expected = torch.softmax(logits / (1.3 if is_hot else 0.6), -1) * 100_000
    statistic = ((counts - expected).square() / expected).sum().double()
    p_value = torch.special.gammaincc(torch.tensor(5.5, dtype=torch.float64), statistic / 2.0)
    assert p_value > 1e-3


def test_top_p_comes_after_the_temperature():
    probs = torch.tensor([0.5, 0.3, 0.2])
    sampler = make_sampler(3)

    def seen(temperature):
        params = SamplingParams(temperature=temperature, top_p=0.75)
        rows = [sampler.start(params, [], seed=seed) for seed in range(300)]
        return set(sampler.sample(probs.log().expand(300, -1).contiguous(), rows).token_ids)

    assert seen(1.0) == {0, 1}
    assert seen(2.0) == {0, 1, 2}
    assert seen(0.3) == {0}


def test_greedy_takes_the_first_of_equal_logits():
    sampler = make_sampler()
    logits = torch.zeros(2, ODD_VOCAB)
    logits[0, [400, 900]] = 1.0
    rows = [sampler.start(SamplingParams(temperature=0), [], seed=0) for _ in range(2)]
    assert sampler.sample(logits, rows).token_ids == [400, 0]


def test_sample_changes_neither_logits_nor_rows():
    sampler = make_sampler(eos_token_ids=(0,))
    logits = make_logits(len(MIXED))
    before = logits.clone()
    rows = [sampler.start(params, [1, 2], seed=3) for params in MIXED]
    first = sampler.sample(logits, rows)
    assert sampler.sample(logits, rows) == first
    assert torch.equal(logits, before)
    assert all(row.num_generated == 0 for row in rows)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("options", "banned"),
    [
        pytest.param({"min_tokens": 2}, {5, 6}, id="eos"),
        pytest.param({"min_tokens": 2, "stop_token_ids": (7,)}, {5, 6, 7}, id="eos-and-stop"),
        pytest.param(
            {"min_tokens": 2, "stop_token_ids": (7,), "ignore_eos": True}, {7}, id="ignore-eos"
        ),
        pytest.param({"stop_token_ids": (7,)}, set(), id="no-minimum"),
    ],
)
def test_min_tokens_holds_back_end_and_stop_tokens(options, banned, temperature):
    sampler = make_sampler(20, eos_token_ids=(5, 6))
    logits = torch.full((1, 20), -50.0)
    for token_id in (5, 6, 7, 8):
        logits[0, token_id] = 50.0 - token_id
    params = SamplingParams(temperature=temperature, **options)
    row = sampler.start(params, [], seed=2)
    best = min({5, 6, 7, 8} - banned)
    for _ in range(2):
        drawn = sampler.sample(logits, [row]).token_ids[0]
        assert drawn not in banned
        if temperature == 0.0:
            assert drawn == best
        row.append(drawn)
    if temperature == 0.0:
        assert sampler.sample(logits, [row]).token_ids == [5]


def test_logit_bias_comes_before_the_choice():
    sampler = make_sampler()
    logits = make_logits(1)
    params = SamplingParams(temperature=0, logit_bias={9: 100.0, int(logits.argmax()): -100.0})
    assert sampler.sample(logits, [sampler.start(params, [], seed=0)]).token_ids == [9]


def test_extreme_temperatures_and_logits_give_valid_tokens():
    sampler = make_sampler()
    logits = make_logits(2)
    logits[0] *= 1e4
    logits[1, 1:] = -math.inf
    for temperature in (1e-300, 1e-7, 2.0):
        params = SamplingParams(temperature=temperature, top_p=0.9)
        rows = [sampler.start(params, [], seed=5) for _ in range(2)]
        assert sampler.sample(logits, rows).token_ids == [logits[0].argmax().item(), 0]


def test_vocabularies_of_any_size_work():
    for vocab_size in (1, 2, 255, 256, 257, 700):
        sampler = make_sampler(vocab_size)
        rows = [
            sampler.start(params, [0], seed=index)
            for index, params in enumerate(
                [SamplingParams(), SamplingParams(top_p=0.9), SamplingParams(temperature=0)]
            )
        ]
        sampled = sampler.sample(torch.zeros(3, vocab_size), rows)
        assert all(0 <= token_id < vocab_size for token_id in sampled.token_ids)


def test_start_refuses_ids_that_the_vocabulary_lacks():
    with pytest.raises(ValueError, match="logit_bias has token id 2000"):
        make_sampler().start(SamplingParams(logit_bias={2000: 1.0}), [], seed=0)


def test_many_different_strategies_leave_the_first_ones_results_alone():
    sampler = make_sampler()
    params = SamplingParams(strategy=Adapt(a=0.9, b=0.4))
    logits = make_logits(1)
    row = sampler.start(params, [3], seed=1)
    first = sampler.sample(logits, [row])
    for index in range(100):
        strategy = Adapt(a=1.0, b=0.001 * (index + 1))
        sampler.sample(logits, [sampler.start(SamplingParams(strategy=strategy), [3], seed=1)])
    assert sampler.sample(logits, [sampler.start(params, [3], seed=1)]) == first
