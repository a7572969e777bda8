"""How a model is compressed: every option, with its default and its limits."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from adapters.options import Limits, check_options

Form: TypeAlias = Literal["float16", "int8", "int4"]
Plan: TypeAlias = Literal["mixed", "uniform"]
Calibration: TypeAlias = Literal["exact", "representative", "none"]
Metric: TypeAlias = Literal["loss", "outputs"]

GROUP = 32
"""Inputs that share a scale in 8 and 4 bits: ranks and widths of rounded factors are multiples."""
CHOICES: dict[str, tuple[str, ...]] = {
    "form": ("float16", "int8", "int4"), "plan": ("mixed", "uniform"),
    "calibration": ("exact", "representative", "none"), "metric": ("loss", "outputs"),
}  # fmt: skip
_COUNT = "a whole number of at least 1"
_LIMITS: Limits = {
    "remove": ("a share between 0 and 1", lambda x: 0 < x < 1),
    "rank_step": (_COUNT, lambda x: x >= 1),
    "sequences": (_COUNT, lambda x: x >= 1),
    "length": ("a whole number of at least 2", lambda x: x >= 2),
    "eval_sequences": ("a whole number of at least 0", lambda x: x >= 0),
    "steps": ("a whole number of at least 0", lambda x: x >= 0),
    "learning_rate": ("a number above 0", lambda x: x > 0),
    "checkpoint_every": (_COUNT, lambda x: x >= 1),
    "seed": ("a whole number from 0 to 2^63 - 1", lambda x: 0 <= x < 2**63),
}
_FLOATS = {"remove", "learning_rate"}


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressConfig:
    """Options of one compression.

    Attributes:
        remove: share of the parameters of the decoder's linears to remove.
        form: what the factors are rounded to; "int4" is the right one in 4 bits and the left one,
            fitted to it, in 8.
        plan: "mixed": a rank for each matrix, for the least summed error; "uniform": as large a
            share of every matrix.
        calibration: what the factors are fitted to: the exact covariance of the inputs, the mean
            of the calibration sequences in its place, as the authors do, or nothing: plain SVD.
        metric: "loss": what is lost of outputs counts by what it does to the model's loss, told
            from gradients; "outputs": all of it alike, as a share of each matrix's outputs, as the
            paper has it.
        compensate: make up for what the layers before have lost: by the steps below and, with the
            metric "outputs", by fitting to what a matrix reads in the compressed model. (In terms
            of the loss that fit does harm: it follows the few rows of most energy.)
        steps: of Adam, for each layer, that bring its output near that of the model as it was.
        learning_rate: Adam's, relative to the size of the factors.
        rank_step: ranks are multiples of it.
        sequences: texts to calibrate on.
        length: tokens of each.
        eval_sequences: most texts held out, from the end of the data.
        checkpoint_every: layers between checkpoints.
        seed: of the order of texts in those steps.

    Raises:
        ValueError: an option is out of range.
    """

    remove: float = 0.2
    form: Form = "int8"
    plan: Plan = "mixed"
    calibration: Calibration = "exact"
    metric: Metric = "loss"
    compensate: bool = True
    steps: int = 40
    learning_rate: float = 1e-3
    rank_step: int = 32
    sequences: int = 128
    length: int = 512
    eval_sequences: int = 16
    checkpoint_every: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        check_options(self, _LIMITS, _FLOATS, CHOICES)
        if self.form != "float16" and self.rank_step % GROUP:
            raise ValueError(
                f"rank_step must be a multiple of {GROUP} with form {self.form!r}, got "
                f"{self.rank_step}"
            )
        if self.compensate and self.calibration != "exact":
            raise ValueError(
                f"compensate must be off with calibration {self.calibration!r}: drifted inputs are "
                "known by their exact covariance only"
            )
        if self.metric == "loss" and self.calibration != "exact":
            raise ValueError(
                f"metric must be 'outputs' with calibration {self.calibration!r}, got 'loss'"
            )

    @property
    def fits_drift(self) -> bool:
        """Whether matrices are fitted to what they read in the compressed model."""
        return self.compensate and self.metric == "outputs"

    def as_fields(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)
