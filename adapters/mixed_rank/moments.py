"""What is kept of a matrix's inputs and gradients: sums of their products, nothing else."""

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
        targets: (n, m) float64, the sum of D^T Y with the outputs Y = X W^T that are to be met.
        energy: sum of the squares of Y.
        num_rows: of all observations.
    """

    covariance: Tensor
    targets: Tensor
    energy: float
    num_rows: int

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            covariance=self.covariance + other.covariance,
            targets=self.targets + other.targets, energy=self.energy + other.energy,
            num_rows=self.num_rows + other.num_rows,
        )  # fmt: skip


_FLUSH_EVERY = 16
_BLOCK = 384  # columns of a symmetric product at a time: its lower half is never computed


class _ProductSum:
    """A sum of products A^T B: over a few in their own precision, over all in float64."""

    def __init__(self, rows: int, columns: int, *, is_symmetric: bool) -> None:
        self._shape, self._is_symmetric = (rows, columns), is_symmetric
        self._total = torch.zeros(rows, columns, dtype=torch.float64)
        self._part: Tensor | None = None
        self._count = 0

    def add(self, a: Tensor, b: Tensor) -> None:
        if self._part is None:
            self._part = torch.zeros(self._shape, dtype=a.dtype)
        if self._is_symmetric:
            for start in range(0, self._shape[0], _BLOCK):
                end = start + _BLOCK
                self._part[start:end, start:].addmm_(a[:, start:end].T, b[:, start:])
        else:
            self._part.addmm_(a.T, b)
        self._end_add()

    def add_product(self, product: Tensor) -> None:
        if self._part is None:
            self._part = torch.zeros(self._shape, dtype=product.dtype)
        self._part += product
        self._end_add()

    def _end_add(self) -> None:
        self._count += 1
        if self._count % _FLUSH_EVERY == 0:
            self._flush()

    def _flush(self) -> None:
        if self._part is not None:
            self._total += self._part
            self._part.zero_()

    def total(self) -> Tensor:
        self._flush()
        if not self._is_symmetric:
            return self._total
        upper = self._total.triu()
        return upper + upper.triu(1).T


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
        m, n = weight.shape
        self._name, self._weight, self._is_normalised = name, weight, is_normalised
        # Whichever is smaller: outputs themselves, or what outputs can be told from.
        self._has_outputs = m < n
        self._gram = None if self._has_outputs else weight.double().T @ weight.double()
        self._covariance = _ProductSum(n, n, is_symmetric=True)
        self._cross = _ProductSum(n, min(m, n), is_symmetric=False)
        self._is_drifted, self._energy, self._num_rows = False, 0.0, 0

    def add(self, rows: Tensor, drifted: Tensor | None = None) -> None:
        """Add an observation.

        Args:
            rows: (T, n) float32, T > 0, that the matrix reads in the network as it was.
            drifted: (T, n) that it reads in the compressed network; None: the same. It is given
                for all observations or for none.

        Raises:
            MomentsError: a value is no finite number.
        """
        if self._gram is None:
            outputs, square = rows @ self._weight.T.to(rows.dtype), None
            energy = float(outputs.square().sum(dtype=torch.float64))
        else:
            outputs, square = rows, rows.T @ rows
            energy = float((square * self._gram).sum())
        share = 1 / energy if self._is_normalised and energy > 0 else 1.0
        seen = rows if drifted is None else drifted
        if not energy < float("inf") or not seen.sum().isfinite():
            raise MomentsError(f"{self._name}: an input is not a finite number")
        if drifted is None and square is not None:
            self._covariance.add_product(share * square)
        else:
            scaled = seen * share
            self._covariance.add(seen, scaled)
            if drifted is not None:
                self._cross.add(scaled, outputs)
                self._is_drifted = True
        self._energy += share * energy
        self._num_rows += len(rows)

    def total(self) -> Moments:
        """Return the moments so far.

        Raises:
            MomentsError: there was no observation.
        """
        if not self._num_rows:
            raise MomentsError(f"{self._name}: no input was observed")
        covariance = self._covariance.total()
        targets = self._cross.total() if self._is_drifted else covariance
        if not (self._is_drifted and self._has_outputs):
            targets = targets @ self._weight.double().T
        return Moments(
            covariance=covariance, targets=targets, energy=self._energy, num_rows=self._num_rows
        )


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


class RepresentativeSum:
    """Finds the moments of a single input that stands for all: the mean of the observations.

    It is what the authors do in place of the expectation; its rank is at most T.

    Args:
        name, weight: as for `MomentSum`.
    """

    def __init__(self, name: str, weight: Tensor) -> None:
        self._name, self._weight = name, weight
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, rows: Tensor, drifted: Tensor | None = None) -> None:
        """Add an observation, (T, n) float32 of as many rows as the others; drifts play no part."""
        self._sum = rows.clone() if self._sum is None else self._sum + rows
        self._count += 1

    def total(self) -> Moments:
        """Return the moments so far; see `MomentSum.total`."""
        total = MomentSum(self._name, self._weight)
        if self._sum is not None:
            total.add(self._sum / self._count)
        return total.total()


SHRINKAGE = 0.1
"""Of a metric, how much is taken in all directions alike: gradients of few rows see but some."""


_LEAST = 1e-24


class GradientSum:
    """Adds up what a change of a matrix's outputs does to the loss, to second order.

    For a loss of samples of the model's own distribution the mean of g g^T, over gradients g of the
    outputs, is the loss's curvature (Fisher's information). Taken as independent of the inputs, as
    K-FAC does, a change D of the matrix costs tr(G D C D^T) / 2 with their covariance C.

    Args:
        name: of the matrix, for errors.
        weight: (m, n), what makes the outputs. Where they are more than its inputs, G is kept as
            W^T G W.

    Source: J. Martens and R. Grosse, 2015 (K-FAC); its use for ranks and factors here is ours.
    """

    def __init__(self, name: str, weight: Tensor) -> None:
        m, n = weight.shape
        self._name, self._weight, self._is_of_outputs = name, weight, m <= n
        side = min(m, n)
        self._sum = _ProductSum(side, side, is_symmetric=True)
        self._trace = 0.0

    def add(self, gradients: Tensor) -> None:
        """Add the (T, m) gradients of some outputs, of the sum of the losses of an observation."""
        rows = gradients if self._is_of_outputs else gradients @ self._weight
        self._sum.add(rows, rows)
        self._trace += float(gradients.square().sum(dtype=torch.float64))

    def total(self, num_targets: int) -> Tensor:
        """Return (s, s) float32, s the lesser of m and n: G / 2 for each of so many losses.

        Raises:
            MomentsError: a gradient was no finite number.
        """
        if not self._trace < float("inf"):
            raise MomentsError(f"{self._name}: a gradient is not a finite number")
        # What the loss does not see at all still has directions.
        alike = max(SHRINKAGE * self._trace / len(self._weight), _LEAST)
        if self._is_of_outputs:
            shape = torch.eye(len(self._weight), dtype=torch.float64)
        else:
            shape = self._weight.double().T @ self._weight.double()
        total = (1 - SHRINKAGE) * self._sum.total() + alike * shape
        return (total / (2 * num_targets)).float()


def aimed_at(product: Tensor, moments: Moments) -> Moments:
    """Return the moments as if outputs to be met were what a matrix makes of the same inputs.

    Args:
        product: (m, n), the matrix.
        moments: of the inputs.
    """
    return replace(moments, targets=moments.covariance @ product.double().T)


def output_error(approximation: Tensor, moments: Moments) -> float:
    """Return the mean squared error of the outputs, as a share of their energy.

    Args:
        approximation: (m, n), multiplied with the drifted inputs.
        moments: of the inputs.
    """
    approximation = approximation.double()
    own = ((approximation @ moments.covariance) * approximation).sum()
    shared = (approximation * moments.targets.T).sum()
    return float(own - 2 * shared + moments.energy) / moments.energy
