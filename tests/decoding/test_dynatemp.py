import math

import pytest
import torch

from decoding import Sampler, SamplingParams, build_token_tables
from decoding.spread import measure_spread
from decoding.strategies import DynaTemp


def llama_cpp(logits, temperature, spread, exponent):
    """Compute the temperature of one row in plain arithmetic."""
    if spread <= 0:
        return temperature
    low, high = max(0.0, temperature - spread), temperature + spread
    possible = [value for value in logits if value > -math.inf]
    if len(possible) <= 1:
        return temperature
    largest = max(possible)
    weights = [math.exp(value - largest) for value in possible]
    probs = [weight / sum(weights) for weight in weights]
    entropy = -sum(p * math.log(p) for p in probs if p > 0)
    return low + (high - low) * (entropy / math.log(len(possible))) ** exponent


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("spread", [0.0, 0.3, 1.5])
def test_dynatemp_equals_llama_cpps_definition(spread, exponent):
    torch.manual_seed(0)
    logits = torch.randn(6, 300) * torch.tensor([0.0, 0.5, 1.0, 2.0, 5.0, 20.0])[:, None]
    logits[2, 100:] = -math.inf
    logits[3, 1:] = -math.inf
    base = torch.tensor([0.2, 0.5, 1.0, 1.0, 0.7, 1.3])
    tables = build_token_tables([b"x"] * 300)
    controller = DynaTemp(range=spread, exponent=exponent).bind(tables)
    found = controller.temperatures(None, base, measure_spread(logits))
    expected = [
        llama_cpp(row, temperature, spread, exponent)
        for row, temperature in zip(logits.tolist(), base.tolist(), strict=True)
    ]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_dynatemp_at_temperature_0_is_greedy():
    torch.manual_seed(1)
    sampler = Sampler(build_token_tables([b"x"] * 50))
    logits = torch.randn(1, 50)
    row = sampler.start(SamplingParams(temperature=0, strategy=DynaTemp(range=1.0)), [], seed=1)
    sampled = sampler.sample(logits, [row])
    assert sampled.token_ids == [logits.argmax().item()]
    assert sampled.temperatures == [0.0]


def test_dynatemp_that_falls_to_0_takes_the_most_likely_token():
    sampler = Sampler(build_token_tables([b"x"] * 50))
    logits = torch.zeros(1, 50)
    logits[0, 7] = 200.0
    params = SamplingParams(temperature=0.5, strategy=DynaTemp(range=0.5))
    sampled = sampler.sample(logits, [sampler.start(params, [], seed=1)])
    assert sampled.token_ids == [7]


def test_dynatemp_batch_equals_rows_alone():
    torch.manual_seed(2)
    sampler = Sampler(build_token_tables([b"x"] * 1003))
    logits = torch.randn(9, 1003) * 2
    rows = [
        sampler.start(
            SamplingParams(temperature=0.9, strategy=DynaTemp(range=0.1 * (i % 3))), [], seed=i
        )
        for i in range(9)
    ]
    together = sampler.sample(logits, rows)
    alone = [sampler.sample(logits[i : i + 1], rows[i : i + 1]) for i in range(9)]
    assert together.token_ids == [one.token_ids[0] for one in alone]
    assert together.temperatures == [one.temperatures[0] for one in alone]
