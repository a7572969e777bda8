"""Dataclass fields that know their own description, type and range.

One definition of each option: validation, JSON Schema and help texts are generated from it.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

Kind = Literal["number", "integer", "boolean", "choice", "token_ids", "strings", "token_biases"]

MAX_TOKEN_ID = 2**31 - 1


class ParameterError(ValueError):
    """A sampling parameter is out of range, of the wrong type or unknown.

    Attributes:
        param: the field as a request spells it, for example `top_p` or `decoding.a`.
    """

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(message)
        self.param = param


MAX_TOKEN_IDS = 2**16


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """What a value of one field may be.

    Attributes:
        description: one sentence for help and schema.
        kind: type of the value as JSON sees it.
        minimum, maximum: inclusive range of a number or integer, of each bias of `token_biases`.
        is_minimum_excluded: the minimum itself is not allowed.
        is_optional: None is allowed.
        choices: allowed values of a `choice`.
        max_items: longest list of `strings` or `token_ids`.
        max_chars: longest string of `strings`.
    """

    description: str
    kind: Kind
    minimum: float | None = None
    maximum: float | None = None
    is_minimum_excluded: bool = False
    is_optional: bool = False
    choices: tuple[str, ...] = ()
    max_items: int = MAX_TOKEN_IDS
    max_chars: int | None = None

    @property
    def allowed(self) -> str:
        """What is allowed, in words that follow "must be"."""
        text = self._allowed_value()
        return f"{text} or null" if self.is_optional else text

    def _allowed_value(self) -> str:
        span = _describe_range(self)
        if self.kind == "number":
            return f"a finite number{span}"
        if self.kind == "integer":
            return f"an integer{span}"
        if self.kind == "boolean":
            return "true or false"
        if self.kind == "choice":
            return "one of " + ", ".join(repr(choice) for choice in self.choices)
        if self.kind == "token_ids":
            ids = f"token ids (integers from 0 to {MAX_TOKEN_ID})"
            return f"a list of at most {self.max_items} {ids}"
        if self.kind == "strings":
            return f"a list of at most {self.max_items} strings of 1 to {self.max_chars} characters"
        return f"a map from token ids (integers from 0 to {MAX_TOKEN_ID}) to numbers{span}"


def _describe_range(option: Option) -> str:
    low, high = option.minimum, option.maximum
    if low is None and high is None:
        return ""
    if high is None:
        return f" {'greater than' if option.is_minimum_excluded else 'of at least'} {low:g}"
    assert low is not None
    texts = [f"{bound:g}" if abs(bound) < 1e6 else str(int(bound)) for bound in (low, high)]
    return f" {'above' if option.is_minimum_excluded else 'from'} {texts[0]} to {texts[1]}"


def option(default: object, description: str, kind: Kind, **limits: Any) -> Any:
    """Return a dataclass field that carries an `Option`.

    Args:
        default: the field's default; the only copy of it.
        description: one sentence.
        kind: type of the value.
        limits: further fields of `Option`.
    """
    metadata = {"option": Option(description=description, kind=kind, **limits)}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def options_of(cls: type) -> dict[str, tuple[Option, object]]:
    """Return (option, default) of each field of a dataclass that was made with `option`."""
    found: dict[str, tuple[Option, object]] = {}
    for field in dataclasses.fields(cls):
        if "option" in field.metadata:
            factory = field.default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            found[field.name] = (field.metadata["option"], default)
    return found


def check_options(instance: object, *, prefix: str = "") -> None:
    """Check and normalise every option of a frozen dataclass instance, in `__post_init__`.

    Integers given for numbers become floats, lists become tuples, maps are copied.

    Raises:
        ParameterError: a value is not allowed; `param` is `prefix` + the field's name.
    """
    for name, (spec, _) in options_of(type(instance)).items():
        value = getattr(instance, name)
        normal = _normalise(spec, value)
        if normal is _REFUSED:
            param = prefix + name
            raise ParameterError(
                f"{param} must be {spec.allowed}, got {_shorten(value)}", param=param
            )
        object.__setattr__(instance, name, normal)


_REFUSED = object()


def _normalise(spec: Option, value: object) -> object:
    """Return the value in its stored form, or `_REFUSED`."""
    if value is None:
        return None if spec.is_optional else _REFUSED
    if spec.kind == "number":
        return _normalise_number(spec, value)
    if spec.kind == "integer":
        return value if _is_integer(value) and _is_in_range(spec, cast(int, value)) else _REFUSED
    if spec.kind == "boolean":
        return value if isinstance(value, bool) else _REFUSED
    if spec.kind == "choice":
        return value if isinstance(value, str) and value in spec.choices else _REFUSED
    if spec.kind == "token_biases":
        return _normalise_biases(spec, value)
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        return _REFUSED
    if len(value) > spec.max_items:
        return _REFUSED
    if spec.kind == "token_ids":
        return tuple(value) if all(map(_is_token_id, value)) else _REFUSED
    assert spec.max_chars is not None
    longest = spec.max_chars
    is_good = all(isinstance(text, str) and 1 <= len(text) <= longest for text in value)
    return tuple(value) if is_good else _REFUSED


def _normalise_number(spec: Option, value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _REFUSED
    return float(value) if _is_in_range(spec, value) else _REFUSED


def _normalise_biases(spec: Option, value: object) -> object:
    if not isinstance(value, Mapping) or not all(map(_is_token_id, value)):
        return _REFUSED
    biases = {token_id: _normalise_number(spec, bias) for token_id, bias in value.items()}
    return _REFUSED if _REFUSED in biases.values() else biases


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_token_id(value: object) -> bool:
    return _is_integer(value) and 0 <= cast(int, value) <= MAX_TOKEN_ID


def _is_in_range(spec: Option, value: float) -> bool:
    if isinstance(value, float) and not math.isfinite(value):
        return False
    if spec.maximum is not None and value > spec.maximum:
        return False
    if spec.minimum is None:
        return True
    return value > spec.minimum if spec.is_minimum_excluded else value >= spec.minimum


def _shorten(value: object) -> str:
    text = repr(value[:80] if isinstance(value, list | tuple) else value)
    return text if len(text) <= 80 else text[:77] + "..."


def schema_of(spec: Option, default: object) -> dict[str, object]:
    """Return the JSON Schema of one option."""
    types: dict[str, str] = {"choice": "string", "token_ids": "array", "strings": "array"}
    json_type: object = types.get(spec.kind, spec.kind)
    schema: dict[str, object] = {"description": spec.description}
    schema["type"] = [json_type, "null"] if spec.is_optional else json_type
    if spec.kind in ("number", "integer"):
        if spec.minimum is not None:
            key = "exclusiveMinimum" if spec.is_minimum_excluded else "minimum"
            schema[key] = spec.minimum
        if spec.maximum is not None:
            schema["maximum"] = spec.maximum
    elif spec.kind == "choice":
        schema["enum"] = list(spec.choices)
    elif spec.kind == "token_ids":
        schema["items"] = {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID}
        schema["maxItems"] = spec.max_items
    elif spec.kind == "strings":
        schema["items"] = {"type": "string", "minLength": 1, "maxLength": spec.max_chars}
        schema["maxItems"] = spec.max_items
    elif spec.kind == "token_biases":
        schema["type"] = "object"
        schema["additionalProperties"] = {
            "type": "number",
            "minimum": spec.minimum,
            "maximum": spec.maximum,
        }
    schema["default"] = list(default) if isinstance(default, tuple) else default
    return schema
