"""Filters against a plain reference that sorts the whole row."""

import bisect
import itertools
import math

import pytest
import torch

from decoding import SamplingParams
from decoding.draw import draw_dense
from decoding.filters import draw_filtered, filter_row, select_key
from decoding.rows import argmax_rows, block_sums, find_largest, sum_rows
from decoding.weights import LARGEST_WEIGHT, distances, exponentials, weights_of

CASES = {
    "top_k": {"top_k": 20},
    "top_k-1": {"top_k": 1},
    "top_k-beyond-few": {"top_k": 90},
    "top_k-beyond-many": {"top_k": 1500},
    "top_k-beyond-all": {"top_k": 10**6},
    "top_p": {"top_p": 0.9},
    "top_p-small": {"top_p": 1e-6},
    "top_p-large": {"top_p": 0.9999},
    "min_p": {"min_p": 0.05},
    "min_p-1": {"min_p": 1.0},
    "min_p-small": {"min_p": 1e-7},
    "typical_p": {"typical_p": 0.7},
    "top_k-top_p": {"top_k": 30, "top_p": 0.8},
    "top_k-beyond-few-top_p": {"top_k": 200, "top_p": 0.95},
    "top_k-beyond-many-top_p": {"top_k": 1500, "top_p": 0.9},
    "top_p-min_p": {"top_p": 0.95, "min_p": 0.02},
    "all": {"top_k": 100, "typical_p": 0.9, "top_p": 0.9, "min_p": 0.01},
}


def kept_by_reference(weights, params):
    """Return the ids that the filters keep, in the order of the documentation."""
    probs = [weight / sum(weights) for weight in weights]
    kept = [i for i, p in enumerate(probs) if p > 0]
    mass = 1.0
    if 0 < params.top_k < len(probs):
        ranked = sorted((probs[i] for i in kept), reverse=True)
        kth = ranked[min(params.top_k, len(ranked)) - 1]
        kept = [i for i in kept if probs[i] >= kth]
        mass = math.fsum(probs[i] for i in kept)
    if params.typical_p < 1.0:
        mass = math.fsum(probs[i] for i in kept)
        surprise = {i: -math.log(probs[i] / mass) for i in kept}
        entropy = math.fsum(probs[i] / mass * surprise[i] for i in kept)
        ranked = sorted(kept, key=lambda i: abs(surprise[i] - entropy))
        kept = take_until(ranked, probs, params.typical_p * mass)
        mass = math.fsum(probs[i] for i in kept)
    if params.top_p < 1.0:
        ranked = sorted(kept, key=lambda i: -probs[i])
        last = take_until(ranked, probs, params.top_p * mass)[-1]
        kept = [i for i in kept if probs[i] >= probs[last]]
    least = params.min_p * max(probs[i] for i in kept)
    return sorted(i for i in kept if probs[i] >= least)


def take_until(ranked, probs, target):
    total = 0.0
    for count, token_id in enumerate(ranked, start=1):
        total += probs[token_id]
        if total >= target:
            return ranked[:count]
    return ranked


def draw_by_reference(probs, kept, uniforms):
    """Return the token that each random number draws."""
    edges = list(itertools.accumulate(probs[i] for i in kept))
    return [kept[bisect.bisect_right(edges, u * edges[-1])] for u in uniforms]


def make_weights(kind, width):
    """Return (1, width) weights and distances."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(1, width, generator=generator)
    logits = {"peaked": noise * 6.0, "usual": noise * 3.0, "flat": noise * 0.5}[kind]
    away = distances(logits, torch.ones(1))
    return weights_of(away), away


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("width", [256, 8192])
@pytest.mark.parametrize("kind", ["peaked", "usual", "flat"])
def test_filters_equal_the_reference(kind, width, case):
    params = SamplingParams(**CASES[case])
    weights, away = make_weights(kind, width)
    values = weights[0].tolist()
    kept = kept_by_reference(values, params)
    assert filter_row(weights[0], away[0], params).nonzero()[:, 0].tolist() == kept
    uniforms = torch.linspace(0.001, 0.999, 12, dtype=torch.float64)[:, None]
    many, far = weights.expand(12, -1).contiguous(), away.expand(12, -1).contiguous()
    drawn = draw_filtered(many, far, [params] * 12, uniforms)
    assert drawn.tolist() == draw_by_reference(values, kept, uniforms[:, 0].tolist())


@pytest.mark.parametrize("case", CASES)
def test_filters_keep_equal_weights_together(case):
    params = SamplingParams(**CASES[case])
    weights, away = torch.full((1, 4096), LARGEST_WEIGHT), torch.zeros(1, 4096)
    uniforms = torch.tensor([[0.0]], dtype=torch.float64)
    kept = filter_row(weights[0], away[0], params)
    assert kept.nonzero()[:, 0].tolist() == list(range(4096))
    assert draw_filtered(weights, away, [params], uniforms).tolist() == [0]


def test_mixed_filters_equal_rows_alone():
    rows = [SamplingParams(**kwargs) for kwargs in CASES.values()]
    kinds = ["peaked", "usual", "flat"]
    made = [make_weights(kinds[i % 3], 8192) for i in range(len(rows))]
    weights, away = (torch.cat(parts) for parts in zip(*made, strict=True))
    uniforms = torch.rand(len(rows), 1, dtype=torch.float64)
    together = draw_filtered(weights, away, rows, uniforms)
    alone = [
        draw_filtered(weights[i, None], away[i, None], rows[i : i + 1], uniforms[i, None])[0]
        for i in range(len(rows))
    ]
    assert together.tolist() == [int(token_id) for token_id in alone]


def test_exponentials_are_near_the_exact_ones():
    values = torch.linspace(-87.0, 0.0, 100_001)
    expected = values.double().exp()
    assert ((exponentials(values).double() - expected) / expected).abs().max() < 4e-7
    assert exponentials(torch.zeros(1)).item() == 1.0


def test_weights_are_whole_and_their_sums_exact_in_any_order():
    weights, _ = make_weights("flat", 8192)
    assert torch.equal(weights, weights.round())
    assert weights.max() == LARGEST_WEIGHT
    shuffled = weights[:, torch.randperm(8192)].double()
    assert shuffled.cumsum(1)[0, -1] == sum(map(int, weights[0].tolist()))


@pytest.mark.parametrize("uniform", [0.0, 2.0**-52, 0.5, 1.0 - 2.0**-52])
@pytest.mark.parametrize("width", [256, 1024])
def test_draw_never_takes_an_impossible_token(width, uniform):
    torch.manual_seed(4)
    for possible in (1, 2, 5, 200):
        probs = torch.zeros(30, width)
        for row in probs:
            row[torch.randperm(width)[:possible]] = torch.rand(possible) + 1e-6
        drawn = draw_dense(probs, torch.full((30, 1), uniform, dtype=torch.float64))
        assert (probs.gather(1, drawn[:, None]) > 0).all()
        if uniform in (0.0, 1.0 - 2.0**-52):
            ids = torch.where(probs > 0, torch.arange(width), -1 if uniform else width)
            end = ids.amax(1) if uniform else ids.amin(1)
            assert drawn.tolist() == end.tolist()


def test_draw_ignores_tokens_too_unlikely_for_a_weight():
    logits = torch.zeros(1, 512)
    logits[0, 300] = 120.0
    for uniform in (0.0, 1.0 - 2.0**-52):
        weights = weights_of(distances(logits, torch.ones(1)))
        assert draw_dense(weights, torch.tensor([[uniform]], dtype=torch.float64)).item() == 300


def test_draw_equals_the_reference():
    weights, _ = make_weights("usual", 2048)
    uniforms = torch.rand(500, 1, dtype=torch.float64)
    drawn = draw_dense(weights.expand(500, -1).contiguous(), uniforms)
    expected = draw_by_reference(weights[0].tolist(), range(2048), uniforms[:, 0].tolist())
    assert drawn.tolist() == expected


@pytest.mark.parametrize("width", [1, 5, 255, 256, 257, 1000, 50257])
def test_row_reductions_equal_torch_and_do_not_depend_on_other_rows(width):
    torch.manual_seed(width)
    values = torch.randn(5, width)
    values[3] = values[3].round()
    assert argmax_rows(values).tolist() == values.argmax(-1).tolist()
    assert sum_rows(values).tolist() == pytest.approx(values.double().sum(-1).tolist(), abs=1e-2)
    for row in range(5):
        alone = values[row : row + 1].clone()
        assert torch.equal(block_sums(values)[row], block_sums(alone)[0])
        assert sum_rows(values)[row] == sum_rows(alone)[0]


@pytest.mark.parametrize("count", [1, 5, 64, 1024])
@pytest.mark.parametrize("width", [1, 300, 5000, 50257])
def test_find_largest_equals_topk(width, count):
    torch.manual_seed(width)
    values = torch.randn(3, width)
    largest, columns = find_largest(values, count)
    assert torch.equal(largest, values.topk(min(count, width), dim=1).values)
    assert torch.equal(values.gather(1, columns), largest)


def test_select_key_equals_a_sort():
    torch.manual_seed(9)
    values = torch.rand(3000).pow(8)
    keys, weights = values.view(torch.int32), values.double()
    ranked = sorted(zip(keys.tolist(), weights.tolist(), strict=True))
    for target in (1e-9, 0.1, 7.5, 100.0, 1e9):
        total, expected = 0.0, ranked[-1][0]
        for key, weight in ranked:
            total += weight
            if total >= target:
                expected = key
                break
        assert select_key(keys, weights, target) == expected
