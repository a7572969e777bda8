"""Masks are drawn as often as they should be, and gradients are those of the estimators."""

import pytest
import torch
from torch import Tensor

from adapters.disp.estimators import draw_masks

LOGITS = torch.tensor([-3.0, -1.0, 0.0, 0.7, 2.0, 6.0])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("estimator", ["reinmax", "ste"])
def test_channels_are_kept_with_their_probability(estimator: str) -> None:
    count = 100_000
    masks, counted = draw_masks(LOGITS, count, estimator, generator())  # type: ignore[arg-type]
    assert masks is counted
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    # Five standard deviations: fails once in a million for one of six.
    torch.testing.assert_close(masks.mean(0), LOGITS.sigmoid(), atol=5 * 0.5 / count**0.5, rtol=0)


@pytest.mark.parametrize("estimator", ["reinmax", "ste", "gumbel"])
def test_masks_follow_from_the_generator(estimator: str) -> None:
    first, again, other = (
        draw_masks(LOGITS.repeat(20), 3, estimator, generator(seed))  # type: ignore[arg-type]
        for seed in (1, 1, 2)
    )
    for i in range(2):
        assert torch.equal(first[i], again[i])
        assert not torch.equal(first[i], other[i])


def test_reinmax_gradient_is_half_the_distance_times_that_of_the_mask() -> None:
    logits = LOGITS.clone().requires_grad_()
    masks, _ = draw_masks(logits, 1, "reinmax", generator())
    gradient = torch.arange(1.0, 7.0)
    masks.backward(gradient[None])
    assert logits.grad is not None
    expected = 0.5 * (masks[0] - LOGITS.sigmoid()).abs() * gradient
    torch.testing.assert_close(logits.grad, expected)


def test_straight_through_gradient_is_that_of_the_probability() -> None:
    logits = LOGITS.clone().requires_grad_()
    masks, _ = draw_masks(logits, 1, "ste", generator())
    masks.sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, LOGITS.sigmoid() * (1 - LOGITS.sigmoid()))


def quadratic(masks: Tensor) -> Tensor:
    """A loss of two channels with a product."""
    a, b = masks.unbind(-1)
    return (1.5 * a - 0.5) ** 2 + 0.7 * a * b + (b - 0.3) ** 2


def test_reinmax_gradient_of_a_quadratic_is_exact_on_average() -> None:
    """For a quadratic loss second order is all there is; 2e5 samples, within 1 %."""
    logits = torch.tensor([0.4, -0.8], requires_grad=True)
    masks, _ = draw_masks(logits, 200_000, "reinmax", generator())
    quadratic(masks).mean().backward()
    assert logits.grad is not None
    exact = torch.tensor([0.4, -0.8], requires_grad=True)
    keep = exact.sigmoid()
    outcomes = torch.cartesian_prod(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]))
    chances = (outcomes * keep + (1 - outcomes) * (1 - keep)).prod(-1)
    (chances * quadratic(outcomes)).sum().backward()
    torch.testing.assert_close(logits.grad, exact.grad, rtol=0.01, atol=0)


def test_gumbel_masks_are_soft_and_counted_ones_hard() -> None:
    logits = torch.zeros(500, requires_grad=True)
    masks, counted = draw_masks(logits, 4, "gumbel", generator())
    is_soft = (masks > 0.01) & (masks < 0.99)
    assert float(is_soft.float().mean()) > 0.5
    assert set(counted.detach().unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(masks.round(), counted)  # another drawing
    # The published noise is one Gumbel variable, not a difference of two: its median is 0.37, so
    # that more than half are kept; P(Gumbel > 0) = 1 - 1/e.
    share = float(counted.detach().mean())
    assert share == pytest.approx(0.632, abs=5 * 0.48 / 2000**0.5)
    counted.sum().backward()
    assert logits.grad is not None
    assert logits.grad.all()
