"""Factors as they are stored and computed: in 16 bits, in 8, or 4 bits and 8."""

from collections.abc import Mapping

from torch import Tensor

from adapters.mixed_rank.compress_config import Form
from adapters.mixed_rank.factors import refit_left
from adapters.mixed_rank.moments import Moments
from models.q4_1 import quantize_q4_1
from models.q8_0 import quantize_q8_0
from models.weights import Matrix, dense

KINDS: Mapping[Form, tuple[str | None, str | None]] = {
    "float16": (None, None), "int8": ("Q8_0", "Q8_0"), "int4": ("Q8_0", "Q4_1"),
}  # fmt: skip
"""Block formats that the left factors and the right one are stored in; None: in float16."""


def quantize_factors(
    left: Tensor, right: Tensor, form: Form, moments: Moments
) -> tuple[Matrix, Matrix]:
    """Round two factors so that little of what they make of their inputs is lost.

    The right one is rounded first; the left one is then fitted to it, and rounded. In "int4" the
    right one has 4 bits and the left one, which can still make up for that, has 8.

    Args:
        left, right: (m, R) and (R, n).
        form: what to round them to.
        moments: of the inputs, with the outputs that are to be met.

    Returns:
        The same two as they will be computed with.
    """
    if form == "float16":
        return left.half(), right.half()
    rounded = quantize_q8_0(right) if form == "int8" else quantize_q4_1(right.float())
    return quantize_q8_0(refit_left(dense(rounded), moments)), rounded
