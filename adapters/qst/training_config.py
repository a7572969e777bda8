"""How a side network is trained: every option, with its default and its limits."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from adapters.options import COMPUTE_DTYPES, ComputeDtype, Limits, check_options

Schedule = Literal["constant", "linear", "cosine"]
Keep = Literal["last", "best"]

CHOICES: dict[str, tuple[str, ...]] = {
    "schedule": ("constant", "linear", "cosine"),
    "compute_dtype": COMPUTE_DTYPES,
    "keep": ("last", "best"),
}
_LIMITS: Limits = {
    "steps": ("a whole number of at least 1", lambda x: x >= 1),
    "epochs": ("a number above 0", lambda x: x > 0),
    "batch_size": ("a whole number of at least 1", lambda x: x >= 1),
    "accumulate": ("a whole number of at least 1", lambda x: x >= 1),
    "learning_rate": ("a number above 0", lambda x: x > 0),
    "alpha_learning_rate": ("a number above 0", lambda x: x > 0),
    "warmup": ("a share from 0 to 1", lambda x: 0 <= x <= 1),
    "weight_decay": ("a number of at least 0", lambda x: x >= 0),
    "clip": ("a number above 0", lambda x: x > 0),
    "seed": ("a whole number from 0 to 2^63 - 1", lambda x: 0 <= x < 2**63),
    "eval_fraction": ("a share from 0 to below 1", lambda x: 0 <= x < 1),
    "eval_limit": ("a whole number of at least 1", lambda x: x >= 1),
    "eval_every": ("a whole number of at least 1", lambda x: x >= 1),
    "checkpoint_every": ("a whole number of at least 1", lambda x: x >= 1),
}
_FLOATS = {
    "epochs", "learning_rate", "alpha_learning_rate", "warmup", "weight_decay", "clip",
    "eval_fraction",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """Options of one training run.

    Attributes:
        steps: optimiser steps; None: as many as `epochs` takes.
        epochs: passes over the training data, without `steps`.
        batch_size: sequences computed together.
        accumulate: batches whose gradients make one step; the mean is over all their tokens.
        learning_rate: AdamW's, of everything but the gates.
        alpha_learning_rate: of the final blend's weight and of the mix gates.
        schedule: of both rates after the warm-up: constant, or falling to 0 as a line or a cosine.
        warmup: share of the steps in which the rates rise from 0.
        weight_decay: of matrices; vectors and gates have none.
        clip: largest norm of a step's gradient; larger ones are scaled down.
        seed: of the initial weights and of the order of the data.
        eval_fraction: share of the examples held out, where no others are given.
        eval_limit: most examples held out.
        eval_every: steps between evaluations; there is one at the end in any case.
        checkpoint_every: steps between checkpoints.
        compute_dtype: of the side network's matrix products; "auto" is bfloat16 where it is faster.
        keep: "last": the weights of the last step; "best": those with the least held-out loss.

    Raises:
        ValueError: an option is out of range.
    """

    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 5e-3
    alpha_learning_rate: float = 2e-2
    schedule: Schedule = "linear"
    warmup: float = 0.03
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    eval_fraction: float = 0.05
    eval_limit: int = 128
    eval_every: int = 100
    checkpoint_every: int = 100
    compute_dtype: ComputeDtype = "auto"
    keep: Keep = "last"

    def __post_init__(self) -> None:
        limits = {k: v for k, v in _LIMITS.items() if k != "steps" or self.steps is not None}
        check_options(self, limits, _FLOATS, CHOICES)

    def num_steps(self, num_examples: int) -> int:
        """Return the optimiser steps of a run over so many examples."""
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil(self.epochs * num_examples / (self.batch_size * self.accumulate)))

    def rate_factor(self, step: int, num_steps: int) -> float:
        """Return what the learning rates are multiplied by at a step, counted from 0."""
        warmup = math.ceil(self.warmup * num_steps)
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, num_steps - warmup)
        if self.schedule == "linear":
            return 1 - progress
        return 0.5 * (1 + math.cos(math.pi * progress)) if self.schedule == "cosine" else 1.0

    def as_fields(self) -> dict[str, Any]:
        """Return every option by name, as JSON values."""
        return asdict(self)
