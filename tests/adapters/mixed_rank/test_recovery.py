"""Training of a layer's factors: what it can do, what it cannot, and that it never does harm."""

import pytest
import torch
from torch import Tensor

from adapters.mixed_rank.factors import compensate, factor
from adapters.mixed_rank.moments import MomentSum
from adapters.mixed_rank.recovery import Recovery, recover

RANK = 6


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


WEIGHT = draw(24, 40, seed=1)
SCALES = torch.logspace(1, -1, 40)
INPUTS = [draw(64, 40, seed=10 + i) * SCALES @ draw(40, 40, seed=2) for i in range(16)]
DRIFTED = [x @ (0.6 * torch.eye(40) + 0.4 * draw(40, 40, seed=8) / 40**0.5) for x in INPUTS]


def train(
    factors: tuple[Tensor, Tensor], inputs: list[Tensor], **changes
) -> tuple[list[Tensor], Recovery]:
    options = {"num_held_out": 4, "steps": 400, "learning_rate": 3e-3} | changes
    return recover(
        [part.float() for part in factors],
        lambda number, values: inputs[number] @ values[1].T @ values[0].T,
        [x @ WEIGHT.T for x in INPUTS], generator=torch.Generator().manual_seed(0), **options,
    )  # fmt: skip


def moments_of(drifted: list[Tensor]) -> MomentSum:
    total = MomentSum("a matrix", WEIGHT)
    for x, seen in zip(INPUTS, drifted, strict=True):
        total.add(x, seen)
    return total


def test_start_is_unchanged_without_steps() -> None:
    start = factor(WEIGHT, moments_of(INPUTS).total().covariance).at(RANK)
    trained, recovery = train(start, INPUTS, steps=0)
    assert all(torch.equal(a, b.float()) for a, b in zip(trained, start, strict=True))
    assert recovery.before == recovery.after
    assert recovery.steps == 0


def test_a_single_observation_teaches_nothing() -> None:
    start = factor(WEIGHT, moments_of(INPUTS).total().covariance).at(RANK)
    trained, recovery = train(start, INPUTS, num_held_out=len(INPUTS))
    assert torch.equal(trained[0], start[0].float())
    assert recovery.steps == 0


def test_nothing_is_gained_where_the_closed_form_is_the_best() -> None:
    start = factor(WEIGHT, moments_of(INPUTS).total().covariance).at(RANK)
    _, recovery = train(start, INPUTS)
    assert 0.999 * recovery.before <= recovery.after <= recovery.before


def test_drifted_inputs_are_made_up_for() -> None:
    blind = factor(WEIGHT, moments_of(INPUTS).total().covariance).at(RANK)
    _, recovery = train(blind, DRIFTED)
    assert recovery.after <= 0.95 * recovery.before
    closed = compensate(WEIGHT, moments_of(DRIFTED).total()).at(RANK)
    _, nearer = train(closed, DRIFTED, steps=0)
    assert nearer.before <= 0.95 * recovery.before


def test_steps_that_do_harm_are_not_kept() -> None:
    start = factor(WEIGHT, moments_of(INPUTS).total().covariance).at(RANK)
    trained, recovery = train(start, INPUTS, learning_rate=5.0, steps=16)
    assert recovery.after == recovery.before
    assert torch.equal(trained[0], start[0].float())


@pytest.mark.parametrize("is_left_zero", [True, False])
def test_two_zero_factors_have_no_gradient_and_one_has(is_left_zero: bool) -> None:
    left = torch.zeros(24, RANK, requires_grad=True)
    right = torch.zeros(RANK, 40) if is_left_zero else draw(RANK, 40, seed=3)
    right = right.requires_grad_()
    (INPUTS[0] @ right.T @ left.T - INPUTS[0] @ WEIGHT.T).square().sum().backward()
    assert bool(left.grad.any()) is not is_left_zero
    assert not right.grad.any()
