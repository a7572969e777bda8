"""Load the pruned variants that a server starts with."""

from collections.abc import Callable
from pathlib import Path

from adapters.format import AdapterError
from models.checkpoints import Checkpoint, CheckpointError
from models.decoder import Decoder
from models.pruning import count_linears, widths_of
from serve.attachments.registry import AdapterRegistry, LoadedVariant
from serve.attachments.speed import compare_decode_speed
from serve.backends.protocol import AdapterConflictError, AdapterInfo, AdapterLoadError
from serve.base_model import build_decoder, load_variant
from serve.config import ServeConfig
from serve.options import ConfigError


def add_variants(
    registry: AdapterRegistry,
    config: ServeConfig,
    base: Checkpoint,
    decoder: Decoder,
    *,
    report: Callable[[str], None],
) -> None:
    """Load the variants of the options and attach them; say how fast each is.

    Args:
        registry: of `decoder`.
        config: with folders, device and threads resolved.
        base: the weights of `decoder`.
        decoder: the base's.
        report: called with one line at a time about what is being done.

    Raises:
        ConfigError: a folder does not hold a variant of this base, or it cannot be loaded.
    """
    for name, folder in config.variants:
        try:
            registry.check_name(name)
            loaded = _load(config, base, decoder, Path(folder), report)
            info = registry.add_variant(name, Path(folder), loaded)
        except (AdapterError, CheckpointError, ConfigError) as error:
            raise ConfigError(f"variant {name!r}: {error}") from error
        except (AdapterLoadError, AdapterConflictError) as error:
            raise ConfigError(str(error)) from error
        report(describe_variant(info, config.served_model_name or base.name))


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


def _load(
    config: ServeConfig,
    base: Checkpoint,
    base_decoder: Decoder,
    folder: Path,
    report: Callable[[str], None],
) -> LoadedVariant:
    variant, pruned = load_variant(config.model_options, base, folder, report=report)
    decoder = build_decoder(config.model_options, pruned, base_decoder)
    kept = count_linears(base.spec, variant.disp.widths)
    return LoadedVariant(
        decoder=decoder,
        digest=variant.digest,
        description=variant.description,
        num_parameters=kept,
        num_bytes=decoder.num_bytes,
        removed=1 - kept / count_linears(base.spec, widths_of(base.spec)),
        speed=compare_decode_speed(decoder, base_decoder),
    )
