"""Build the backend that a configuration names."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from serve.backends import BACKENDS
from serve.backends.protocol import Backend
from serve.config import ServeConfig
from text.tokenizer import Tokenizer

Report = Callable[[str], None]
"""Told one line at a time about what is being done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltBackend:
    """A model that is ready to run requests, and what the API must know of it.

    Attributes:
        config: with every size and limit resolved.
        model_name: the model's own name, its id unless the operator gives another.
        kernels: what it computes with, such as "native-avx2".
        backend: runs the requests.
        tokenizer: the model's; its ids are those of the requests.
    """

    config: ServeConfig
    model_name: str
    kernels: str
    backend: Backend
    tokenizer: Tokenizer


def build_backend(config: ServeConfig, *, report: Report) -> BuiltBackend:
    """Load the model and build the backend `config.backend`.

    Args:
        config: with keys read and folders of adapters resolved.
        report: told what happens.

    Raises:
        ConfigError: an option does not suit the backend, the model or the machine, or the model, a
            variant or an adapter cannot be loaded.
    """
    built: BuiltBackend = import_module(BACKENDS[config.backend]).build(config, report=report)
    return built
