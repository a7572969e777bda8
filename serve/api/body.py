"""Read, parse and validate request bodies."""

import difflib
import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from serve.api.context import run_work
from serve.api.errors import ApiError
from serve.api.schema import UNSUPPORTED_FIELDS, WireModel
from serve.api.settings import ApiSettings

_MAX_DEPTH = 32
_MAX_NESTED = 2**15
_MAX_VALUES = 2**20
_MAX_KEYS = 4096
_MAX_ERRORS = 5
_MAX_NAME_CHARS = 64

_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"')

Model = TypeVar("Model", bound=WireModel)


async def read_request(request: Request, model: type[Model], settings: ApiSettings) -> Model:
    """Return the validated body of a request.

    Raises:
        ApiError: the body is no JSON object, or breaks the schema.
        ClientDisconnect: the client left.
    """
    data = await request.body()
    return await run_work(lambda: validate(parse_json(data), model, settings), size=len(data))


def parse_json(data: bytes) -> dict[str, Any]:
    """Parse a JSON object strictly.

    Raises:
        ApiError: not UTF-8, not JSON, not an object, NaN or Infinity, a key given twice, nested too
            deeply, or text that is no Unicode.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise _bad_json(f"not UTF-8 at byte {error.start}") from None
    _check_counts(text)
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_make_object)
    except json.JSONDecodeError as error:
        raise _bad_json(f"{error.msg} at character {error.pos}") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError:  # an integer of thousands of digits
        raise _bad_json("a number has too many digits") from None
    if not isinstance(value, dict):
        raise ApiError("The request body must be a JSON object.", code="invalid_json")
    if text.count("[") + text.count("{") > _MAX_DEPTH:
        _check_depth(value)
    if "\\ud" in text or "\\uD" in text:
        _check_unicode(value)
    return value


def _bad_json(reason: str) -> ApiError:
    return ApiError(f"The request body is not valid JSON: {reason}.", code="invalid_json")


def _too_deep() -> ApiError:
    return ApiError(
        f"The request body is nested more than {_MAX_DEPTH} levels deep.", code="invalid_json"
    )


def _refuse_constant(name: str) -> NoReturn:
    raise _bad_json(f"{name} is no JSON number")


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > _MAX_KEYS:
        raise _bad_json(f"an object has more than {_MAX_KEYS} keys")
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _bad_json(f"key {_shorten(key)!r} is given twice")
            seen.add(key)
    return value


def _check_counts(text: str) -> None:
    """Refuse more lists, objects and values than any request has, before they are made."""
    if max(text.count("[") + text.count("{"), text.count(",")) <= _MAX_NESTED:
        return
    bare = _STRING.sub("", text)
    if bare.count("[") + bare.count("{") > _MAX_NESTED:
        raise _bad_json(f"it has more than {_MAX_NESTED} lists and objects")
    if bare.count(",") > _MAX_VALUES:
        raise _bad_json(f"it has more than {_MAX_VALUES} values")


def _check_depth(value: object) -> None:
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise _too_deep()


def _check_unicode(value: object) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _bad_json("half of a surrogate pair is no character") from None


def validate(value: dict[str, Any], model: type[Model], settings: ApiSettings) -> Model:
    """Return the body as a wire model.

    Raises:
        ApiError: a field is unknown, missing, of the wrong type, or asks for what is not supported.
    """
    for name, neutral in UNSUPPORTED_FIELDS.items():
        if name in value and name not in model.model_fields:
            if not any(value[name] == item and type(value[name]) is type(item) for item in neutral):
                raise ApiError(f"{name} is not supported.", param=name, code="unsupported_field")
            del value[name]
    try:
        return model.model_validate(
            value, extra="ignore" if settings.unknown_fields == "ignore" else "forbid"
        )
    except ValidationError as error:
        raise _to_api_error(error, model) from None


def _to_api_error(error: ValidationError, model: type[BaseModel]) -> ApiError:
    found = error.errors(include_url=False, include_context=False)
    texts = [_describe(item, model) for item in found[:_MAX_ERRORS]]
    if len(found) > _MAX_ERRORS:
        texts.append(f"and {len(found) - _MAX_ERRORS} more errors")
    kind = found[0]["type"]
    code = {"extra_forbidden": "unknown_field", "missing": "missing_field"}.get(kind)
    return ApiError(
        "; ".join(texts) + ".", param=_path(found[0]["loc"]), code=code or "invalid_type"
    )


def _describe(item: Mapping[str, Any], model: type[BaseModel]) -> str:
    path = _path(item["loc"])
    if item["type"] == "extra_forbidden":
        names = list(model.model_fields) if len(item["loc"]) == 1 else []
        near = difflib.get_close_matches(path, names, n=1)
        return f"Unknown field {path!r}" + (f"; did you mean {near[0]!r}" if near else "")
    if item["type"] == "missing":
        return f"{path} is required"
    reason = item["msg"].removeprefix("Value error, ")
    reason = reason.replace("Input should be", "must be", 1)
    return f"{path} {reason}, got {_name_value(item['input'])}"


def _path(loc: tuple[int | str, ...]) -> str:
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{_shorten(part)}"
    return path.removeprefix(".")


def _name_value(value: object) -> str:
    """Return what to call a value in a message; texts are not repeated."""
    match value:
        case None | bool():
            return json.dumps(value)
        case int() | float() if abs(value) >= 1e15:
            return "a huge number"
        case int():
            return f"{value:g}"
        case float():
            return repr(value)  # 1.0 where a whole number is asked for is not 1
        case str():
            return "a string"
        case list():
            return "a list"
    return "an object"


def _shorten(text: str) -> str:
    text = text.encode("ascii", "backslashreplace").decode()
    return text if len(text) <= _MAX_NAME_CHARS else text[: _MAX_NAME_CHARS - 3] + "..."
