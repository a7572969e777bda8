"""What makes two arms the same."""

from typing import Any

import pytest

from serve.experiments.comparison import build_identity

SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "order": ({"top_p": 0.5, "top_k": 3}, {"top_k": 3, "top_p": 0.5}),
    "whole number": ({"temperature": 1}, {"temperature": 1.0}),
    "within": ({"decoding": {"a": 1, "b": [2]}}, {"decoding": {"b": [2.0], "a": 1.0}}),
    "none": ({}, {"temperature": None}),
    "none within": ({"decoding": {"a": 1}}, {"decoding": {"a": 1, "b": None}}),
    "nothing within": ({}, {"decoding": {"b": None}}),
    "empty": ({}, {"stop": [], "logit_bias": {}}),
    "keys": ({"logit_bias": {5: 1}}, {"logit_bias": {"5": 1}}),
    "tuple": ({"stop": ("a",)}, {"stop": ["a"]}),
}
DIFFERENT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "value": ({"temperature": 0.5}, {"temperature": 0.6}),
    "zero": ({}, {"temperature": 0}),
    "false": ({}, {"ignore_eos": False}),
    "true and one": ({"ignore_eos": True}, {"ignore_eos": 1}),
    "text": ({"stop": ["1"]}, {"stop": [1]}),
}


@pytest.mark.parametrize(("fields", "others"), SAME.values(), ids=SAME)
def test_arms_of_equal_fields_are_the_same(fields: Any, others: Any) -> None:
    assert build_identity("A", "m", fields=fields) == build_identity("A", "m", fields=others)


@pytest.mark.parametrize(("fields", "others"), DIFFERENT.values(), ids=DIFFERENT)
def test_arms_of_other_fields_differ(fields: Any, others: Any) -> None:
    assert build_identity("A", "m", fields=fields) != build_identity("A", "m", fields=others)


@pytest.mark.parametrize(("label", "model"), [("B", "m"), ("A", "n")], ids=["label", "model"])
def test_label_and_model_are_part_of_an_arm(label: str, model: str) -> None:
    assert build_identity(label, model, fields={}) != build_identity("A", "m", fields={})


def test_description_begins_with_label_and_model() -> None:
    arm = build_identity("A", "m", fields={"decoding": {"strategy": "adapt"}})
    assert list(arm.describe().items()) == [
        ("label", "A"),
        ("model", "m"),
        ("decoding", {"strategy": "adapt"}),
    ]
