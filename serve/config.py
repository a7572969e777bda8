"""What a server can be told, with every default; flags, variables and YAML keys come from here.

Precedence: command line, then environment, then the YAML file, then the default.
"""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from serve.backends import BACKENDS
from serve.model_options import ADAPTERS, COMPUTE, MODEL, MODEL_OPTIONS, ModelOptions
from serve.options import (
    BYTES,
    FLAG,
    INTEGER,
    INTEGER_OR_AUTO,
    NAMED_FOLDER,
    ORIGIN,
    PATH,
    SECONDS,
    TEXT,
    ConfigError,
    option,
    option_of,
    options_of,
    read_given,
)

NETWORK = "Network and access"
CAPACITY = "Capacity"
LIMITS = "Requests"
PROCESS = "Process"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """Everything a server can be told.

    Raises:
        ConfigError: a value is out of range, or two options contradict each other.
    """

    model: str | None = option_of(ModelOptions, "model")
    served_model_name: str | None = option(
        None,
        "The model id clients use. Without it: the last part of the folder or hub id; smollm2 for "
        "the demo model.",
        kind=TEXT,
        group=MODEL,
    )
    quantization: str = option_of(ModelOptions, "quantization")
    head: str = option_of(ModelOptions, "head")
    cache_dir: str | None = option_of(ModelOptions, "cache_dir")
    adapter: tuple[str, ...] = option(
        (),
        "An adapter to attach at start; its model id is the base's, a colon and NAME. May be given "
        "several times. One that was trained on a pruned variant needs that --variant too.",
        kind=NAMED_FOLDER,
        group=ADAPTERS,
        is_repeatable=True,
    )
    variant: tuple[str, ...] = option(
        (),
        "A pruned variant of the model to load at start, beside it; its model id is the base's, a "
        "colon and NAME. May be given several times.",
        kind=NAMED_FOLDER,
        group=ADAPTERS,
        is_repeatable=True,
    )
    dequantize: bool = option_of(ModelOptions, "dequantize")
    adapter_root: str | None = option(
        None,
        "The folder below which /v1/adapters may attach adapters at run time. Without it: nowhere.",
        kind=PATH,
        group=ADAPTERS,
    )
    adapter_memory_bytes: int = option(
        2**30,
        "Memory of side networks; above it the least recently used ones leave memory and come back "
        "with their next request. Those in use stay, and so do variants.",
        kind=BYTES,
        group=ADAPTERS,
        minimum=0,
    )
    host: str = option(
        "127.0.0.1",
        "Address to listen on. One that other machines can reach needs an API key.",
        kind=TEXT,
        group=NETWORK,
    )
    port: int = option(
        8000,
        "Port to listen on; 0 takes a free one.",
        kind=INTEGER,
        group=NETWORK,
        minimum=0,
        maximum=65535,
    )
    api_key: tuple[str, ...] = option(
        (),
        "A key that clients must send. May be given several times; the environment variable and "
        "--api-key-file keep it out of the process list.",
        kind=TEXT,
        group=NETWORK,
        is_repeatable=True,
        is_secret=True,
    )
    api_key_file: str | None = option(
        None, "A file with one API key on each line.", kind=PATH, group=NETWORK
    )
    admin_key: tuple[str, ...] = option(
        (),
        "A key that may attach and detach adapters at run time; it opens everything else too. "
        "Without one, nobody may. May be given several times; the environment variable and "
        "--admin-key-file keep it out of the process list.",
        kind=TEXT,
        group=NETWORK,
        is_repeatable=True,
        is_secret=True,
    )
    admin_key_file: str | None = option(
        None, "A file with one admin key on each line.", kind=PATH, group=NETWORK
    )
    allowed_host: tuple[str, ...] = option(
        ("localhost", "127.0.0.1", "::1"),
        "A name or address that the Host header, and with the same port the Origin header, may "
        "have while there is no API key; others are refused, so that no web page reaches the "
        "server through its visitor's browser. May be given several times.",
        kind=TEXT,
        group=NETWORK,
        is_repeatable=True,
    )
    allowed_origin: tuple[str, ...] = option(
        (),
        "An origin whose web pages may use the server, such as https://app.example: their browsers "
        "are told that they may read the answers. May be given several times.",
        kind=ORIGIN,
        group=NETWORK,
        is_repeatable=True,
    )
    max_connections: int | str = option(
        "auto",
        "Connections held at once; further ones get status 503. auto is 1024, or fewer where the "
        "process may open few files.",
        kind=INTEGER_OR_AUTO,
        group=NETWORK,
        minimum=1,
        maximum=1_000_000,
    )
    max_header_bytes: int = option(
        64 * 2**10,
        "Longest request line and headers together; longer ones get status 431.",
        kind=BYTES,
        group=NETWORK,
        minimum=1024,
        maximum=2**20,
    )
    write_timeout_s: float = option(
        60.0,
        "How long a client may leave its answer unread before its connection is closed.",
        kind=SECONDS,
        group=NETWORK,
        minimum=1,
        maximum=86400,
    )
    backend: str = option(
        "native",
        "What runs the model. native: Proa's own engine, on one processor or GPU; vllm: vLLM 0.32, "
        "which is installed apart, on many.",
        kind=TEXT,
        group=COMPUTE,
        choices=BACKENDS,
    )
    tensor_parallel_size: int = option(
        1,
        "Devices that each layer is divided among, with vllm: GPUs, or shares of the cores.",
        kind=INTEGER,
        group=COMPUTE,
        minimum=1,
        maximum=1024,
    )
    executor: str = option(
        "auto",
        "What starts the processes of those devices, with vllm. mp: this machine; ray: several; "
        "auto leaves it to vLLM.",
        kind=TEXT,
        group=COMPUTE,
        choices=("auto", "mp", "ray"),
    )
    device: str = option_of(ModelOptions, "device")
    kernels: str = option_of(ModelOptions, "kernels")
    threads: int | str = option_of(ModelOptions, "threads")
    kv: str = option(
        "auto",
        "Number format of the KV cache: auto takes float16 (float32 for the reference kernels); "
        "int8, on the CPU only, takes about half of float16's memory.",
        kind=TEXT,
        group=COMPUTE,
        choices=("auto", "float16", "float32", "int8"),
    )
    kv_cache_tokens: int | str = option(
        "auto",
        "Tokens the KV cache holds; auto is 192 for each running sequence and at least one full "
        "context, within half of the free memory.",
        kind=INTEGER_OR_AUTO,
        group=CAPACITY,
        minimum=1,
    )
    block_size: int = option(
        16,
        "Tokens in a block of the KV cache; the native kernels read blocks of 16.",
        kind=INTEGER,
        group=CAPACITY,
        minimum=1,
        maximum=1024,
    )
    max_running_sequences: int = option(
        64,
        "Sequences computed together.",
        kind=INTEGER,
        group=CAPACITY,
        minimum=1,
        maximum=4096,
    )
    max_batch_tokens: int = option(
        512,
        "Tokens computed in one step; longer prompts are split over steps.",
        kind=INTEGER,
        group=CAPACITY,
        minimum=1,
        maximum=65536,
    )
    max_waiting_requests: int = option(
        256,
        "Requests that may wait; further ones get status 503 with Retry-After.",
        kind=INTEGER,
        group=CAPACITY,
        minimum=1,
        maximum=1_000_000,
    )
    max_waiting_tokens: int = option(
        131_072,
        "Prompt tokens that may wait, over all requests.",
        kind=INTEGER,
        group=CAPACITY,
        minimum=1,
    )
    prefix_caching: bool = option(
        True,
        "Reuse the KV cache of equal beginnings.",
        kind=FLAG,
        group=CAPACITY,
    )
    max_context: int | str = option(
        "auto",
        "Longest prompt and answer together, in tokens; auto is what model and KV cache allow.",
        kind=INTEGER_OR_AUTO,
        group=LIMITS,
        minimum=1,
    )
    max_sequences_per_prompt: int = option(
        128,
        "Largest n: answers to one prompt.",
        kind=INTEGER,
        group=LIMITS,
        minimum=1,
        maximum=4096,
    )
    max_sequences_per_request: int = option(
        1024,
        "Largest number of prompts times n of one request.",
        kind=INTEGER,
        group=LIMITS,
        minimum=1,
        maximum=65536,
    )
    max_body_bytes: int = option(
        8 * 2**20,
        "Largest request body; larger ones get status 413.",
        kind=BYTES,
        group=LIMITS,
        minimum=1024,
    )
    unknown_fields: str = option(
        "refuse",
        "What happens to a request with a field that is not documented: status 400, or nothing.",
        kind=TEXT,
        group=LIMITS,
        choices=("refuse", "ignore"),
    )
    ui: bool = option(
        True,
        "Serve the web interface at /ui. It takes memory only once somebody opens it.",
        kind=FLAG,
        group=NETWORK,
    )
    votes: str | None = option(
        None,
        "The SQLite file, on a local disk, that keeps the votes on comparisons. Without it: "
        "~/.local/share/proa/votes.sqlite3; XDG_DATA_HOME stands in place of ~/.local/share.",
        kind=PATH,
        group=PROCESS,
    )
    experiments: str | None = option(
        None,
        "A YAML file of experiments: arms that clients are divided among. Each is a model id by "
        "its name.",
        kind=PATH,
        group=PROCESS,
    )
    experiment_data: str | None = option(
        None,
        "The SQLite file, on a local disk, that keeps who was shown which arm and what came of it. "
        "Without it: experiments.sqlite3 beside the votes.",
        kind=PATH,
        group=PROCESS,
    )
    drain_timeout_s: float = option(
        30.0,
        "How long running requests may finish once the server is asked to stop.",
        kind=SECONDS,
        group=PROCESS,
        minimum=0,
        maximum=86400,
    )
    log_level: str = option(
        "info",
        "How much is logged on the standard error output.",
        kind=TEXT,
        group=PROCESS,
        choices=("debug", "info", "warning", "error"),
    )

    def __post_init__(self) -> None:
        for name, declared in OPTIONS.items():
            declared.check(getattr(self, name), name)
        names = [name for name, _ in (*self.adapters, *self.variants)]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(
                    f"adapter, variant: two are called {name!r}; a name is given once"
                )
        _ = self.model_options  # refuses what contradicts itself
        if self.kv == "int8" and self.device == "cuda":
            raise ConfigError(
                "kv: 'int8' computes on the CPU; on device 'cuda' it is one of auto, float16, "
                "float32"
            )
        if self.backend == "native":
            for name, alone in (("tensor_parallel_size", 1), ("executor", "auto")):
                if getattr(self, name) != alone:
                    raise ConfigError(
                        f"{name}: {getattr(self, name)!r} needs the backend vllm; native computes "
                        "on one device"
                    )
        if self.max_batch_tokens < self.max_running_sequences:
            raise ConfigError(
                f"max_batch_tokens: {self.max_batch_tokens} is less than max_running_sequences "
                f"{self.max_running_sequences}; every running sequence computes a token a step"
            )

    @property
    def model_options(self) -> ModelOptions:
        """What is said of the model."""
        return ModelOptions(**{name: getattr(self, name) for name in MODEL_OPTIONS})

    @property
    def adapters(self) -> list[tuple[str, str]]:
        """Name and folder of each adapter to attach at start."""
        return _split_names(self.adapter)

    @property
    def variants(self) -> list[tuple[str, str]]:
        """Name and folder of each variant to load at start."""
        return _split_names(self.variant)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def _split_names(texts: tuple[str, ...]) -> list[tuple[str, str]]:
    parts = [text.partition("=") for text in texts]
    return [(name, folder) for name, _, folder in parts]


OPTIONS = options_of(ServeConfig)


def build_config(
    arguments: Mapping[str, Any],
    *,
    environ: Mapping[str, str],
    file: Path | None = None,
) -> ServeConfig:
    """Combine command line, environment, YAML file and defaults.

    Args:
        arguments: text (or a list of texts) of the options given on the command line, by name.
        environ: the process environment.
        file: YAML file, or None.

    Raises:
        ConfigError: names the flag, variable or file and key at fault.
    """
    values: dict[str, Any] = {} if file is None else read_file(file)
    values |= read_given(OPTIONS, arguments, environ)
    return ServeConfig(**values)


def read_file(path: Path) -> dict[str, Any]:
    """Read options from a YAML file: a mapping of option names, with dashes or underscores.

    Raises:
        ConfigError: the file cannot be read, is no mapping, or has an unknown key or a bad value.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config: cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = " ".join(str(error).split())
        raise ConfigError(f"--config: {path} is not a YAML file: {problem}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config: {path} must hold 'option: value' lines")
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in OPTIONS:
            close = get_close_matches(name, OPTIONS, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"--config: {path} has an unknown option {key!r}{hint}")
        if name in values:
            raise ConfigError(f"--config: {path} sets {name} twice")
        values[name] = OPTIONS[name].parse(value, f"{key} in {path}")
    return values
