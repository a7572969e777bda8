"""Strategies that shape more than the temperature, against plain programs of their definitions."""

import math
import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch

from decoding import Sampler, SamplingParams, build_token_tables
from decoding.spread import measure_spread
from decoding.strategies import Dry, Edt, Mirostat2, Strategy, TopNSigma, Xtc
from decoding.strategies.dry import find_repeats

VOCAB = 200
TEXTS = [b"\n", b":", b"a:", b'"', b"*", b"x\ny", *(b"w%d" % i for i in range(6, VOCAB))]
TABLES = build_token_tables(TEXTS)
ALL = [Edt(), TopNSigma(), Xtc(), Dry(), Mirostat2()]


def sampler() -> Sampler:
    return Sampler(TABLES)


def random_logits(seed: int, rows: int = 1, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def softmax(values: Sequence[float]) -> list[float]:
    largest = max(values)
    weights = [math.exp(value - largest) for value in values]
    return [weight / sum(weights) for weight in weights]


def generate(
    strategy: Strategy, count: int, *, seed: int = 1, prompt: Sequence[int] = (), **params: object
) -> tuple[list[int], list[float | None]]:
    """Return tokens and notes of one row over random logits."""
    chooser = sampler()
    settings = {"temperature": 1.0, **params}
    row = chooser.start(SamplingParams(strategy=strategy, **settings), list(prompt), seed=seed)
    notes = []
    for step in range(count):
        row.append(chooser.sample(random_logits(step), [row]).token_ids[0])
        notes.append(row.last_note)
    return list(row.token_ids), notes


def kept_tokens(strategy: Strategy, logits: torch.Tensor, **params: object) -> set[int]:
    """Return the tokens that ever come out of many draws."""
    chooser = sampler()
    settings = {"temperature": 1.0, **params}
    rows = [
        chooser.start(SamplingParams(strategy=strategy, **settings), [], seed=seed)
        for seed in range(3000)
    ]
    return set(chooser.sample(logits.expand(len(rows), -1).contiguous(), rows).token_ids)


@pytest.mark.parametrize(("theta", "base"), [(0.1, 0.8), (1.0, 0.5), (0.0, 0.8), (0.5, 1.0)])
def test_edt_is_its_formula(theta: float, base: float) -> None:
    logits = torch.cat([random_logits(1, 4, spread) for spread in (0.0, 0.5, 3.0, 30.0)])
    controller = Edt(theta=theta, base=base).bind(TABLES)
    temperatures = torch.full((len(logits),), 0.9)
    found = controller.temperatures(None, temperatures, measure_spread(logits))
    for row, value in zip(logits.tolist(), found.tolist(), strict=True):
        probs = softmax(row)
        entropy = -sum(p * math.log(p) for p in probs if p > 0)
        expected = 0.9 * base ** (theta / max(entropy, 1e-300))
        assert value == pytest.approx(expected, abs=1e-5)


def test_edt_of_a_certain_token_takes_it() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 7] = 300.0
    chooser = sampler()
    row = chooser.start(SamplingParams(temperature=2.0, strategy=Edt(theta=1.0)), [], seed=1)
    assert chooser.sample(logits, [row]).token_ids == [7]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("n", [0.5, 1.0, 2.0])
def test_top_n_sigma_keeps_what_llama_cpp_keeps(n: float, temperature: float) -> None:
    logits = random_logits(2, spread=2.0)
    logits[0, 100:] = -math.inf
    possible = [value for value in logits[0].tolist() if value > -math.inf]
    mean = sum(possible) / len(possible)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in possible) / len(possible))
    expected = {
        i for i, value in enumerate(logits[0].tolist()) if value >= max(possible) - n * deviation
    }
    row = sampler().start(
        SamplingParams(temperature=temperature, strategy=TopNSigma(n=n)), [], seed=1
    )
    shape = row.controller.shaper.shape(logits[0], row, temperature)
    least = max(possible) + temperature * math.log(shape.min_p)
    assert {i for i, v in enumerate(logits[0].tolist()) if v >= least - 1e-6} == expected
    drawn = kept_tokens(TopNSigma(n=n), logits, temperature=temperature)
    assert drawn <= expected
    if temperature == 2.0 and n == 0.5:
        assert drawn == expected


def xtc_removes(logits: Sequence[float], threshold: float) -> set[int]:
    """Return what llama.cpp removes when it acts."""
    probs = softmax(logits)
    order = sorted(range(len(probs)), key=lambda i: -probs[i])
    last = 0
    for place, token in enumerate(order):
        if probs[token] < threshold:
            break
        last = place
    return set(order[:last])


@pytest.mark.parametrize("threshold", [0.02, 0.1, 0.3, 0.6])
def test_xtc_leaves_out_what_llama_cpp_leaves_out(threshold: float) -> None:
    logits = random_logits(3, spread=2.0)
    removed = xtc_removes(logits[0].tolist(), threshold)
    row = sampler().start(SamplingParams(strategy=Xtc(threshold=threshold)), [], seed=1)
    shaper = Xtc(probability=1.0, threshold=threshold).bind(TABLES).shaper
    banned = shaper.shape(logits[0], row, 1.0).banned
    assert set([] if banned is None else banned.tolist()) == removed
    drawn = kept_tokens(Xtc(probability=1.0, threshold=threshold), logits)
    assert drawn.isdisjoint(removed)
    assert kept_tokens(Xtc(probability=0.0, threshold=threshold), logits) >= removed


def test_xtc_acts_as_often_as_it_is_asked_to_whatever_is_drawn() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, :2] = torch.tensor([9.0, 8.0])
    chooser = sampler()
    rows = [
        chooser.start(SamplingParams(strategy=Xtc(probability=0.3)), [], seed=s)
        for s in range(4000)
    ]
    drawn = Counter(chooser.sample(logits.expand(4000, -1).contiguous(), rows).token_ids)
    probs = softmax(logits[0].tolist())
    # 4000 draws: a standard deviation of 0.8 points.
    assert drawn[0] / 4000 == pytest.approx(0.7 * probs[0], abs=0.035)


def dry_penalties(
    history: Sequence[int], multiplier: float, base: float, allowed: int, breakers: set[int]
) -> dict[int, float]:
    """Return what llama.cpp takes from each logit, by trying every place."""
    limit = next(
        (i for i, token in enumerate(reversed(history)) if token in breakers), len(history)
    )
    longest: dict[int, int] = {}
    for end in range(len(history) - 1):
        length = 0
        while length < limit and length <= end and history[end - length] == history[-1 - length]:
            length += 1
        if length >= allowed:
            token = history[end + 1]
            longest[token] = max(longest.get(token, 0), length)
    return {token: multiplier * base ** (n - allowed) for token, n in longest.items()}


@pytest.mark.parametrize("allowed", [1, 2, 4])
@pytest.mark.parametrize("seed", range(20))
def test_dry_takes_what_llama_cpp_takes(seed: int, allowed: int) -> None:
    draws = random.Random(seed)
    # Few different tokens repeat themselves much; 0 to 5 are breakers.
    text = [draws.choice([7, 8, 9, 10, 10, 10, 0 if seed % 3 == 0 else 11]) for _ in range(80)]
    prompt, made = text[:50], text[50:]
    strategy = Dry(multiplier=0.7, base=1.5, allowed_length=allowed)
    chooser = sampler()
    row = chooser.start(SamplingParams(strategy=strategy), prompt, seed=1)
    for token in made:
        row.append(token)
    shape = row.controller.shaper.shape(torch.zeros(VOCAB), row, 1.0)
    expected = dry_penalties(text, 0.7, 1.5, allowed, set(range(6)))
    found = {}
    if shape.bias is not None:
        found = dict(zip(shape.bias[0].tolist(), (-shape.bias[1]).tolist(), strict=True))
    assert found == pytest.approx(expected, rel=1e-5)


def test_dry_looks_at_the_last_tokens_only() -> None:
    text = [7, 8, 9, 50] + [60 + i for i in range(20)] + [7, 8, 9]
    for last_n, is_found in ((-1, True), (27, True), (22, False), (0, False)):
        for split in (5, len(text)):
            row = sampler().start(SamplingParams(strategy=Dry(last_n=last_n)), text[:split], seed=1)
            for token in text[split:]:
                row.append(token)
            shape = row.controller.shaper.shape(torch.zeros(VOCAB), row, 1.0)
            assert (shape.bias is not None) == is_found


def test_dry_holds_at_temperature_0_and_others_leave_it_greedy() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 10], logits[0, 11] = 2.0, 1.9
    prompt = [7, 8, 9, 10, 30, 7, 8, 9]
    for strategy in ALL:
        chooser = sampler()
        row = chooser.start(SamplingParams(temperature=0, strategy=strategy), prompt, seed=1)
        assert chooser.sample(logits, [row]).token_ids == [11 if strategy.name == "dry" else 10]


def test_dry_breakers_are_texts_that_tokens_have_in_them() -> None:
    assert TABLES.tokens_with([b"\n", b":"]) == {0, 1, 2, 5}
    text = [7, 8, 2, 40, 7, 8, 2]
    row = sampler().start(SamplingParams(strategy=Dry(allowed_length=1)), text, seed=1)
    assert row.controller.shaper.shape(torch.zeros(VOCAB), row, 1.0).bias is None
    row = sampler().start(
        SamplingParams(strategy=Dry(allowed_length=1, breakers=("zz",))), text, seed=1
    )
    assert row.controller.shaper.shape(torch.zeros(VOCAB), row, 1.0).bias[0].tolist() == [40]


def test_long_repetition_is_found_and_its_penalty_is_finite() -> None:
    text = [7, 8, 9] * 400
    assert find_repeats(text, 10_000, 2)[7] == 1197
    row = sampler().start(SamplingParams(strategy=Dry(base=4.0)), text, seed=1)
    shape = row.controller.shaper.shape(torch.zeros(VOCAB), row, 1.0)
    assert torch.isfinite(shape.bias[1]).all()
    assert find_repeats([], 5, 1) == find_repeats([7], 5, 1) == {}


def mirostat(steps: int, tau: float, eta: float, temperature: float) -> tuple[list[int], list]:
    """Return tokens and bounds as llama.cpp has them, drawn with our random numbers."""
    chooser = sampler()
    plain = chooser.start(SamplingParams(temperature=temperature), [], seed=1)
    bound, tokens, bounds = 2 * tau, [], []
    for step in range(steps):
        logits = random_logits(step)
        probs = softmax([value / temperature for value in logits[0].tolist()])
        kept = [i for i, p in enumerate(probs) if -math.log2(p) <= bound]
        kept = kept or [probs.index(max(probs))]
        masked = torch.full_like(logits, -math.inf)
        masked[0, kept] = logits[0, kept]
        token = chooser.sample(masked, [plain]).token_ids[0]
        plain.append(token)
        share = probs[token] / sum(probs[i] for i in kept)
        bound -= eta * (-math.log2(share) - tau)
        tokens.append(token)
        bounds.append(bound)
    return tokens, bounds


@pytest.mark.parametrize(("tau", "eta"), [(3.0, 0.1), (1.0, 0.5), (0.2, 1.0), (8.0, 0.1)])
@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_mirostat_is_llama_cpps(tau: float, eta: float, temperature: float) -> None:
    tokens, bounds = mirostat(60, tau, eta, temperature)
    found = generate(Mirostat2(tau=tau, eta=eta), 60, temperature=temperature)
    assert found[0] == tokens
    assert found[1] == pytest.approx(bounds, abs=1e-4)


def test_truncated_row_goes_on_as_if_it_had_never_been_longer() -> None:
    for strategy in ALL:
        whole, _ = generate(strategy, 30, prompt=[7, 8, 9])
        chooser = sampler()
        row = chooser.start(SamplingParams(strategy=strategy), [7, 8, 9], seed=1)
        for step in range(20):
            row.append(chooser.sample(random_logits(step), [row]).token_ids[0])
        row.truncate(9)
        for step in range(9, 30):
            row.append(chooser.sample(random_logits(step), [row]).token_ids[0])
        assert list(row.token_ids) == whole


def test_rows_of_a_batch_equal_the_same_rows_alone() -> None:
    def start(chooser: Sampler) -> list:
        return [
            chooser.start(
                SamplingParams(
                    temperature=0.9, strategy=strategy, logit_bias={9: 2.0}, min_p=0.01,
                    repetition_penalty=1.2,
                ),
                [7, 8, 9, 7, 8],
                seed=index,
            )
            for index, strategy in enumerate([*ALL, *ALL, Edt(theta=2.0)])
        ]  # fmt: skip

    together, alone = sampler(), sampler()
    rows, single = start(together), start(alone)
    for step in range(15):
        logits = random_logits(step, len(rows))
        tokens = together.sample(logits, rows).token_ids
        for index, row in enumerate(single):
            (token,) = alone.sample(logits[index : index + 1], [row]).token_ids
            assert token == tokens[index]
            row.append(token)
            rows[index].append(token)


def test_request_s_own_edits_and_filters_hold_beside_a_strategy_s() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, :3] = torch.tensor([5.0, 4.9, 4.8])
    chooser = sampler()
    params = SamplingParams(
        strategy=Xtc(probability=1.0, threshold=0.05), logit_bias={0: -100.0}, top_k=1
    )
    rows = [chooser.start(params, [], seed=s) for s in range(50)]
    # 0 is biased away; of 1 and 2, both likely, the less likely stays, and is the top one.
    found = chooser.sample(logits.expand(50, -1).contiguous(), rows).token_ids
    assert set(found) == {2}
