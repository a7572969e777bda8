"""Bring the output of a compressed layer near that of the layer as it was, by gradient.

Fitting one matrix after the other does not see what their errors do together, nor what an
activation makes of them. Here the factors of a layer are trained at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Forward = Callable[[int, Sequence[Tensor]], Tensor]
_PATIENCE = 3
_CHECKS = 8
_NOISE = 1e-6  # an error that is float32's own; steps along its gradient lead anywhere


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovery:
    """What the training of a layer came to.

    Attributes:
        before, after: mean error of held-out observations, as a share of their targets' energy.
        steps: that were taken.
    """

    before: float
    after: float
    steps: int


def recover(
    parameters: Sequence[Tensor],
    forward: Forward,
    targets: Sequence[Tensor],
    *,
    num_held_out: int,
    steps: int,
    learning_rate: float,
    generator: torch.Generator,
    metric: Tensor | None = None,
) -> tuple[list[Tensor], Recovery]:
    """Train parameters so that outputs come near their targets.

    Args:
        parameters: to start from; they are not changed.
        forward: gives (T, D) outputs of an observation with given parameters, differentiable.
        targets: (T, D) of each observation; the last ones are held out. Of a single one nothing is
            learnt.
        num_held_out: how many, at least 1.
        steps: most of them; fewer if what is held out gets no better.
        learning_rate: Adam's for a parameter, as a share of its values' root mean square.
        generator: chooses an observation for each step.
        metric: (D, D) symmetric, in which the errors' squares are taken; None: the identity.

    Returns:
        The parameters of the least held-out error, those given among them, and how that came.
    """

    def square(rows: Tensor) -> Tensor:
        return (rows.square() if metric is None else (rows @ metric) * rows).sum()

    energies = [float(square(target)) for target in targets]
    num_training = len(targets) - num_held_out

    def error(number: int, values: Sequence[Tensor]) -> Tensor:
        return square(forward(number, values) - targets[number]) / energies[number]

    @torch.no_grad()
    def held_out(values: Sequence[Tensor]) -> float:
        numbers = range(num_training, len(targets))
        return sum(float(error(number, values)) for number in numbers) / num_held_out

    values = [parameter.detach().clone().requires_grad_() for parameter in parameters]
    groups = [
        {"params": [value], "lr": learning_rate * float(value.detach().square().mean().sqrt())}
        for value in values
    ]
    optimizer = torch.optim.Adam(groups)
    before = best = held_out(parameters)
    if before < _NOISE or not num_training:
        steps = 0
    kept, unchanged, taken = [p.detach().clone() for p in parameters], 0, 0
    check_every = max(1, steps // _CHECKS)
    order: list[int] = []
    for step in range(1, steps + 1):
        if not order:
            order = torch.randperm(num_training, generator=generator).tolist()
        optimizer.zero_grad()
        error(order.pop(), values).backward()
        optimizer.step()
        taken = step
        if step % check_every and step < steps:
            continue
        found = held_out(values)
        if found < best:
            best, unchanged = found, 0
            kept = [value.detach().clone() for value in values]
        elif (unchanged := unchanged + 1) >= _PATIENCE:
            break
    return kept, Recovery(before=before, after=best, steps=taken)
