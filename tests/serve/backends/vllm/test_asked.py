"""What travels in the arguments of vLLM's sampling parameters and in the path of a LoRA."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adapters.format import AdapterError
from decoding import SamplingParams, parse_strategy
from decoding.options import ParameterError
from serve.backends.vllm.addresses import AdapterAddress, parse_address
from serve.backends.vllm.asked import Asked, read_asked
from serve.backends.vllm.settings import Settings, read_settings
from serve.options import ConfigError

ADAPT = parse_strategy({"strategy": "adapt", "policy": "reference", "a": 1.1, "b": 0.2})


def vllm_params(extra_args: dict[str, Any] | None, **fields: Any) -> Any:
    defaults = {
        "temperature": 0.7, "top_p": 0.9, "top_k": 0, "min_p": 0.0, "presence_penalty": 0.5,
        "frequency_penalty": 0.0, "repetition_penalty": 1.0, "seed": 3,
    }  # fmt: skip
    return SimpleNamespace(**(defaults | fields), extra_args=extra_args)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.3, logit_bias={5: -1.5}, stop=("x",), max_tokens=7, seed=1),
        SamplingParams(strategy=ADAPT, min_tokens=2, max_tokens=4, stop_token_ids=(1, 2)),
    ],
    ids=["plain", "biased", "adaptive"],
)
def test_everything_comes_through(params: SamplingParams) -> None:
    asked = Asked(params=params, seed=-(2**62), key="r-1", is_traced=True, head="/h#digest=0")
    found = read_asked(vllm_params(asked.to_extra_args()), penalties_are_applied=True)
    assert found == asked


def test_request_without_our_arguments_is_left_alone() -> None:
    for extra_args in (None, {}, {"other": 1}):
        assert read_asked(vllm_params(extra_args), penalties_are_applied=False) is None


@pytest.mark.parametrize("is_applied", [False, True])
def test_strategy_goes_with_vllms_own_parameters(is_applied: bool) -> None:
    params = vllm_params({"decoding": '{"strategy": "adapt", "a": 1.0, "b": 0.5}'})
    found = read_asked(params, penalties_are_applied=is_applied)
    assert found is not None
    assert (found.params.strategy.name, found.seed) == ("adapt", 3)
    assert (found.params.temperature, found.params.top_p) == (0.7, 0.9)
    assert found.params.presence_penalty == (0.0 if is_applied else 0.5)


@pytest.mark.parametrize(
    ("decoding", "match"),
    [
        ("{", "decoding must be JSON text of an object"),
        (3, "decoding must be an object, got 3"),
        ('{"strategy": "nothing"}', "decoding.strategy must be one of"),
        ('{"strategy": "adapt", "a": 3}', "decoding.a must be"),
        ('{"strategy": "look_ahead"}', "look_ahead needs Proa's own API"),
        ('{"strategy": "learned"}', "learned needs Proa's own API"),
    ],
)
def test_bad_strategy_is_refused(decoding: Any, match: str) -> None:
    with pytest.raises(ParameterError, match=match):
        read_asked(vllm_params({"decoding": decoding}), penalties_are_applied=False)


@pytest.mark.parametrize(
    "address",
    [
        AdapterAddress(folder="/a/b"),
        AdapterAddress(folder="/a#b/c", digest="ab12"),
        AdapterAddress(folder="/a b", digest="ab12", scale=0.1),
        AdapterAddress(folder="/a", scale=1e-9),
    ],
)
def test_address_is_read_as_written(address: AdapterAddress) -> None:
    assert parse_address(str(address)) == address


def test_path_with_a_mark_of_its_own_is_a_path() -> None:
    assert parse_address("/a#b").folder == "/a#b"
    assert parse_address("/a#other=1").folder == "/a#other=1"


@pytest.mark.parametrize("scale", ["0", "1.5", "nan", "x"])
def test_scale_out_of_range_is_refused(scale: str) -> None:
    with pytest.raises(ValueError, match=r"scale|float"):
        parse_address(f"/a#scale={scale}")


def test_changed_adapter_is_refused(tmp_path: Path, write_adapter: Any) -> None:
    folder = write_adapter(tmp_path / "one")
    stored = AdapterAddress(folder=str(folder)).read()
    assert AdapterAddress(folder=str(folder), digest=stored.digest).read().digest == stored.digest
    with pytest.raises(AdapterError, match="has changed"):
        AdapterAddress(folder=str(folder), digest="0" * 64).read()


def test_settings_come_through_json() -> None:
    settings = Settings(model="m", variants=("a", "b"), adapters=("c",))
    assert read_settings({"proa": settings.to_json()}) == settings
    assert read_settings({}) is None
    assert read_settings({"other": 1}) is None


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (3, "must be an object, got 3"),
        ({"modle": "x"}, "unknown modle; known: adapters, cache_dir"),
    ],
)
def test_wrong_settings_are_refused(values: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        read_settings({"proa": values})
