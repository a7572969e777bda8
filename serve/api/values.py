"""Values of the requests' fields: what is accepted, as which Python value, with which schema."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, WithJsonSchema

from serve.experiments.comparison import BOTH_BAD, TIE

_MAX_METADATA = 16


def _check_stop(value: object) -> object:
    if isinstance(value, str):
        return [value]
    if value is None or (isinstance(value, list) and all(isinstance(v, str) for v in value)):
        return value
    raise ValueError("must be a string or a list of strings")


def _check_token_ids(value: object) -> object:
    if value is None or (isinstance(value, list) and all(type(v) is int for v in value)):
        return value
    raise ValueError("must be a list of token ids")


def _check_logit_bias(value: object) -> object:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError("must be an object from token ids to numbers")
    biases = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise ValueError("must have token ids as keys")
        if type(bias) not in (int, float):
            raise ValueError("must have numbers as values")
        biases[int(key)] = bias
    return biases


def _check_metadata(value: object) -> object:
    if value is not None and not (
        isinstance(value, dict)
        and len(value) <= _MAX_METADATA
        and all(isinstance(item, str) for item in value.values())
    ):
        raise ValueError(f"must be an object with at most {_MAX_METADATA} strings")
    return value


def _check_prompt(value: object) -> object:
    """Return a list of prompts, each a string or a list of token ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        if value and all(type(item) is int for item in value):
            return [value]
        if all(
            isinstance(item, str)
            or (isinstance(item, list) and all(type(token) is int for token in item))
            for item in value
        ):
            return value
    raise ValueError("must be a string, a list of strings, token ids, or a list of token id lists")


def _check_one_prompt(value: object) -> object:
    if isinstance(value, str) or (
        isinstance(value, list) and all(type(item) is int for item in value)
    ):
        return value
    raise ValueError("must be a string or a list of token ids")


def _check_vote(value: object) -> object:
    if type(value) is int or value in (TIE, BOTH_BAD):
        return value
    raise ValueError(f"must be the index of an arm, {TIE!r} or {BOTH_BAD!r}")


_TOKEN_IDS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_PROMPT_IDS_SCHEMA = {**_TOKEN_IDS_SCHEMA, "minItems": 1}
_TEXT_SCHEMA = {"type": "string", "minLength": 1}
StopTexts = Annotated[
    Any,
    BeforeValidator(_check_stop),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {"type": "null"},
            ]
        }
    ),
]
TokenIds = Annotated[Any, BeforeValidator(_check_token_ids), WithJsonSchema(_TOKEN_IDS_SCHEMA)]
MaybeTokenIds = Annotated[
    Any,
    BeforeValidator(_check_token_ids),
    WithJsonSchema({**_TOKEN_IDS_SCHEMA, "type": ["array", "null"]}),
]
LogitBias = Annotated[
    Any,
    BeforeValidator(_check_logit_bias),
    WithJsonSchema(
        {
            "type": ["object", "null"],
            "propertyNames": {"pattern": "^[0-9]{1,10}$"},
            "additionalProperties": {"type": "number"},
        }
    ),
]
Metadata = Annotated[
    Any,
    BeforeValidator(_check_metadata),
    WithJsonSchema(
        {
            "type": ["object", "null"],
            "maxProperties": _MAX_METADATA,
            "additionalProperties": {"type": "string"},
        }
    ),
]
Prompt = Annotated[
    Any,
    BeforeValidator(_check_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                _TEXT_SCHEMA,
                {"type": "array", "items": _TEXT_SCHEMA, "minItems": 1},
                _PROMPT_IDS_SCHEMA,
                {"type": "array", "items": _PROMPT_IDS_SCHEMA, "minItems": 1},
            ]
        }
    ),
]
VoteValue = Annotated[
    Any,
    BeforeValidator(_check_vote),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"enum": [TIE, BOTH_BAD]}]}),
]
OnePrompt = Annotated[
    Any,
    BeforeValidator(_check_one_prompt),
    WithJsonSchema({"anyOf": [_TEXT_SCHEMA, _PROMPT_IDS_SCHEMA]}),
]


def _check_content(value: object) -> object:
    """Join text parts by newlines; refuse other parts without looking into them."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string or a list of text parts")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise ValueError("must have text parts only; images, audio and files are not supported")
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError("must have parts with a type and a text")
        texts.append(part["text"])
    return "\n".join(texts)


def _check_role(value: object) -> object:
    if value in ("tool", "function"):
        raise ValueError("must not be 'tool' or 'function': tools are not supported")
    return "system" if value == "developer" else value


def _check_nothing(value: object) -> None:
    if value not in (None, [], {}):
        raise ValueError("is not supported")


Content = Annotated[
    str,
    BeforeValidator(_check_content),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        "required": ["type", "text"],
                    },
                },
            ]
        }
    ),
]
Role = Annotated[
    Literal["system", "user", "assistant"],
    BeforeValidator(_check_role),
    WithJsonSchema({"enum": ["system", "developer", "user", "assistant"]}),
]
# What the openai client's own message objects hold when nothing is in it.
Nothing = Annotated[Any, BeforeValidator(_check_nothing), WithJsonSchema({"type": "null"})]
