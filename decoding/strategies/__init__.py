"""Decoding strategies: how a request's distribution is changed from token to token.

A new strategy is one file here and one line in `STRATEGIES`.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from decoding.options import ParameterError, options_of, schema_of
from decoding.strategies.adapt import Adapt
from decoding.strategies.base import (
    CheckedStrategy,
    Controller,
    LookAhead,
    PlainController,
    Strategy,
)
from decoding.strategies.dry import Dry
from decoding.strategies.dynatemp import DynaTemp
from decoding.strategies.edt import Edt
from decoding.strategies.fixed import Fixed
from decoding.strategies.learned import Learned
from decoding.strategies.look_ahead import LookAheadStrategy
from decoding.strategies.mirostat import Mirostat2
from decoding.strategies.plan_first import PlanFirst
from decoding.strategies.shaping import Shape, ShapedText, Shaper
from decoding.strategies.top_n_sigma import TopNSigma
from decoding.strategies.xtc import Xtc

__all__ = [
    "STRATEGIES",
    "Adapt",
    "Controller",
    "Dry",
    "DynaTemp",
    "Edt",
    "Fixed",
    "Mirostat2",
    "PlanFirst",
    "PlainController",
    "LookAheadStrategy",
    "LookAhead",
    "Learned",
    "CheckedStrategy",
    "Shape",
    "ShapedText",
    "Shaper",
    "Strategy",
    "TopNSigma",
    "Xtc",
    "parse_strategy",
    "strategy_schema",
]

STRATEGIES: Mapping[str, type[Strategy]] = {
    Fixed.name: Fixed,
    Adapt.name: Adapt,
    DynaTemp.name: DynaTemp,
    Edt.name: Edt,
    TopNSigma.name: TopNSigma,
    Xtc.name: Xtc,
    Dry.name: Dry,
    Mirostat2.name: Mirostat2,
    Learned.name: Learned,
    LookAheadStrategy.name: LookAheadStrategy,
    PlanFirst.name: PlanFirst,
}


def parse_strategy(value: object) -> Strategy:
    """Build a strategy from a request's `decoding` object.

    Args:
        value: a mapping with the strategy's name under "strategy" and any of its fields.

    Raises:
        ParameterError: not a mapping, an unknown strategy or field, or a bad value; `param` is
            `decoding` or `decoding.<field>`.
    """
    if not isinstance(value, Mapping):
        raise ParameterError(
            f"decoding must be an object with a strategy's name under 'strategy', got {value!r}",
            param="decoding",
        )
    name = value.get("strategy")
    known = ", ".join(sorted(STRATEGIES))
    if not isinstance(name, str) or name not in STRATEGIES:
        raise ParameterError(
            f"decoding.strategy must be one of {known}, got {name!r}", param="decoding.strategy"
        )
    cls: Any = STRATEGIES[name]
    fields = {key: item for key, item in value.items() if key != "strategy"}
    allowed = options_of(cls)
    for key in fields:
        if key not in allowed:
            names = ", ".join(allowed) or "none"
            raise ParameterError(
                f"decoding.{key} is not a parameter of the strategy {name}; its parameters: "
                f"{names}",
                param=f"decoding.{key}",
            )
    strategy: Strategy = cls(**fields)
    return strategy


def strategy_schema(cls: type[Strategy]) -> dict[str, object]:
    """Return the JSON Schema of a strategy's `decoding` object."""
    properties: dict[str, object] = {
        "strategy": {"description": "Name of the strategy.", "type": "string", "const": cls.name}
    }
    for name, (spec, default) in options_of(cls).items():
        properties[name] = schema_of(spec, default)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": cls.name,
        "description": inspect.getdoc(cls) or "",
        "type": "object",
        "properties": properties,
        "required": ["strategy"],
        "additionalProperties": False,
    }
