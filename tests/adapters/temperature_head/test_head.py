"""Temperature heads as folders."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from adapters.format import AdapterError, Host, read_adapter
from adapters.methods import method_of
from adapters.temperature_head.head import (
    HeadConfig,
    TemperatureHead,
    build_head,
    describe_head,
    save_head,
)
from tests.models.kernels.random_decoders import HIDDEN, make_decoder_parts

SPEC = make_decoder_parts("llama")[0]
HOST = Host(spec=SPEC, fingerprint="ab" * 32, quantization="none", model_id="tiny")


def make_head(**fields: Any) -> TemperatureHead:
    generator = torch.Generator().manual_seed(4)
    config = HeadConfig(**{"width": 5, "least": 0.1, "most": 1.5, **fields})
    return TemperatureHead(
        config=config,
        first=torch.randn(config.width, HIDDEN, generator=generator),
        bias=torch.randn(config.width, generator=generator),
        second=torch.randn(config.width, generator=generator),
        offset=torch.tensor(0.3),
    )


def test_head_comes_back_as_it_was_written(tmp_path: Path) -> None:
    head, states = make_head(), torch.randn(7, HIDDEN)
    save_head(tmp_path / "a", head, HOST, description="warm", training={"programs": 3})
    stored = read_adapter(tmp_path / "a")
    assert (stored.config.description, stored.config.training) == ("warm", {"programs": 3})
    assert method_of(stored.config).kind == "temperature_head"
    method_of(stored.config).check(stored, HOST)
    again = build_head(stored, HOST)
    assert torch.equal(again.temperatures(states), head.temperatures(states))
    assert describe_head(stored) == [("temperatures", "0.1 to 1.5"), ("width", "5")]


def test_temperature_is_that_of_the_definition_and_of_any_batch() -> None:
    head, states = make_head(), torch.randn(6, HIDDEN)
    for state, found in zip(states, head.temperatures(states).tolist(), strict=True):
        middle = F.silu(F.linear(state, head.first, head.bias))
        share = 1 / (1 + math.exp(-float(middle @ head.second) - 0.3))
        assert found == pytest.approx(0.1 + 1.4 * share, rel=1e-4)
        assert head.temperature(state) == pytest.approx(found, rel=1e-4)
        assert 0.1 <= found <= 1.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensors": {"first": None}}, "first: missing"),
        ({"tensors": {"bias": torch.zeros(4)}}, r"bias: torch.float32 \(4,\), expected .*\(5,\)"),
        ({"tensors": {"second": torch.zeros(5).int()}}, "second: torch.int32"),
        ({"tensors": {"offset": torch.tensor(torch.nan)}}, "offset: holds values that are not"),
        ({"tensors": {"extra": torch.zeros(1)}}, "extra: not a tensor of a temperature head"),
        (
            {"fields": {"width": 5}},
            "fields of a temperature head are least, most, width; got width",
        ),
        ({"fields": {"width": 0, "least": 0.1, "most": 1.5}}, "width must be a whole number"),
        ({"fields": {"width": True, "least": 0.1, "most": 1.5}}, "width must be a whole number"),
        ({"fields": {"width": 5, "least": 1.5, "most": 0.5}}, "0 <= least < most <= 2, got 1.5"),
        ({"fields": {"width": 5, "least": "a", "most": 0.5}}, "least and most must be numbers"),
        ({"base_fingerprint": "0" * 64}, "trained on tiny"),
    ],
)
def test_head_that_does_not_fit_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    save_head(tmp_path, make_head(), HOST, description="", training={})
    stored = read_adapter(tmp_path)
    tensors = {**stored.tensors, **change.pop("tensors", {})}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    stored = replace(stored, tensors=tensors, config=replace(stored.config, **change))
    with pytest.raises(AdapterError, match=message):
        build_head(stored, HOST)


def test_head_with_numbers_that_are_not_finite_is_not_written(tmp_path: Path) -> None:
    head = replace(make_head(), offset=torch.tensor(torch.inf))
    with pytest.raises(AdapterError, match="not finite"):
        save_head(tmp_path / "a", head, HOST, description="", training={})
    assert not (tmp_path / "a").exists()
