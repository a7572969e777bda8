"""Factors that lose least on given inputs: against other solvers, plain SVD and measured errors."""

import pytest
import torch
from torch import Tensor

from adapters.mixed_rank.factors import compensate, factor, refit, refit_left
from adapters.mixed_rank.moments import (
    SHRINKAGE,
    GradientSum,
    Moments,
    MomentsError,
    MomentSum,
    RepresentativeSum,
    aimed_at,
    output_error,
)

SHAPES = [(24, 40), (40, 24), (32, 32)]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def anisotropic(count: int, width: int, seed: int = 0) -> Tensor:
    """Rows whose channels differ in size and go together."""
    scales = torch.logspace(1, -2, width, dtype=torch.float64)
    return draw(count, width, seed=seed) * scales @ draw(width, width, seed=seed + 1)


def moments_of(weight: Tensor, rows: Tensor, drifted: Tensor | None = None) -> Moments:
    total = MomentSum("a matrix", weight, is_normalised=False)
    total.add(rows, drifted)
    return total.total()


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_full_rank_is_the_matrix_itself(m: int, n: int) -> None:
    weight, rows = draw(m, n, seed=2), anisotropic(500, n)
    left, right = factor(weight, rows.T @ rows).at(min(m, n))
    assert (left @ right - weight).abs().max() <= 1e-5 * weight.abs().max()


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_measured_error_is_the_energy_left_out(m: int, n: int) -> None:
    weight, rows = draw(m, n, seed=2), anisotropic(500, n)
    found = factor(weight, rows.T @ rows)
    for rank in (1, 5, 17):
        left, right = found.at(rank)
        measured = (rows @ (weight - left @ right).T).square().sum()
        expected = found.energies[rank:].sum()
        torch.testing.assert_close(measured, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(found.errors[rank], expected / found.energy, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_whitening_gives_the_same_product(m: int, n: int) -> None:
    weight, rows = draw(m, n, seed=2), anisotropic(500, n)
    covariance = rows.T @ rows
    root = torch.linalg.cholesky(covariance)
    u, s, v = torch.linalg.svd(weight @ root)
    whitened = (u[:, :9] * s[:9]) @ torch.linalg.solve_triangular(
        root, v[:9], upper=False, left=False
    )
    left, right = factor(weight, covariance).at(9)
    error = (rows @ (left @ right - whitened).T).norm() / (rows @ weight.T).norm()
    assert error <= 1e-8


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_activation_aware_loses_less_than_plain_svd_at_every_rank(m: int, n: int) -> None:
    weight, rows = draw(m, n, seed=2), anisotropic(500, n)
    moments = moments_of(weight, rows)
    aware, plain = factor(weight, moments.covariance), factor(weight, torch.eye(n).double())
    u, s, v = torch.linalg.svd(weight)
    for rank in range(1, min(m, n)):
        best, blind = (output_error(torch.matmul(*f.at(rank)), moments) for f in (aware, plain))
        assert best <= blind * (1 + 1e-6)
        if rank <= min(m, n) // 2:
            assert best <= 0.9 * blind
        svd = (u[:, :rank] * s[:rank]) @ v[:rank]
        torch.testing.assert_close(torch.matmul(*plain.at(rank)), svd, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_fewer_rows_than_channels_do_no_harm(m: int, n: int) -> None:
    weight, rows = draw(m, n, seed=2), anisotropic(7, n)
    found = factor(weight, rows.T @ rows)
    left, right = found.at(7)
    assert left.isfinite().all()
    assert right.isfinite().all()
    torch.testing.assert_close(rows @ (left @ right).T, rows @ weight.T, rtol=1e-4, atol=1e-4)
    assert found.errors[7] < 1e-6


def test_output_error_is_what_is_measured() -> None:
    weight, rows, drifted = draw(12, 20, seed=2), anisotropic(90, 20), anisotropic(90, 20, seed=5)
    approximation = draw(12, 20, seed=3)
    target = rows @ weight.T
    expected = (drifted @ approximation.T - target).square().sum() / target.square().sum()
    found = output_error(approximation, moments_of(weight, rows, drifted))
    assert found == pytest.approx(float(expected), rel=1e-9)


def test_normalised_observations_count_alike_however_large_they_are() -> None:
    weight, rows = draw(12, 20, seed=2), anisotropic(90, 20)
    total = MomentSum("a matrix", weight)
    for scale, part in zip((1.0, 1000.0, 1e-3), rows.chunk(3), strict=True):
        total.add(part * scale)
    expected = sum(p.T @ p / (p @ weight.T).square().sum() for p in rows.chunk(3))
    moments = total.total()
    torch.testing.assert_close(moments.covariance, expected, rtol=1e-9, atol=0)
    assert moments.energy == pytest.approx(3)
    assert moments.num_rows == 90


def drift(rows: Tensor) -> Tensor:
    """What a compressed network reads: channels mixed and shrunk, and something added."""
    width = rows.shape[1]
    mixed = 0.7 * torch.eye(width).double() + 0.3 * draw(width, width, seed=8) / width**0.5
    return rows @ mixed + 0.01 * rows.std() * draw(*rows.shape, seed=9)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_compensation_is_the_best_of_its_rank_on_drifted_inputs(m: int, n: int) -> None:
    weight, rows = draw(m, n, seed=2), anisotropic(500, n)
    moments = moments_of(weight, rows, drift(rows))
    blind = factor(weight, moments_of(weight, rows).covariance)
    aware = compensate(weight, moments)
    for rank in (4, 9):
        left, right = aware.at(rank)
        found = output_error(left @ right, moments)
        assert found <= 0.95 * output_error(torch.matmul(*blind.at(rank)), moments)
        assert found == pytest.approx(float(aware.errors[rank]), rel=1e-3)
        nearby = [
            output_error((left + 1e-2 * draw(*left.shape, seed=i)) @ right, moments)
            for i in range(5)
        ]
        assert found <= min(nearby)


def test_without_drift_compensation_changes_nothing() -> None:
    weight, rows = draw(24, 40, seed=2), anisotropic(500, 40)
    moments = moments_of(weight, rows)
    torch.testing.assert_close(refit(weight, moments), weight)
    first, second = factor(weight, moments.covariance), compensate(weight, moments)
    torch.testing.assert_close(first.errors, second.errors, rtol=1e-3, atol=1e-6)
    drifted = moments_of(weight, rows, drift(rows))
    aimed = aimed_at(weight, drifted)
    torch.testing.assert_close(aimed.targets, drifted.covariance @ weight.T)
    torch.testing.assert_close(refit(weight, aimed), weight)


def test_refitted_left_is_the_best_for_its_right() -> None:
    weight, rows = draw(24, 40, seed=2), anisotropic(500, 40)
    moments = moments_of(weight, rows)
    left, right = factor(weight, moments.covariance).at(10)
    torch.testing.assert_close(refit_left(right, moments), left, rtol=1e-3, atol=1e-4)
    rough = (right * 4 / right.abs().amax()).round() * right.abs().amax() / 4
    refitted = refit_left(rough, moments)
    assert output_error(refitted @ rough, moments) < output_error(left @ rough, moments)


def gradient_sum(weight: Tensor, gradients: Tensor, num_targets: int) -> Tensor:
    total = GradientSum("a matrix", weight)
    for rows in gradients.chunk(5):
        total.add(rows)
    return total.total(num_targets)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_metric_is_the_curvature_shrunk_towards_all_directions_alike(m: int, n: int) -> None:
    weight, gradients = draw(m, n, seed=2), anisotropic(200, m, seed=5)
    square = gradients.T @ gradients
    alike = square.trace() / m * torch.eye(m, dtype=torch.float64)
    whole = ((1 - SHRINKAGE) * square + SHRINKAGE * alike) / (2 * 40)
    expected = whole if m <= n else weight.T @ whole @ weight
    found = gradient_sum(weight, gradients, 40)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_factors_in_a_metric_lose_least_in_it_and_what_they_say(m: int, n: int) -> None:
    weight, rows, gradients = draw(m, n, seed=2), anisotropic(300, n), anisotropic(300, m, seed=5)
    whole = gradient_sum(torch.eye(m, dtype=torch.float64), gradients, 1).double()
    metric = gradient_sum(weight, gradients, 1)
    covariance = rows.T @ rows
    rank = 9

    def lost(approximation: Tensor) -> float:
        missing = weight - approximation
        return float((whole @ missing @ covariance @ missing.T).trace())

    found = factor(weight, covariance, metric=metric)
    product = torch.matmul(*found.at(rank))
    assert lost(product) == pytest.approx(float(found.energies[rank:].sum()), rel=1e-3)
    blind = torch.matmul(*factor(weight, covariance).at(rank))
    assert lost(product) < 0.95 * lost(blind)
    # A textbook solution, by roots of both.
    first, second = torch.linalg.cholesky(whole), torch.linalg.cholesky(covariance)
    u, s, v = torch.linalg.svd(first.T @ weight @ second)
    best = torch.linalg.solve(first.T, u[:, :rank] * s[:rank] @ v[:rank]) @ second.inverse()
    torch.testing.assert_close(product, best, rtol=1e-2, atol=1e-2 * float(best.abs().max()))


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_matrix_that_the_loss_does_not_see_can_be_factored(m: int, n: int) -> None:
    weight, rows = draw(m, n, seed=2), anisotropic(300, n)
    metric = gradient_sum(weight, torch.zeros(50, m).double(), 50)
    left, right = factor(weight, rows.T @ rows, metric=metric).at(min(m, n))
    torch.testing.assert_close(left @ right, weight, rtol=1e-4, atol=1e-4)


def test_gradients_that_are_no_numbers_are_refused_by_name() -> None:
    total = GradientSum("layers.3.q", draw(4, 6, seed=0))
    total.add(torch.full((3, 4), float("nan")).double())
    with pytest.raises(MomentsError, match=r"layers\.3\.q: a gradient is not a finite number"):
        total.total(3)


def test_representative_input_is_the_mean_of_the_observations() -> None:
    weight, observations = draw(12, 20, seed=2), anisotropic(60, 20).view(4, 15, 20)
    total = RepresentativeSum("a matrix", weight)
    for rows in observations:
        total.add(rows)
    moments = total.total()
    mean = observations.mean(0)
    expected = mean.T @ mean / (mean @ weight.T).square().sum()
    torch.testing.assert_close(moments.covariance, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
def test_inputs_that_are_no_numbers_are_refused_by_name(value: float) -> None:
    total = MomentSum("layers.3.q", draw(4, 6, seed=0))
    rows = draw(5, 6, seed=1)
    rows[2, 3] = value
    with pytest.raises(MomentsError, match=r"layers\.3\.q: an input is not a finite number"):
        total.add(rows)


@pytest.mark.parametrize(("m", "n"), [(5, 900), (900, 5), (30, 30)])
def test_sums_over_many_observations_are_those_of_their_products(m: int, n: int) -> None:
    weight, rows = draw(m, n, seed=2), draw(40 * 9, n, seed=3)
    seen = rows + 0.1 * draw(40 * 9, n, seed=4)
    total = MomentSum("a matrix", weight)
    covariance, targets = torch.zeros(n, n).double(), torch.zeros(n, m).double()
    for x, d in zip(rows.chunk(40), seen.chunk(40), strict=True):
        total.add(x, d)
        y = x @ weight.T
        covariance += d.T @ d / y.square().sum()
        targets += d.T @ y / y.square().sum()
    moments = total.total()
    torch.testing.assert_close(moments.covariance, covariance)
    torch.testing.assert_close(moments.targets, targets)
    assert moments.num_rows == 360


def test_no_inputs_at_all_are_refused_by_name() -> None:
    with pytest.raises(MomentsError, match=r"layers\.3\.q: no input was observed"):
        MomentSum("layers.3.q", draw(4, 6, seed=0)).total()
