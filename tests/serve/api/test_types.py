"""Wrong kinds of values in every field: refused by name or honoured, never a server error."""

import json
from typing import Any

import pytest

from decoding import SamplingParams
from decoding.options import options_of
from serve.api.schema import (
    UNSUPPORTED_FIELDS,
    ChatBody,
    CompareBody,
    ComparisonArm,
    CompletionBody,
)

from .conftest import Client, check_error

VALUES: dict[str, str] = {
    "zero": "0",
    "minus-one": "-1",
    "billion": "1000000000",
    "2-31": str(2**31),
    "2-63": str(2**63),
    "minus-2-63": str(-(2**63)),
    "2-64": str(2**64),
    "huge-integer": "1" + "0" * 400,
    "huge-float": "1e308",
    "overflow": "1e999",
    "minus-overflow": "-1e999",
    "tiny": "1e-320",
    "minus-zero": "-0.0",
    "string": '"5"',
    "nan-string": '"NaN"',
    "true": "true",
    "false": "false",
    "list": "[]",
    "object": "{}",
    "nested": '[{"a": [null]}]',
}
CHAT = {"model": "smollm2", "messages": [{"role": "user", "content": "hi"}]}
COMPARISON = {"messages": [{"role": "user", "content": "hi"}], "arms": [{"model": "smollm2"}]}
COMPLETION = {"model": "smollm2", "prompt": "the fox"}
NUMBERS = [
    *(
        n
        for n, (spec, _) in options_of(SamplingParams).items()
        if spec.kind in ("number", "integer")
    ),
    "n",
    "max_completion_tokens",
    "top_logprobs",
]
NUMBERS.remove("logprobs")  # a boolean in chat


def splice(body: dict[str, Any], field: str, value: str) -> bytes:
    """Return the body with a field's value given as JSON text."""
    rest = {name: item for name, item in body.items() if name != field}
    return json.dumps(rest)[:-1].encode() + f', "{field}": {value}}}'.encode()


@pytest.mark.parametrize("field", sorted(ChatBody.model_fields))
def test_chat_field_of_any_kind_is_no_server_error(client: Client, field: str) -> None:
    for value in VALUES.values():
        response = client.post("/v1/chat/completions", content=splice(CHAT, field, value))
        check_outcome(response, field)


@pytest.mark.parametrize("field", sorted(CompletionBody.model_fields))
def test_completion_field_of_any_kind_is_no_server_error(client: Client, field: str) -> None:
    for value in VALUES.values():
        response = client.post("/v1/completions", content=splice(COMPLETION, field, value))
        check_outcome(response, field)


@pytest.mark.parametrize("field", sorted(CompareBody.model_fields))
def test_comparison_field_of_any_kind_is_no_server_error(client: Client, field: str) -> None:
    for value in VALUES.values():
        response = client.post("/v1/compare", content=splice(COMPARISON, field, value))
        check_outcome(response, field)


@pytest.mark.parametrize("field", sorted(ComparisonArm.model_fields))
def test_arm_field_of_any_kind_is_no_server_error(client: Client, field: str) -> None:
    for value in VALUES.values():
        arm = splice({"model": "smollm2", "label": "a"}, field, value)
        data = b'{"prompt": "the fox", "arms": [%s]}' % arm
        check_outcome(client.post("/v1/compare", content=data), field)


def check_outcome(response: Any, field: str) -> None:
    if response.status_code != 200:
        assert response.status_code in (400, 404)
        param = response.json()["error"]["param"]
        assert param is not None
        assert field in param or field == "stop_token_ids"
        check_error(response, response.status_code, param=param)


@pytest.mark.parametrize("field", NUMBERS)
def test_number_of_another_type_is_refused(client: Client, field: str) -> None:
    for value in ("string", "true", "list", "object", "overflow", "nested"):
        data = splice(CHAT, field, VALUES[value])
        check_error(client.post("/v1/chat/completions", content=data), 400, param=field)


@pytest.mark.parametrize("field", sorted(set(ChatBody.model_fields) - {"messages"}))
def test_null_counts_as_unset_in_chat(client: Client, field: str) -> None:
    assert client.chat(**{field: None}).status_code == 200


@pytest.mark.parametrize("field", sorted(set(CompletionBody.model_fields) - {"prompt"}))
def test_null_counts_as_unset_in_completions(client: Client, field: str) -> None:
    assert client.complete(**{field: None}).status_code == 200


@pytest.mark.parametrize("field", sorted(UNSUPPORTED_FIELDS))
def test_unsupported_field_is_accepted_where_it_asks_for_nothing(
    client: Client, field: str
) -> None:
    for value in UNSUPPORTED_FIELDS[field]:
        assert client.chat(**{field: value}).status_code == 200
    response = client.chat(**{field: {"type": "something"}})
    check_error(response, 400, param=field, code="unsupported_field")


def test_published_defaults_are_those_of_the_parameters() -> None:
    published = CompletionBody.model_json_schema()["properties"]
    for name, (spec, default) in options_of(SamplingParams).items():
        if name == "max_tokens":
            continue
        expected = list(default) if isinstance(default, tuple) else default
        assert published[name]["default"] == expected
        assert published[name]["description"] == spec.description
