"""Rounded factors: what they lose beyond what the rank loses."""

import pytest
import torch
from torch import Tensor

from adapters.mixed_rank.compress_config import CompressConfig
from adapters.mixed_rank.factors import factor
from adapters.mixed_rank.moments import Moments, MomentSum, output_error
from adapters.mixed_rank.quantize import KINDS, quantize_factors
from models.q4_1 import quantize_q4_1
from models.q8_0 import quantize_q8_0
from models.weights import dense

MOST = {"float16": 1.001, "int8": 1.05, "int4": 1.10}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def problem(m: int, n: int) -> tuple[Tensor, Moments]:
    """A matrix and moments of inputs whose channels differ and go together."""
    weight = draw(m, n, seed=1)
    total = MomentSum("a matrix", weight)
    mixed = torch.logspace(1, -2, n)[:, None] * draw(n, n, seed=2)
    for i in range(12):
        total.add(draw(128, n, seed=10 + i) @ mixed)
    return weight, total.total()


@pytest.mark.parametrize("form", MOST)
@pytest.mark.parametrize(("m", "n"), [(192, 256), (256, 192)])
def test_rounding_costs_little_beside_the_rank(form: str, m: int, n: int) -> None:
    weight, moments = problem(m, n)
    checked = 0
    for rank in range(32, min(m, n), 32):
        left, right = factor(weight, moments.covariance).at(rank)
        exact = output_error(left @ right, moments)
        if exact < 0.01:
            continue
        rounded = quantize_factors(left, right, form, moments)
        assert output_error(torch.matmul(*map(dense, rounded)), moments) <= MOST[form] * exact
        assert [getattr(part, "kind", None) for part in rounded] == list(KINDS[form])
        checked += 1
    assert checked


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_refitting_is_never_worse_than_not(form: str) -> None:
    weight, moments = problem(192, 256)
    for rank in (32, 64, 96, 128):
        left, right = factor(weight, moments.covariance).at(rank)
        rounded = quantize_factors(left, right, form, moments)
        quantize = quantize_q8_0 if form == "int8" else quantize_q4_1
        plain = dense(quantize_q8_0(left)) @ dense(quantize(right.float()))
        found = output_error(torch.matmul(*map(dense, rounded)), moments)
        assert found <= output_error(plain, moments) * (1 + 1e-3)


def test_ranks_that_do_not_fit_the_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="rank_step must be a multiple of 32 with form 'int8'"):
        CompressConfig(rank_step=16)
    assert CompressConfig(rank_step=16, form="float16").rank_step == 16
