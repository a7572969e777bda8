"""Two factors of a matrix that lose least on the inputs that it reads."""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from adapters.mixed_rank.compress_config import Calibration
from adapters.mixed_rank.moments import Moments, output_error

Root: TypeAlias = tuple[Tensor, Tensor]
"""(n, n) symmetric square root of a covariance, and its inverse."""

DAMPING = 1e-6
"""Of the mean of a covariance's diagonal, added to the diagonal where a fit inverts it."""
RIDGES = (1e-4, 1e-2)
"""The same where a matrix is fitted to drifted inputs; what errs least on others is taken."""
LEAST_VALUE = 1e-12
"""Of a covariance's largest eigenvalue: lesser ones are raised to it where its root is inverted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Factors:
    """The best factors of a matrix at every rank: the first columns and rows of two.

    Attributes:
        left: (m, K) float64, K the lesser of m and n.
        right: (K, n) float64.
        energies: (K,) float64, descending: how much of the outputs' squares each rank has, or of
            what they weigh in a metric.
        energy: of all outputs; what the ranks together have, and what none can have.
    """

    left: Tensor
    right: Tensor
    energies: Tensor
    energy: float

    def at(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return (m, rank) and (rank, n) factors; one of them is orthonormal."""
        left, right = self.left[:, :rank], self.right[:rank]
        # The inverse of a root has large values that cancel; what is trained or rounded needs none.
        if len(left) <= right.shape[1]:
            basis, mixed = torch.linalg.qr(left)
            return basis, mixed @ right
        basis, mixed = torch.linalg.qr(right.T)
        return left @ mixed.T, basis.T

    @property
    def errors(self) -> Tensor:
        """(K + 1,) share of the outputs' squares lost at ranks 0 .. K, never rising."""
        kept = torch.cat([self.energies.new_zeros(1), self.energies.cumsum(0)])
        return ((self.energy - kept) / self.energy).clamp_min(0)


def factor(
    weight: Tensor,
    covariance: Tensor,
    energy: float | None = None,
    root: Root | None = None,
    metric: Tensor | None = None,
) -> Factors:
    """Factor a matrix so that the error E|x (W - L R)^T|^2 is least at every rank.

    The smaller side is decomposed. Where outputs are not more than inputs these are the principal
    components of the outputs, which needs no inverse and so takes any covariance; where they are
    more, the covariance's root is inverted.

    Args:
        weight: (m, n).
        covariance: (n, n) float64, E[x^T x] up to a factor; the identity gives the plain SVD.
        energy: of the outputs that are to be met; None: that of this matrix on these inputs.
        root: of the covariance, if it is known.
        metric: G, in which the errors' squares are taken: E[(x D^T) G (x D^T)^T], from
            `GradientSum`: (m, m), or where m > n (n, n) W^T G W. None: the identity.
    """
    weight = weight.double()
    outputs, inputs = weight.shape
    metric = None if metric is None else metric.double()
    if outputs <= inputs:
        half, inverse = (None, None) if metric is None else _root(metric)
        seen = weight if half is None else half @ weight
        energies, vectors = _principal(seen @ covariance @ seen.T)
        left, right = vectors if inverse is None else inverse @ vectors, vectors.T @ seen
    else:
        half, inverse = _root(covariance) if root is None else root
        square = weight.T @ weight if metric is None else metric
        energies, vectors = _principal(half @ square @ half)
        left, right = weight @ half @ vectors, vectors.T @ inverse
    total = float(energies.sum()) if energy is None else energy
    return Factors(left=left, right=right, energies=energies, energy=total)


def fit(
    weight: Tensor, moments: Moments, calibration: Calibration, metric: Tensor | None = None
) -> Factors:
    """Factor a matrix for inputs that have not drifted; with calibration "none" for any: plain SVD.

    Args:
        weight: (m, n).
        moments: of its inputs.
        calibration: what it is fitted to.
        metric: see `factor`.
    """
    if calibration == "none":
        return factor(weight, torch.eye(weight.shape[1], dtype=torch.float64))
    return factor(weight, moments.covariance, metric=metric)


def refit(weight: Tensor, moments: Moments, ridge: float = DAMPING) -> Tensor:
    """Return the matrix that maps drifted inputs best to the outputs of the others.

    Args:
        weight: (m, n), of the network as it was.
        moments: of both inputs.
        ridge: holds it back from leaving `weight`, see `RIDGES`.

    Returns:
        (m, n) float64: W plus what least squares adds to it; W itself without a drift.
    """
    weight = weight.double()
    missing = moments.targets - moments.covariance @ weight.T
    return weight + torch.linalg.solve(_damp(moments.covariance, ridge), missing).T


def compensate(
    weight: Tensor, moments: Moments, ridge: float = DAMPING, root: Root | None = None
) -> Factors:
    """Factor a matrix so that what it makes of drifted inputs is near what it made of the others.

    This is reduced-rank regression: the best full matrix for those inputs, factored on them.

    Args:
        weight: (m, n), of the network as it was.
        moments: of both inputs.
        ridge: see `refit`.
        root: of the covariance, if it is known.
    """
    return factor(refit(weight, moments, ridge), moments.covariance, moments.energy, root)


def compensate_at(
    weight: Tensor, moments: Moments, held_out: Moments, rank: int
) -> tuple[Tensor, Tensor]:
    """Return factors of a rank for drifted inputs, bound to the matrix as much as proves good.

    Few inputs and small drifts make for wild fits. So each of `RIDGES` and no compensation at all
    are tried on observations that were not fitted to; what errs least is fitted to all of them.

    Args:
        weight: (m, n), of the network as it was.
        moments, held_out: of inputs to fit to, and of others.
        rank: of the factors.
    """

    def fitted(
        moments: Moments, ridge: float | None, root: Root | None = None
    ) -> tuple[Tensor, Tensor]:
        if ridge is None:
            return factor(weight, moments.covariance, root=root).at(rank)
        return compensate(weight, moments, ridge, root).at(rank)

    root = _root(moments.covariance) if weight.shape[0] > weight.shape[1] else None

    def error(ridge: float | None) -> float:
        return output_error(torch.matmul(*fitted(moments, ridge, root)), held_out)

    return fitted(moments + held_out, min((*RIDGES, None), key=error))


def refit_left(right: Tensor, moments: Moments) -> Tensor:
    """Return the (m, R) left factor that fits best to a given right one, quantised for instance.

    Args:
        right: (R, n).
        moments: of the inputs.
    """
    right = right.double()
    inner = right @ moments.covariance @ right.T
    return torch.linalg.solve(_damp(inner), right @ moments.targets).T


def _damp(covariance: Tensor, share: float = DAMPING) -> Tensor:
    mean = covariance.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    return covariance + share * mean * torch.eye(len(covariance), dtype=torch.float64)


def _root(covariance: Tensor) -> Root:
    """Return the symmetric square root of a covariance, and its inverse."""
    values, vectors = torch.linalg.eigh(covariance)
    least = max(LEAST_VALUE * float(values[-1]), torch.finfo(torch.float64).tiny)
    roots = values.clamp_min(least).sqrt()
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T


def _principal(square: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues in descending order and their vectors as columns."""
    values, vectors = torch.linalg.eigh((square + square.T) / 2)
    return values.flip(0).clamp_min(0), vectors.flip(1)
