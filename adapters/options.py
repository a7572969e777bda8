"""Options of runs: what every method checks alike, without torch."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, TypeAlias

ComputeDtype = Literal["auto", "float32", "bfloat16"]
COMPUTE_DTYPES: tuple[str, ...] = ("auto", "float32", "bfloat16")
Limits: TypeAlias = Mapping[str, tuple[str, Callable[[Any], bool]]]


def check_options(
    config: object,
    limits: Limits,
    floats: Collection[str],
    choices: Mapping[str, Collection[str]],
) -> None:
    """Hold the options of a run against their limits.

    Args:
        config: has them as attributes.
        limits: what is allowed, in words and as a test, of each number.
        floats: the numbers that need not be whole.
        choices: what is allowed of each of the others.

    Raises:
        ValueError: names the first option that is out of range.
    """
    for name, (allowed, is_fine) in limits.items():
        value = getattr(config, name)
        kinds = (int, float) if name in floats else (int,)
        is_number = isinstance(value, kinds) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or not is_fine(value):
            raise ValueError(f"{name} must be {allowed}, got {value!r}")
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise ValueError(
                f"{name} must be one of {', '.join(known)}, got {getattr(config, name)!r}"
            )
