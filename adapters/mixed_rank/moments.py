"""What is kept of the inputs of a matrix: sums of their products, never the inputs themselves."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


class MomentsError(ValueError):
    """The inputs of a matrix are no numbers, or there were none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """Second moments of what a matrix reads, summed over observations with a weight for each.

    An observation is what belongs together, a sequence or an image: some rows X of the network as
    it was, and rows D that the same matrix reads once what comes before it is compressed. Without
    such a drift they are the same.

    Attributes:
        covariance: (n, n) float64, the sum of D^T D.
        cross: (n, n) float64, the sum of D^T X.
        energy: sum of the squares of the outputs X W^T that are to be met.
        num_rows: of all observations.
    """

    covariance: Tensor
    cross: Tensor
    energy: float
    num_rows: int

    def __add__(self, other: "Moments") -> "Moments":
        covariance = self.covariance + other.covariance
        is_still = self.cross is self.covariance and other.cross is other.covariance
        return Moments(
            covariance=covariance,
            cross=covariance if is_still else self.cross + other.cross,
            energy=self.energy + other.energy,
            num_rows=self.num_rows + other.num_rows,
        )


class MomentSum:
    """Adds up the moments of a matrix's inputs.

    Args:
        name: of the matrix, for errors.
        weight: (m, n), what the inputs are multiplied with.
        is_normalised: each observation counts by the inverse of its own outputs' energy, as the
            paper has it; if not, all rows count alike.

    Source: the objective of the paper's section 3; moments in place of inputs are ours.
    """

    def __init__(self, name: str, weight: Tensor, *, is_normalised: bool = True) -> None:
        self._name = name
        weight = weight.double()
        self._gram = weight.T @ weight
        self._is_normalised = is_normalised
        n = weight.shape[1]
        self._drifted = torch.zeros(n, n, dtype=torch.float64)
        self._cross: Tensor | None = None
        self._energy, self._num_rows = 0.0, 0

    def add(self, rows: Tensor, drifted: Tensor | None = None) -> None:
        """Add an observation.

        Args:
            rows: (T, n) float32, T > 0, that the matrix reads in the network as it was.
            drifted: (T, n) that it reads in the compressed network; None: the same.

        Raises:
            MomentsError: a value is no finite number.
        """
        square = (rows.T @ rows).double()
        energy = float((square * self._gram).sum())
        share = 1 / energy if self._is_normalised and energy > 0 else 1.0
        if drifted is None:
            self._drifted += share * square
        else:
            if self._cross is None:
                assert not self._num_rows
                self._cross = torch.zeros_like(self._drifted)
            self._drifted += share * (drifted.T @ drifted).double()
            self._cross += share * (drifted.T @ rows).double()
        if not self._drifted.diagonal().sum().isfinite() or not energy < float("inf"):
            raise MomentsError(f"{self._name}: an input is not a finite number")
        self._energy += share * energy
        self._num_rows += len(rows)

    def total(self) -> Moments:
        """Return the moments so far.

        Raises:
            MomentsError: there was no observation.
        """
        if not self._num_rows:
            raise MomentsError(f"{self._name}: no input was observed")
        return Moments(
            covariance=self._drifted,
            cross=self._drifted if self._cross is None else self._cross,
            energy=self._energy, num_rows=self._num_rows,
        )  # fmt: skip


HELD_OUT_EVERY = 8
"""One of so many observations is not fitted to, but fits are judged by it."""


class SplitMoments:
    """Adds up the moments to fit to and, apart, those that fits are judged by.

    Args:
        name, weight: as for `MomentSum`.
    """

    def __init__(self, name: str, weight: Tensor) -> None:
        self._parts = MomentSum(name, weight), MomentSum(name, weight)
        self._count = 0

    def add(self, rows: Tensor, drifted: Tensor | None = None) -> None:
        """Add an observation; see `MomentSum.add`."""
        self._count += 1
        self._parts[self._count % HELD_OUT_EVERY == 0].add(rows, drifted)

    def totals(self) -> tuple[Moments, Moments]:
        """Return both; see `MomentSum.total`. Of few observations the two are one."""
        fitted = self._parts[0].total()
        return fitted, self._parts[1].total() if self._count >= HELD_OUT_EVERY else fitted


def representative(name: str, weight: Tensor, observations: Tensor) -> Moments:
    """Return the moments of a single input that stands for all: the mean of the observations.

    It is what the authors do in place of the expectation; its rank is at most T.

    Args:
        name: of the matrix, for errors.
        weight: (m, n).
        observations: (O, T, n) float32, all of equal length.
    """
    total = MomentSum(name, weight)
    total.add(observations.mean(0))
    return total.total()


def drop_drift(moments: Moments) -> Moments:
    """Return the moments as if the compressed network read what the network as it was did not."""
    return replace(moments, cross=moments.covariance)


def output_error(approximation: Tensor, weight: Tensor, moments: Moments) -> float:
    """Return the mean squared error of the outputs, as a share of their energy.

    Args:
        approximation: (m, n), multiplied with the drifted inputs.
        weight: (m, n), multiplied with the others.
        moments: of the inputs.
    """
    approximation, weight = approximation.double(), weight.double()
    own = ((approximation @ moments.covariance) * approximation).sum()
    shared = ((approximation @ moments.cross) * weight).sum()
    return float(own - 2 * shared + moments.energy) / moments.energy
