"""How a pruned variant is searched for: every option, with its default and its limits."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from adapters.options import COMPUTE_DTYPES, ComputeDtype, Limits, check_options

Estimator = Literal["reinmax", "ste", "gumbel"]
Residual = Literal["independent", "shared"]

CHOICES: dict[str, tuple[str, ...]] = {
    "estimator": ("reinmax", "ste", "gumbel"),
    "residual": ("independent", "shared"),
    "compute_dtype": COMPUTE_DTYPES,
}
_COUNT = "a whole number of at least 1"
_POSITIVE = "a number above 0"
_LIMITS: Limits = {
    "steps": (_COUNT, lambda x: x >= 1),
    "further_steps": (_COUNT, lambda x: x >= 1),
    "batch_size": (_COUNT, lambda x: x >= 1),
    "length": (_COUNT, lambda x: x >= 1),
    "draws": (_COUNT, lambda x: x >= 1),
    "learning_rate": (_POSITIVE, lambda x: x > 0),
    "decay": ("a share from 0 to 1", lambda x: 0 <= x <= 1),
    "weight_decay": ("a number of at least 0", lambda x: x >= 0),
    "clip": (_POSITIVE, lambda x: x > 0),
    "penalty": (_POSITIVE, lambda x: x > 0),
    "ramp": ("a share from 0 to 1", lambda x: 0 <= x <= 1),
    "settle": ("a share from 0 to 1", lambda x: 0 <= x <= 1),
    "align": (_COUNT, lambda x: x >= 1),
    "seed": ("a whole number from 0 to 2^63 - 1", lambda x: 0 <= x < 2**63),
    "eval_windows": ("a whole number of at least 0", lambda x: x >= 0),
    "eval_every": (_COUNT, lambda x: x >= 1),
    "checkpoint_every": (_COUNT, lambda x: x >= 1),
}
_FLOATS = {
    "learning_rate", "decay", "weight_decay", "clip", "penalty", "ramp", "settle",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """Options of one search.

    Attributes:
        remove: shares of the parameters of the decoder's linears to remove; they are searched for
            in increasing order, each from where the one before ended.
        steps: optimiser steps for the least share.
        further_steps: optimiser steps for each share after it; None: two thirds of `steps`.
        batch_size: windows of text computed together.
        length: tokens of a window.
        draws: of masks for a window, each for a stretch of it, all as long. One step then tries
            many masks, and still sees what they do to attention over the whole window.
        learning_rate: AdamW's, of the hypernetwork.
        decay: share of each share's steps, at their end, in which the rate falls as a line to 0.
        weight_decay: AdamW's.
        clip: largest norm of a step's gradient; larger ones are scaled down.
        penalty: weight of the log of kept over wanted parameters (the paper's lambda).
        ramp: share of each share's steps in which the wanted number goes down as a line.
        settle: share of each share's steps, at their end, for which widths are fixed at multiples
            of `align` that meet the target, so that only the choice of channels is still learnt.
        estimator: gradient of the binary masks: "reinmax", "ste" (straight through), or "gumbel",
            the published code's soft masks.
        residual: "independent": each block chooses the channels of the residual stream that it
            reads and writes; "shared": one set for all of them (dimension-dependent pruning).
        align: widths are multiples of this.
        compute_dtype: of the base's matrix products; "auto" is bfloat16 where it is faster.
        gradient_checkpointing: compute each layer again for the gradient: a quarter more time, a
            small part of the memory.
        seed: of the hypernetwork, the windows and the masks.
        eval_windows: most windows held out at the end of the text; at most a tenth of it is.
        eval_every: steps between evaluations; there is one for each share in any case.
        checkpoint_every: steps between checkpoints.

    Raises:
        ValueError: an option is out of range.
    """

    remove: tuple[float, ...] = (0.3,)
    steps: int = 150
    further_steps: int | None = None
    batch_size: int = 1
    length: int = 1024
    draws: int = 4
    learning_rate: float = 5e-3
    decay: float = 0.2
    weight_decay: float = 0.0
    clip: float = 1.0
    penalty: float = 6.0
    ramp: float = 0.5
    settle: float = 0.3
    estimator: Estimator = "reinmax"
    residual: Residual = "independent"
    align: int = 64
    compute_dtype: ComputeDtype = "auto"
    gradient_checkpointing: bool = False
    seed: int = 0
    eval_windows: int = 8
    eval_every: int = 100
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        shares = tuple(self.remove) if isinstance(self.remove, (tuple, list)) else (self.remove,)
        object.__setattr__(self, "remove", shares)
        are_fine = all(isinstance(x, float) and 0 < x < 1 for x in shares)
        if not shares or not are_fine or len(set(shares)) < len(shares):
            raise ValueError(
                f"remove must be different shares between 0 and 1, at least one, got {shares!r}"
            )
        is_given = self.further_steps is not None
        limits = {k: v for k, v in _LIMITS.items() if k != "further_steps" or is_given}
        check_options(self, limits, _FLOATS, CHOICES)
        if self.length % self.draws:
            raise ValueError(f"draws must divide length, {self.length}, got {self.draws}")

    @property
    def share_steps(self) -> tuple[int, ...]:
        """Optimiser steps of each share, in increasing order of the shares."""
        further = self.further_steps or max(1, 2 * self.steps // 3)
        return (self.steps,) + (further,) * (len(self.remove) - 1)

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole search."""
        return sum(self.share_steps)

    def rate_factor(self, step: int, num_steps: int) -> float:
        """Return what the learning rate is multiplied by at a step of a share, counted from 0."""
        left = 1 - step / num_steps
        return min(1.0, left / self.decay) if self.decay else 1.0

    def target(self, step: int, num_steps: int, *, before: float, wanted: float) -> float:
        """Return the share to keep at a step, counted from 0, on the way from one to the next."""
        ramp = self.ramp * num_steps
        return wanted if step + 1 >= ramp else before + (wanted - before) * (step + 1) / ramp

    def settles_after(self, num_steps: int) -> int:
        """Return how many of a share's steps leave the widths free."""
        return max(1, num_steps - int(self.settle * num_steps))

    def as_fields(self) -> dict[str, Any]:
        """Return every option by name, as JSON values."""
        return asdict(self) | {"remove": list(self.remove)}
