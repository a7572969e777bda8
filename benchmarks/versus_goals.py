"""What the comparison with llama.cpp must reach, by the size of the model."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.report import Target

LARGE_PARAMETERS = 300_000_000
MEMORY_PARAMETERS = 1_000_000_000  # below it the interpreter and its libraries outweigh the model


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """A bound of one figure.

    Attributes:
        title: what is measured, for readers.
        required: the bound.
        is_ceiling: the figure must not exceed it; else it must reach it.
        unit: of the figure.
    """

    title: str
    required: float
    is_ceiling: bool = False
    unit: str = "x"


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """What was measured for a goal.

    Attributes:
        value: in the goal's unit.
        detail: the figures it comes from.
    """

    value: float
    detail: str


GOALS = {
    "decode_1": Goal(title="decode, 1 stream", required=1.8),
    "decode_8": Goal(title="decode, 8 streams", required=3.0),
    "decode_32": Goal(title="decode, 32 streams", required=4.0),
    "prefill": Goal(title="prefill, one prompt", required=2.0),
    "bandwidth": Goal(title="decode, 1 stream, of the read bandwidth", required=75.0, unit="%"),
    "of_prefill": Goal(title="decode, 32 streams, of own prefill", required=0.8),
    "sampler": Goal(title="temperature and top_p against greedy", required=0.95),
    "busy_1": Goal(title="beside busy processes, 1 stream", required=1.5),
    "busy_8": Goal(title="beside busy processes, 8 streams", required=1.5),
    "perplexity": Goal(
        title="perplexity, above llama.cpp's by", required=0.1, is_ceiling=True, unit="%"
    ),
    "ready": Goal(title="ready, first start", required=15.0, is_ceiling=True, unit="s"),
    "memory": Goal(
        title="resident memory, of file and keys and values", required=1.35, is_ceiling=True
    ),
}
# From `LARGE_PARAMETERS` on.
LARGE = {"decode_1": 1.3, "decode_8": 2.0, "decode_32": 2.5, "prefill": 1.5}


def bounds_for(num_parameters: int, overrides: Mapping[str, float]) -> dict[str, float]:
    """Return the bounds that a model of some size must reach, by the goals' names.

    Args:
        num_parameters: of the model.
        overrides: bounds to take in place of the table's.
    """
    bounds = {name: goal.required for name, goal in GOALS.items()}
    if num_parameters >= LARGE_PARAMETERS:
        bounds |= LARGE
    if num_parameters < MEMORY_PARAMETERS:
        del bounds["memory"]
    return bounds | overrides


def make_targets(measured: Mapping[str, Figure], bounds: Mapping[str, float]) -> list[Target]:
    """Hold figures against their bounds, in the order of the goals; others have no target."""
    return [
        Target(
            name=goal.title,
            required=bounds[name],
            measured=measured[name].value,
            is_ceiling=goal.is_ceiling,
            unit=goal.unit,
            detail=measured[name].detail,
        )
        for name, goal in GOALS.items()
        if name in bounds and name in measured
    ]


def parse_goal(text: str) -> tuple[str, float]:
    """Parse the argument of --goal.

    Raises:
        ArgumentTypeError: not NAME=NUMBER with the name of a goal.
    """
    name, _, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if name not in GOALS or not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not NAME=NUMBER with a name of {', '.join(GOALS)}"
        )
    return name, number
