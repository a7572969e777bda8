"""Attach what a server starts with."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapters.format import AdapterError, read_config
from adapters.methods import method_of
from serve.attachments.registry import AdapterRegistry
from serve.backends.protocol import AdapterConflictError, AdapterInfo, AdapterLoadError
from serve.config import ServeConfig
from serve.options import ConfigError

_OPTIONS = {
    "variant": "--variant", "side_network": "--adapter", "temperature_head": "--adapter",
}  # fmt: skip


def attach_at_start(
    registry: AdapterRegistry[Any, Any],
    config: ServeConfig,
    model_id: str,
    *,
    report: Callable[[str], None],
) -> None:
    """Attach the adapters of the options, what others sit on first; say how fast variants are.

    Nothing else may compute meanwhile, for their speed to mean something.

    Args:
        registry: takes them.
        config: with folders resolved.
        model_id: of the base.
        report: called with one line at a time about what is being done.

    Raises:
        ConfigError: a folder does not hold an adapter of this base, or it cannot be loaded.
    """
    given = [("--variant", *item) for item in config.variants]
    given += [("--adapter", *item) for item in config.adapters]
    for _, name, folder in sorted(given, key=lambda item: _depth(*item)):
        try:
            info = registry.attach_folder(name, Path(folder))
        except (AdapterLoadError, AdapterConflictError) as error:
            raise ConfigError(str(error)) from error
        if test := registry.speed_test(name):
            while test.step():
                pass
            report(describe_variant(replace(info, speed=test.speed), model_id))


def _depth(option: str, name: str, folder: str) -> int:
    """Return how many variants an adapter sits on; refuse one that is given by the wrong option."""
    try:
        about = read_config(Path(folder))
        kind = method_of(about).kind
    except AdapterError:
        return 0  # the registry says what is wrong with it
    if option != _OPTIONS[kind]:
        raise ConfigError(
            f"adapter {name!r}: {folder} is a {kind.replace('_', ' ')}; give it with "
            f"{_OPTIONS[kind]} {name}={folder}"
        )
    return len(about.chain)


def describe_variant(info: AdapterInfo, model_id: str) -> str:
    """Return the line that says what a variant is worth here; a warning if it is slow."""
    name = f"{model_id}:{info.name}"
    assert info.speed is not None
    assert info.removed is not None
    if info.speed < 1:
        return (
            f"warning: {name} decodes at {info.speed:.2f}x its base on this machine, with "
            f"{info.removed:.0%} of the linears removed"
        )
    return (
        f"{name}: {info.removed:.0%} of the linears removed, {info.speed:.2f}x the base at one "
        f"stream, {info.num_bytes / 1e6:.0f} MB of its own"
    )
