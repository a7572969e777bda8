"""Flags for the fields of a config: it has their defaults, types and limits."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from serve.cli.arguments import UserError

Config = TypeVar("Config")


def add_config_flag(
    group: Any, defaults: object, choices: Mapping[str, Sequence[str]], name: str, metavar: str,
    text: str,
) -> None:  # fmt: skip
    """Declare the flag of a field; what is not given is missing among the arguments.

    Args:
        group: of the parser.
        defaults: a config with the defaults; a field without one is a whole number.
        choices: what the fields that are no numbers can be.
        name: of the field.
        metavar: placeholder of a number.
        text: help, without the default.
    """
    default = getattr(defaults, name)
    settings: dict[str, Any] = {"default": argparse.SUPPRESS}
    settings["help"] = text if default is None else f"{text} [default: {default}]"
    if isinstance(default, bool):
        settings["action"] = argparse.BooleanOptionalAction
        settings["help"] = f"{text} [default: {'on' if default else 'off'}]"
    elif name in choices:
        settings["choices"] = choices[name]
    else:
        kind: Callable[[str], Any] = float if isinstance(default, float) else int
        settings |= {"type": kind, "metavar": metavar}
    group.add_argument(_flag(name), **settings)


def read_config(
    kind: Callable[..., Config], fields: Mapping[str, Any], spelled: Mapping[str, str] | None = None
) -> Config:
    """Make a config of fields.

    Args:
        kind: its class.
        fields: what is given, by name.
        spelled: flags that are not named like their field.

    Raises:
        UserError: one is out of range; it is named as the flag.
    """
    try:
        return kind(**fields)
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise UserError(f"{(spelled or {}).get(name, _flag(name))} {rest}") from None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
