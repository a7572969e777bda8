import math
from dataclasses import FrozenInstanceError, fields

import pytest

from decoding import STRATEGIES, ParameterError, SamplingParams, parse_strategy
from decoding.options import options_of, schema_of
from decoding.strategies import Adapt

NOT_NUMBERS = [math.nan, math.inf, -math.inf, "1", None, True, [1]]

REFUSED = {
    "temperature": [-0.1, 2.01, 10**400, *NOT_NUMBERS],
    "top_p": [0.0, -1, 1.1, *NOT_NUMBERS],
    "top_k": [-2, 1.0, 2**31, True, None, math.nan, "5"],
    "min_p": [-0.1, 1.1, *NOT_NUMBERS],
    "typical_p": [0.0, 1.1, *NOT_NUMBERS],
    "presence_penalty": [-2.1, 2.1, *NOT_NUMBERS],
    "frequency_penalty": [-2.1, 2.1, *NOT_NUMBERS],
    "repetition_penalty": [0.0, 2.1, *NOT_NUMBERS],
    "logit_bias": [{1: 101}, {1: -101}, {1: math.nan}, {-1: 0}, {"1": 0}, {True: 0}, [1], None],
    "seed": [-(2**63) - 1, 2**63, 1.0, "1", False],
    "stop": ["abc", [""], ["a"] * 33, ["a" * 257], [1], None, b"abc"],
    "include_stop_str_in_output": [0, 1, "true", None],
    "ignore_eos": [0, None],
    "stop_token_ids": [[0] * 4097, [-1], [1.0], ["1"], 3, [True], [2**31], None],
    "min_tokens": [-1, 1.5, True, None],
    "max_tokens": [-1, 1.5, True],
    "logprobs": [-1, 21, 1.0, True],
}
ACCEPTED = {
    "temperature": [0, 0.0, 1, 2],
    "top_p": [1e-9, 1],
    "top_k": [-1, 0, 1, 10**9],
    "min_p": [0, 1],
    "typical_p": [0.1, 1],
    "presence_penalty": [-2, 2],
    "frequency_penalty": [-2, 2],
    "repetition_penalty": [0.1, 2],
    "logit_bias": [{}, {0: -100, 5: 100}],
    "seed": [None, -(2**63), 2**63 - 1],
    "stop": [[], ("a",), ["a" * 256] * 32],
    "include_stop_str_in_output": [True],
    "ignore_eos": [True],
    "stop_token_ids": [[], [0, 7]],
    "min_tokens": [0, 5],
    "max_tokens": [None, 0, 10],
    "logprobs": [None, 0, 20],
}


def _cases(table):
    return [
        pytest.param(field, value, id=f"{field}-{str(value)[:20]}-{index}")
        for field, values in table.items()
        for index, value in enumerate(values)
    ]


def test_params_every_field_is_in_both_tables():
    names = {field.name for field in fields(SamplingParams)} - {"strategy"}
    assert names == set(REFUSED) == set(ACCEPTED) == set(options_of(SamplingParams))


@pytest.mark.parametrize(("field", "value"), _cases(REFUSED))
def test_params_refuse_a_bad_value_and_name_field_value_and_range(field, value):
    with pytest.raises(ParameterError, match=rf"^{field} must be .*, got ") as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field


@pytest.mark.parametrize(("field", "value"), _cases(ACCEPTED))
def test_params_accept_the_ends_of_a_range(field, value):
    assert getattr(SamplingParams(**{field: value}), field) == (
        tuple(value) if isinstance(value, list) else value
    )


def test_params_message_tells_what_is_allowed():
    with pytest.raises(
        ParameterError, match=r"^temperature must be a finite number from 0 to 2, g"
    ):
        SamplingParams(temperature=3)


def test_params_min_tokens_above_max_tokens_is_refused():
    with pytest.raises(ParameterError, match=r"min_tokens must be at most max_tokens \(2\), got 3"):
        SamplingParams(min_tokens=3, max_tokens=2)


def test_params_refuse_a_strategy_that_is_not_registered():
    with pytest.raises(ParameterError, match="strategy must be an instance of a registered"):
        SamplingParams(strategy="adapt")


def test_params_are_frozen_and_do_not_alias_what_was_passed():
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[2] = 1.0
    assert params.logit_bias == {1: 2.0}
    with pytest.raises(FrozenInstanceError):
        params.top_p = 0.5


def test_params_integers_given_for_numbers_are_stored_as_floats():
    assert isinstance(SamplingParams(temperature=1).temperature, float)


@pytest.mark.parametrize(
    ("params", "param"),
    [
        pytest.param({"logit_bias": {10: 1.0}}, "logit_bias", id="logit_bias"),
        pytest.param({"stop_token_ids": [3, 10]}, "stop_token_ids", id="stop_token_ids"),
        pytest.param(
            {"strategy": Adapt(policy="reference", newline_token_ids=(1,), indent_token_ids=(10,))},
            "decoding.indent_token_ids",
            id="strategy",
        ),
    ],
)
def test_check_vocabulary_refuses_an_id_beyond_it(params, param):
    checked = SamplingParams(**params)
    checked.check_vocabulary(11)
    with pytest.raises(ParameterError, match=r"token id 10, but .* 0 to 9") as caught:
        checked.check_vocabulary(10)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("value", "param", "message"),
    [
        pytest.param("adapt", "decoding", "must be an object", id="string"),
        pytest.param(None, "decoding", "must be an object", id="null"),
        pytest.param(
            {}, "decoding.strategy", "one of adapt, dry, dynatemp, edt, fixed, ", id="none"
        ),
        pytest.param(
            {"strategy": "x"}, "decoding.strategy", "one of adapt, dry, dyna", id="unknown"
        ),
        pytest.param({"strategy": []}, "decoding.strategy", "one of adapt", id="not-a-name"),
        pytest.param(
            {"strategy": "fixed", "a": 1}, "decoding.a", "its parameters: none", id="no-fields"
        ),
        pytest.param(
            {"strategy": "adapt", "aa": 1}, "decoding.aa", "policy, a, b, column0", id="misspelt"
        ),
        pytest.param({"strategy": "adapt", "a": "1"}, "decoding.a", "a finite number", id="type"),
        pytest.param({"strategy": "adapt", "a": math.nan}, "decoding.a", "finite", id="nan"),
        pytest.param({"strategy": "adapt", "a": 2.1}, "decoding.a", "above 0 to 2", id="range"),
        pytest.param({"strategy": "adapt", "b": 0}, "decoding.b", "above 0 to 2", id="zero"),
        pytest.param(
            {"strategy": "adapt", "a": 0.5, "b": 0.6}, "decoding.b", "at most decoding.a", id="b>a"
        ),
        pytest.param({"strategy": "adapt", "first": 1}, "decoding.first", "true or f", id="bool"),
        pytest.param(
            {"strategy": "adapt", "policy": "x"}, "decoding.policy", "'reference'", id="choice"
        ),
        pytest.param(
            {"strategy": "adapt", "bracket_openers": True},
            "decoding.bracket_openers",
            "goes with 'block_initial'",
            id="bracket-openers-of-another-policy",
        ),
        pytest.param(
            {"strategy": "adapt", "policy": "reference", "column0": True},
            "decoding.column0",
            "no meaning with policy 'reference'",
            id="flag-of-another-policy",
        ),
        pytest.param(
            {"strategy": "adapt", "newline_token_ids": [1]},
            "decoding.newline_token_ids",
            "goes with 'reference'",
            id="ids-of-another-policy",
        ),
        pytest.param(
            {"strategy": "adapt", "policy": "reference", "newline_token_ids": [-1]},
            "decoding.newline_token_ids",
            "token ids",
            id="negative-id",
        ),
        pytest.param({"strategy": "dynatemp", "range": -1}, "decoding.range", "0 to 2", id="dyna"),
        pytest.param(
            {"strategy": "dynatemp", "exponent": math.inf}, "decoding.exponent", "finite", id="inf"
        ),
    ],
)
def test_parse_strategy_refuses_and_names_the_field(value, param, message):
    with pytest.raises(ParameterError, match=message) as caught:
        parse_strategy(value)
    assert caught.value.param == param


@pytest.mark.parametrize("name", STRATEGIES)
def test_parse_strategy_without_fields_gives_the_defaults(name):
    assert parse_strategy({"strategy": name}) == STRATEGIES[name]()


def test_parse_strategy_takes_fields():
    value = {"strategy": "adapt", "a": 1, "b": 0.5, "policy": "block_initial", "first": True}
    assert parse_strategy(value) == Adapt(policy="block_initial", a=1.0, b=0.5, first=True)


def test_schema_of_params_has_every_default_and_range():
    schemas = {name: schema_of(*pair) for name, pair in options_of(SamplingParams).items()}
    assert schemas["temperature"] == {
        "description": "Divides the logits; 0 takes the most likely token.",
        "type": "number",
        "minimum": 0.0,
        "maximum": 2.0,
        "default": 1.0,
    }
    assert schemas["top_p"]["exclusiveMinimum"] == 0.0
    assert schemas["seed"]["type"] == ["integer", "null"]
    assert schemas["stop"]["maxItems"] == 32
    assert schemas["logit_bias"]["additionalProperties"]["maximum"] == 100.0
