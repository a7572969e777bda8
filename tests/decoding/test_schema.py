import json
from dataclasses import fields

import pytest

from decoding import STRATEGIES, strategy_schema


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategy_schema_has_every_field_with_its_default(name):
    cls = STRATEGIES[name]
    schema = strategy_schema(cls)
    properties = dict(schema["properties"])
    assert properties.pop("strategy")["const"] == name == schema["title"]
    assert set(properties) == {field.name for field in fields(cls)}
    for field, described in properties.items():
        default = getattr(cls(), field)
        assert described["default"] == (list(default) if isinstance(default, tuple) else default)
        assert described["description"].endswith(".")
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["strategy"]
    assert schema["description"]


def test_strategy_schema_is_json():
    for cls in STRATEGIES.values():
        assert json.loads(json.dumps(strategy_schema(cls), allow_nan=False))


def test_strategy_schema_has_types_and_ranges():
    properties = strategy_schema(STRATEGIES["adapt"])["properties"]
    assert properties["policy"]["enum"] == ["line_initial", "block_initial", "reference"]
    assert properties["a"]["exclusiveMinimum"] == 0.0
    assert properties["a"]["maximum"] == 2.0
    assert properties["column0"]["type"] == "boolean"
    assert properties["indent_token_ids"]["items"]["type"] == "integer"
    assert strategy_schema(STRATEGIES["dynatemp"])["properties"]["range"]["minimum"] == 0.0
