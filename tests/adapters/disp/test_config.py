"""What a pruned variant may say about itself."""

import dataclasses
import re
from typing import Any

import pytest

from adapters.disp.config import DispConfig, from_fields, removed_shares
from adapters.format import AdapterError
from models.pruning import count_fixed, count_linears, widths_of
from models.spec import DecoderSpec
from tests.models.kernels.random_decoders import KINDS, make_decoder_parts

SPEC = make_decoder_parts("llama")[0]
WIDTHS = [[32, 64, 32, 96, 64], [64, 32, 64, 160, 32], [32, 32, 32, 32, 32]]


def make_fields(spec: DecoderSpec = SPEC, **changes: Any) -> dict[str, Any]:
    linears, total = removed_shares(spec, WIDTHS)
    values = {
        "widths": WIDTHS, "remove_linears": linears, "remove_total": total, "align": 32,
        "residual": "independent", "dense_fingerprint": "ab" * 32, "stat": "full",
    }  # fmt: skip
    return {k: v for k, v in (values | changes).items() if v is not ...}


def find(config: DispConfig, spec: DecoderSpec = SPEC) -> str:
    return "; ".join(config.find_contradictions(spec))


@pytest.mark.parametrize("kind", KINDS)
def test_fields_are_read_as_they_are_written(kind: str) -> None:
    spec = make_decoder_parts(kind)[0]
    config = from_fields(make_fields(spec))
    assert from_fields(config.to_fields()) == config
    assert config.to_fields() == make_fields(spec)
    assert find(config, spec) == ""


def test_shares_are_of_linears_and_of_the_whole_model() -> None:
    linears, total = removed_shares(SPEC, WIDTHS)
    whole, kept = count_linears(SPEC, widths_of(SPEC)), count_linears(SPEC, WIDTHS)
    assert linears == pytest.approx(1 - kept / whole, abs=1e-15)
    assert total == pytest.approx((whole - kept) / (whole + count_fixed(SPEC)), abs=1e-15)
    assert removed_shares(SPEC, widths_of(SPEC)) == (0, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": 3}, "widths must be a list of one list for each layer, got 3"),
        ({"widths": []}, "widths must be a list of one list for each layer"),
        (
            {"widths": [[1, 1, 1, 1]]},
            r"widths: layer 0 must have 5 integers .*, got \(1, 1, 1, 1\)",
        ),
        ({"widths": [[1] * 5, 7]}, "widths: layer 1 must have 5 integers of at least 1"),
        ({"widths": [[1, 1, 1, 1, True]]}, "widths: layer 0 must have 5 integers"),
        ({"widths": [[1, 1, 1, 1, 0]]}, "widths: layer 0 must have 5 integers"),
        ({"widths": [[1, 1, 1, 1, 2.0]]}, "widths: layer 0 must have 5 integers"),
        ({"widths": [["1"] * 5]}, "widths: layer 0 must have 5 integers"),
        ({"remove_linears": True}, "remove_linears must be a number from 0 .* got True"),
        ({"remove_linears": "0.3"}, "remove_linears must be a number from 0 .* got '0.3'"),
        ({"remove_linears": 1.0}, "remove_linears must be a number from 0 to below 1, got 1.0"),
        ({"remove_linears": float("nan")}, "remove_linears must be a number .* got nan"),
        ({"remove_total": -0.1}, "remove_total must be a number from 0 to below 1, got -0.1"),
        ({"align": 0}, "align must be an integer of at least 1, got 0"),
        ({"align": 64.0}, "align must be an integer of at least 1, got 64.0"),
        ({"align": True}, "align must be an integer of at least 1, got True"),
        ({"residual": "tied"}, "residual must be one of independent, shared, got 'tied'"),
        ({"residual": ["shared"]}, r"residual must be one of .* got \['shared'\]"),
        ({"dense_fingerprint": "xyz"}, "dense_fingerprint must be 64 hexadecimal .* got 'xyz'"),
        ({"dense_fingerprint": None}, "dense_fingerprint must be 64 .* got None"),
        ({"stat": "kept"}, "stat must be 'full', got 'kept'"),
        ({"novelty": 1, "align": ...}, "novelty: unknown disp field; align: missing disp field"),
        ({"align": "x", "stat": 1}, "align must be an integer .*; stat must be 'full', got 1"),
    ],
)
def test_wrong_fields_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        from_fields(make_fields(**changes))


@pytest.mark.parametrize("name", ["widths", "residual", "align"])
def test_message_about_a_huge_value_is_short(name: str) -> None:
    with pytest.raises(AdapterError) as caught:
        from_fields(make_fields(**{name: [["x" * 5] * 50_000] * 3}))
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": WIDTHS[:2]}, "widths must be for 3 layers, got 2"),
        ({"widths": WIDTHS * 20_000}, "widths must be for 3 layers, got 60000"),
        (
            {"widths": [*WIDTHS[:2], [65, 10**15, 32, 161, 32]]},
            "layer 2, attn_in must be 1 to 64, got 65; widths: layer 2, attn_out .* got 10{15}; "
            "widths: layer 2, mlp_mid must be 1 to 160, got 161",
        ),
        (
            {"align": 64},
            "layer 0, attn_in must be a multiple of align 64 or 64, got 32; .*"
            "layer 0, mlp_mid must be a multiple of align 64 or 160, got 96",
        ),
        ({"remove_linears": 0.3}, r"remove_linears must be 0\.\d+, as widths say, got 0\.3"),
        ({"remove_total": 0.3}, r"remove_total must be 0\.\d+, as widths say, got 0\.3"),
    ],
    ids=["few_layers", "many_layers", "range", "align", "linears", "total"],
)
def test_contradictions_are_named(changes: dict[str, Any], message: str) -> None:
    found = find(from_fields(make_fields(**changes)))
    assert len(found) < 3000
    assert re.search(message, found)


def test_shares_may_differ_by_rounding_only() -> None:
    config = from_fields(make_fields())
    near = dataclasses.replace(config, remove_linears=config.remove_linears + 9e-7)
    assert find(near) == ""
    far = dataclasses.replace(config, remove_linears=config.remove_linears + 2e-6)
    assert "remove_linears must be" in find(far)
