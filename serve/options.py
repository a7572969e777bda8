"""Options as dataclass fields: one definition gives default, flag, variable, YAML key and check."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any

from serve import environment

_SIZE_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")


class ConfigError(ValueError):
    """An option has a value it cannot have, or does not exist."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """What the text of an option may be.

    Attributes:
        parse: text to value; raises ValueError.
        types: what a parsed value may be an instance of.
        expected: the allowed values in words, for messages.
        metavar: placeholder in help.
    """

    parse: Callable[[str], Any]
    types: tuple[type, ...]
    expected: str
    metavar: str


def _parse_flag(text: str) -> bool:
    if text.lower() not in _TRUE + _FALSE:
        raise ValueError(text)
    return text.lower() in _TRUE


def _parse_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmg]i?)?b?", text.strip().lower())
    if match is None:
        raise ValueError(text)
    return int(float(match[1]) * _SIZE_UNITS[match[2] or ""])


def _parse_number(text: str) -> float:
    value = float(text)
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError(text)
    return value


def _parse_integer_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


def _parse_origin(text: str) -> str:
    if re.fullmatch(r"https?://[^/?#@\s]+", text) is None:
        raise ValueError(text)
    return text.lower()


TEXT = Kind(parse=str, types=(str,), expected="text", metavar="TEXT")
PATH = Kind(parse=str, types=(str,), expected="a path", metavar="PATH")
NAMED_FOLDER = Kind(parse=str, types=(str,), expected="NAME=DIR", metavar="NAME=DIR")
ORIGIN = Kind(
    parse=_parse_origin,
    types=(str,),
    expected="an origin such as https://app.example",
    metavar="ORIGIN",
)
FLAG = Kind(parse=_parse_flag, types=(bool,), expected="true or false", metavar="BOOL")
INTEGER = Kind(parse=int, types=(int,), expected="a whole number", metavar="N")
SECONDS = Kind(
    parse=_parse_number, types=(float, int), expected="a number of seconds", metavar="SECONDS"
)
BYTES = Kind(
    parse=_parse_bytes,
    types=(int,),
    expected="a size such as 500000, 512KiB or 4MB",
    metavar="SIZE",
)
INTEGER_OR_AUTO = Kind(
    parse=_parse_integer_or_auto,
    types=(int, str),
    expected="a whole number or auto",
    metavar="N|auto",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One option.

    Attributes:
        name: field name; also the key in a YAML file and, with dashes, the flag.
        kind: what its text may be.
        default: its value when nobody sets it.
        help: what it does, one sentence or two.
        group: heading in the help.
        choices: allowed values, or empty for any.
        minimum, maximum: inclusive limits of a number, or None.
        is_repeatable: the value is a tuple; the flag may be given several times.
        is_positional: the command line takes it without a flag.
    """

    name: str
    kind: Kind
    default: Any
    help: str
    group: str
    choices: Collection[str] = ()
    minimum: float | None = None
    maximum: float | None = None
    is_repeatable: bool = False
    is_positional: bool = False

    @property
    def flag(self) -> str:
        """The command line flag."""
        return "--" + self.name.replace("_", "-")

    @property
    def expected(self) -> str:
        """The allowed values in words."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        if self.minimum is not None and self.maximum is not None:
            return f"{self.kind.expected} from {self.minimum:g} to {self.maximum:g}"
        if self.minimum is not None:
            return f"{self.kind.expected}, at least {self.minimum:g}"
        return self.kind.expected

    def as_flag(self) -> "Option":
        """Return the same option, taken from a flag and not from its position."""
        return replace(self, is_positional=False)

    def default_text(self) -> str:
        """The default as a user would write it, or "none"."""
        if self.default is None or self.default == ():
            return "none"
        if isinstance(self.default, tuple):
            return ",".join(self.default)
        if isinstance(self.default, bool):
            return "on" if self.default else "off"
        return str(self.default)

    def parse(self, value: object, spelled: str) -> Any:
        """Turn the text of a flag or a variable, or a YAML value, into a checked value.

        Args:
            value: text, or a YAML scalar; for a repeatable option also a list of them.
            spelled: the option as the user wrote it, for messages.

        Raises:
            ConfigError: the value is of the wrong kind or out of range.
        """
        if self.is_repeatable and isinstance(value, list | tuple):
            return tuple(self._parse_one(item, spelled) for item in value)
        parsed = self._parse_one(value, spelled)
        return (parsed,) if self.is_repeatable else parsed

    def check(self, value: object, spelled: str) -> None:
        """Refuse a value of the wrong type or out of range.

        Raises:
            ConfigError: names the option as spelled, the value and what is allowed.
        """
        if value is None and self.default is None:
            return
        if self.is_repeatable:
            for item in value if isinstance(value, tuple) else (value,):
                self._check_one(item, spelled)
        else:
            self._check_one(value, spelled)

    def _parse_one(self, value: object, spelled: str) -> Any:
        if value is None or isinstance(value, list | tuple | dict):
            raise ConfigError(f"{spelled}: {value!r} is not {self.expected}")
        text = str(value).lower() if isinstance(value, bool) else str(value)
        try:
            parsed = self.kind.parse(text)
        except ValueError:
            raise ConfigError(f"{spelled}: {text!r} is not {self.expected}") from None
        self._check_one(parsed, spelled)
        return parsed

    def _check_one(self, value: object, spelled: str) -> None:
        is_flag = self.kind is FLAG
        is_fit = isinstance(value, self.kind.types) and isinstance(value, bool) == is_flag
        if is_fit and self.choices:
            is_fit = value in self.choices
        elif is_fit and isinstance(value, str) and int in self.kind.types:
            is_fit = value == "auto"
        elif is_fit and isinstance(value, int | float) and not is_flag:
            is_fit = (self.minimum is None or value >= self.minimum) and (
                self.maximum is None or value <= self.maximum
            )
        elif is_fit and value == "":
            is_fit = False
        elif is_fit and self.kind is NAMED_FOLDER:
            is_fit = "" not in str(value).partition("=")
        if not is_fit:
            raise ConfigError(f"{spelled}: {value!r} is not {self.expected}")


def option(
    default: Any,
    help: str,
    *,
    kind: Kind,
    group: str,
    choices: Collection[str] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    is_repeatable: bool = False,
    is_positional: bool = False,
    is_secret: bool = False,
) -> Any:
    """Declare a dataclass field that is an option; arguments as in `Option`.

    A secret's value stays out of the dataclass's repr.
    """
    facts = {
        "kind": kind,
        "help": help,
        "group": group,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
        "is_repeatable": is_repeatable,
        "is_positional": is_positional,
    }
    return field(default=default, repr=not is_secret, metadata={"option": facts})


def option_of(config_class: type, name: str) -> Any:
    """Declare a dataclass field that is the option of another class, in all that it says."""
    (declared,) = (item for item in fields(config_class) if item.name == name)
    return field(default=declared.default, repr=declared.repr, metadata=declared.metadata)


def _to_option(item: Field[Any]) -> Option:
    assert item.default is not MISSING
    return Option(name=item.name, default=item.default, **item.metadata["option"])


def options_of(config_class: type) -> Mapping[str, Option]:
    """Return the options a dataclass declares, by name, in order."""
    return {f.name: _to_option(f) for f in fields(config_class) if "option" in f.metadata}


def read_given(
    options: Mapping[str, Option], arguments: Mapping[str, Any], environ: Mapping[str, str]
) -> dict[str, Any]:
    """Return the values that environment and command line give; the command line wins.

    Args:
        options: those that there are, by name.
        arguments: text (or a list of texts) of the options given on the command line, by name.
        environ: the process environment.

    Raises:
        ConfigError: names the variable or flag at fault.
    """
    values: dict[str, Any] = {}
    for name, text in environment.read_options(environ, options).items():
        value: object = text.split(",") if options[name].is_repeatable else text
        values[name] = options[name].parse(value, environment.environment_name(name))
    for name, text in arguments.items():
        declared = options[name]
        spelled = name.upper() if declared.is_positional else declared.flag
        values[name] = declared.parse(text, spelled)
    return values
