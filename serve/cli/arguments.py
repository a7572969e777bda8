"""What the commands' parsers share: options from a dataclass, messages, the decoding argument."""

import argparse
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from client.errors import RequestError
from serve.environment import environment_name
from serve.options import FLAG, Option

REQUEST_FLAGS = (
    ("--temperature", float, "T", "0 always takes the most likely token"),
    ("--top-p", float, "P", "keep the most likely tokens that together have this probability"),
    ("--top-k", int, "K", "keep this many of the most likely tokens; 0 keeps all"),
    ("--min-p", float, "P", "drop tokens less likely than this share of the most likely one"),
    ("--seed", int, "N", "the same seed gives the same text"),
    ("--adapter-scale", float, "S", "how much of the adapter, 0 to 1; 0 is the base, exactly"),
)


class UserError(ValueError):
    """What was asked for cannot be done; the message ends the command with status 2."""


class CommandError(RuntimeError):
    """The command was right but failed; the message ends it with status 1."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keep the layout of descriptions and examples; leave room for long flags."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=96)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", HelpFormatter)
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"proa: error: {message} (see {self.prog} --help)\n")


def add_run_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    """Declare what every run that leaves something in a folder is told.

    Args:
        parser: of the command.
        what: it makes, for people.
    """
    group = parser.add_argument_group("Run")
    group.add_argument(
        "--output", metavar="DIR", type=Path, required=True, help="folder for everything written"
    )
    group.add_argument("--resume", action="store_true", help="go on with the run in DIR")
    group.add_argument(
        "--description", metavar="TEXT", default="", help=f"a line about the {what}, kept in it"
    )


def add_options(parser: argparse.ArgumentParser, options: Mapping[str, Option]) -> None:
    """Add a flag for each option, in groups; what is not given stays out of the namespace."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for declared in options.values():
        group = groups.get(declared.group)
        if group is None:
            group = groups[declared.group] = parser.add_argument_group(declared.group)
        settings: dict[str, Any] = {"default": argparse.SUPPRESS, "help": describe(declared)}
        if declared.is_positional:
            group.add_argument(declared.name, nargs="?", metavar=declared.name.upper(), **settings)
        elif declared.kind is FLAG:
            group.add_argument(declared.flag, action=argparse.BooleanOptionalAction, **settings)
        elif declared.is_repeatable:
            metavar = declared.kind.metavar
            group.add_argument(declared.flag, action="append", metavar=metavar, **settings)
        else:
            metavar = "{" + ",".join(declared.choices) + "}" if declared.choices else ""
            group.add_argument(declared.flag, metavar=metavar or declared.kind.metavar, **settings)


def describe(declared: Option) -> str:
    """Return an option's help with its default and its environment variable."""
    facts = f"[default: {declared.default_text()}; env: {environment_name(declared.name)}]"
    return f"{declared.help} {facts}".replace("%", "%%")


def given_options(arguments: argparse.Namespace, options: Mapping[str, Option]) -> dict[str, Any]:
    """Pick the options that were given out of the parsed arguments."""
    return {name: value for name, value in vars(arguments).items() if name in options}


def add_request_arguments(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    """Add the sampling flags; they are sent as they are and checked where requests are checked."""
    group = parser.add_argument_group("Sampling")
    group.add_argument(
        "--decoding",
        metavar="NAME|JSON",
        help="decoding strategy: a name (fixed, adapt, ...) or an object such as "
        '\'{"strategy": "adapt", "a": 1.0, "b": 0.3}\'; GET /v1/decoding_strategies describes them',
    )
    group.add_argument(
        "--max-tokens",
        type=int,
        default=max_tokens,
        metavar="N",
        help=f"longest answer in tokens [default: {max_tokens}]",
    )
    for flag, kind, metavar, text in REQUEST_FLAGS:
        group.add_argument(flag, type=kind, metavar=metavar, help=text)
    group.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="end the answer before this text; may be given several times",
    )


def request_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the request fields the sampling flags stand for."""
    fields: dict[str, Any] = {"max_tokens": arguments.max_tokens}
    for flag, *_ in REQUEST_FLAGS:
        name = flag[2:].replace("-", "_")
        value = getattr(arguments, name)
        if value is not None:
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{flag}: {value} is not a finite number")
            fields[name] = value
    if arguments.stop:
        fields["stop"] = arguments.stop
    if arguments.decoding is not None:
        fields["decoding"] = parse_decoding(arguments.decoding)
    return fields


def parse_decoding(text: str) -> dict[str, Any]:
    """Turn the argument of --decoding into the request's `decoding` object.

    Args:
        text: a strategy's name, or a JSON object with its parameters.

    Raises:
        UserError: it is neither.
    """
    if not text.lstrip().startswith("{"):
        if not text.strip():
            raise UserError("--decoding: give a strategy's name or a JSON object")
        return {"strategy": text.strip()}
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"--decoding: not a JSON object: {error}") from None
    if "strategy" not in content:
        raise UserError('--decoding: the object needs a "strategy", for example "adapt"')
    assert isinstance(content, dict)
    return content


def explain(error: RequestError) -> str:
    """Return what a server's refusal means to somebody in a terminal, on one line."""
    hint = " (give --api-key or set PROA_API_KEY)" if error.status == 401 else ""
    return f"{printable(error)}{hint}" + (
        "" if error.status is None else f" [status {error.status}]"
    )


def printable(text: object) -> str:
    """Return text of a file or a server without what a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def say(message: str) -> None:
    """Print a line about progress on the standard error output."""
    print(f"proa: {message}", file=sys.stderr, flush=True)
