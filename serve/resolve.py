"""Turn what a configuration leaves open into values; each function returns a new configuration."""

from dataclasses import replace
from pathlib import Path

from serve.config import ServeConfig
from serve.options import ConfigError

MAX_CONNECTIONS = 1024
"""Connections at once, where the number is left open."""
RESERVED_FILES = 96
"""Files that the server needs for other things than connections, at most."""
TOKENS_PER_SEQUENCE = 192
"""KV cache tokens for each running sequence, where the size is left open."""


def resolve_access(config: ServeConfig) -> ServeConfig:
    """Read the key files and refuse an open address without an API key.

    Returns:
        A config whose `api_key` and `admin_key` have all keys and whose files are None.

    Raises:
        ConfigError: a key file is missing or empty, a key is both, or the address is open to other
            machines.
    """
    keys = config.api_key + _read_keys("api_key_file", config.api_key_file)
    admin_keys = config.admin_key + _read_keys("admin_key_file", config.admin_key_file)
    if set(keys) & set(admin_keys):
        raise ConfigError("admin_key: an admin key must differ from every API key")
    if not keys and not config.is_loopback:
        raise ConfigError(
            f"host: {config.host} can be reached from other machines; set an API key "
            "(PROA_API_KEY, --api-key-file or --api-key)"
        )
    return replace(
        config, api_key=keys, api_key_file=None, admin_key=admin_keys, admin_key_file=None
    )


def _read_keys(option: str, path: str | None) -> tuple[str, ...]:
    if path is None:
        return ()
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise ConfigError(f"{option}: cannot read {path}: {reason}") from None
    found = tuple(line.strip() for line in lines if line.strip())
    if not found:
        raise ConfigError(f"{option}: {path} holds no key")
    return found


def resolve_connections(config: ServeConfig, *, max_files: int) -> ServeConfig:
    """Set the number of connections, within the files that the process may open.

    Args:
        config: what was asked for.
        max_files: the process's limit of open files; -1: none.

    Raises:
        ConfigError: there are not enough files for the number asked for.
    """
    most = max(1, max_files - RESERVED_FILES) if max_files >= 0 else MAX_CONNECTIONS
    if config.max_connections == "auto":
        return replace(config, max_connections=min(MAX_CONNECTIONS, most))
    if int(config.max_connections) > most and max_files >= 0:
        raise ConfigError(
            f"max_connections: {config.max_connections} is more than {most}, which the limit of "
            f"{max_files} open files leaves; raise it with ulimit -n"
        )
    return config


def resolve_adapters(config: ServeConfig) -> ServeConfig:
    """Make the folders of adapters and variants absolute, links followed.

    Raises:
        ConfigError: one is no folder.
    """
    folders = [(f"adapter: {name}", folder) for name, folder in config.adapters]
    folders += [(f"variant: {name}", folder) for name, folder in config.variants]
    if config.adapter_root is not None:
        folders.append(("adapter_root", config.adapter_root))
    for spelled, folder in folders:
        if not Path(folder).is_dir():
            raise ConfigError(f"{spelled}: {folder} is not a folder")
    adapter = tuple(f"{name}={Path(folder).resolve()}" for name, folder in config.adapters)
    variant = tuple(f"{name}={Path(folder).resolve()}" for name, folder in config.variants)
    root = None if config.adapter_root is None else str(Path(config.adapter_root).resolve())
    return replace(config, adapter=adapter, variant=variant, adapter_root=root)


def resolve_votes(config: ServeConfig, *, data_folder: Path) -> ServeConfig:
    """Make the paths of the files of votes and experiments absolute; without them they are in the
    data folder.

    Raises:
        ConfigError: a path begins with a home folder that is unknown.
    """

    def resolve(name: str, given: str | None, file: str) -> str:
        path = data_folder / file if given is None else Path(given)
        try:
            return str(path.expanduser().absolute())
        except RuntimeError:
            raise ConfigError(f"{name}: {path} is in an unknown home folder") from None

    return replace(
        config,
        votes=resolve("votes", config.votes, "votes.sqlite3"),
        experiment_data=resolve("experiment_data", config.experiment_data, "experiments.sqlite3"),
    )


def resolve_capacity(
    config: ServeConfig, *, model_context: int, bytes_per_block: int, free_bytes: int
) -> ServeConfig:
    """Replace "auto" in the KV cache size and the context by numbers that fit.

    The cache size is rounded up to whole blocks.

    Args:
        config: what was asked for.
        model_context: longest sequence of the model, in tokens.
        bytes_per_block: memory of one KV cache block.
        free_bytes: memory that is free now, where the cache will be.

    Raises:
        ConfigError: the model's context is smaller than asked, or the cache cannot hold it.
    """
    if config.max_context != "auto" and int(config.max_context) > model_context:
        raise ConfigError(
            f"max_context: {config.max_context} is more than the model's {model_context} tokens"
        )
    context = model_context if config.max_context == "auto" else int(config.max_context)
    block = config.block_size
    if config.kv_cache_tokens == "auto":
        affordable = free_bytes // 2 // bytes_per_block * block
        tokens = max(
            block, min(max(TOKENS_PER_SEQUENCE * config.max_running_sequences, context), affordable)
        )
    else:
        tokens = int(config.kv_cache_tokens)
    tokens = -(-tokens // block) * block
    if config.max_context == "auto":
        context = min(context, tokens)
    if context > tokens:
        raise ConfigError(
            f"max_context: {context} tokens do not fit the KV cache of {tokens} "
            "(see kv_cache_tokens)"
        )
    return replace(config, kv_cache_tokens=tokens, max_context=context)
