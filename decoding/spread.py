"""How spread out the model's distribution is over the tokens."""

from typing import NamedTuple

import torch
from torch import Tensor

from decoding.rows import sum_rows
from decoding.weights import distances, exponentials


class Spread(NamedTuple):
    """What `measure_spread` finds of several rows.

    Attributes:
        entropies: (B,) float64, >= 0, in nats, of the distribution at temperature 1; NaN where the
            logits are not numbers.
        log_masses: (B,) float64, log of the sum of the exponentials of the logits.
        num_possible: (B,) int64, how many tokens have a logit above -inf.
    """

    entropies: Tensor
    log_masses: Tensor
    num_possible: Tensor


def measure_spread(logits: Tensor) -> Spread:
    """Measure the spread of each row.

    Args:
        logits: (B, V) float32; -inf marks impossible tokens.

    Returns:
        it, on the CPU.
    """
    away = distances(logits, torch.ones(len(logits), device=logits.device))
    shares = exponentials(away)
    masses = sum_rows(shares)
    # Entropy is the mean of log(mass) - distance.
    entropies = masses.log() - sum_rows(away.double().mul_(shares)) / masses
    return Spread(
        entropies=entropies.clamp_min_(0.0).cpu(),
        log_masses=(logits.amax(-1) + masses.log()).cpu(),
        num_possible=(logits > -torch.inf).sum(-1).cpu(),
    )
