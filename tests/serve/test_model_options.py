"""What is said of a model, apart from a server."""

import pytest

from serve.config import OPTIONS, ServeConfig
from serve.model_options import (
    MODEL_OPTIONS,
    ModelOptions,
    build_model_options,
    resolve_model_options,
)
from serve.options import ConfigError


def test_server_has_the_same_options_in_the_same_order() -> None:
    assert [(n, o) for n, o in OPTIONS.items() if n in MODEL_OPTIONS] == [*MODEL_OPTIONS.items()]


def test_server_hands_on_what_it_was_told_of_the_model() -> None:
    assert ServeConfig().model_options == ModelOptions()
    told = {"model": "m", "quantization": "none", "head": "dense", "cache_dir": "c",
            "dequantize": True, "device": "cpu", "kernels": "native", "threads": 3}  # fmt: skip
    assert told.keys() == MODEL_OPTIONS.keys()
    assert ServeConfig(**told).model_options == ModelOptions(**told)


def test_command_line_wins_over_the_environment_over_the_default() -> None:
    environ = {"PROA_THREADS": "2", "PROA_HEAD": "nf4", "PROA_PORT": "no number"}
    options = build_model_options({"threads": "3"}, environ=environ)
    assert options == ModelOptions(threads=3, head="nf4")


@pytest.mark.parametrize(
    ("arguments", "environ", "match"),
    [
        ({"threads": "0"}, {}, "--threads: '?0'? is not a whole number or auto from 1 to 1024"),
        ({"model": ""}, {}, "MODEL: '' is not a path"),
        ({}, {"PROA_HEAD": "int4"}, "PROA_HEAD: 'int4' is not one of int8, nf4, dense"),
    ],
)
def test_bad_value_is_named_as_it_was_spelt(
    arguments: dict[str, str], environ: dict[str, str], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        build_model_options(arguments, environ=environ)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"kernels": "cuda", "device": "cpu"}, "kernels: 'cuda' needs device 'cuda' or 'auto'"),
        ({"kernels": "avx2", "device": "cuda"}, "kernels: 'avx2' computes on the CPU"),
        ({"threads": 0}, "threads: 0 is not a whole number"),
    ],
)
def test_contradiction_is_refused(fields: dict, match: str) -> None:
    for kind in (ModelOptions, ServeConfig):
        with pytest.raises(ConfigError, match=match):
            kind(**fields)


@pytest.mark.parametrize(
    ("device", "kernels", "has_cuda", "expected"),
    [
        ("auto", "auto", True, "cuda"),
        ("auto", "auto", False, "cpu"),
        ("auto", "native", True, "cpu"),
        ("cpu", "auto", True, "cpu"),
    ],
)
def test_device_auto(device: str, kernels: str, has_cuda: bool, expected: str) -> None:
    options = ModelOptions(device=device, kernels=kernels)
    found = resolve_model_options(options, has_cuda=has_cuda, num_processors=1)
    assert found.device == expected


@pytest.mark.parametrize(("device", "kernels"), [("cuda", "auto"), ("auto", "cuda")])
def test_missing_gpu_is_refused(device: str, kernels: str) -> None:
    options = ModelOptions(device=device, kernels=kernels)
    with pytest.raises(ConfigError, match="torch finds no CUDA device"):
        resolve_model_options(options, has_cuda=False, num_processors=1)


@pytest.mark.parametrize(("threads", "expected"), [("auto", 6), (2, 2)])
def test_threads_auto_is_the_number_of_processors(threads: int | str, expected: int) -> None:
    options = ModelOptions(threads=threads)
    found = resolve_model_options(options, has_cuda=False, num_processors=6)
    assert found.threads == expected
