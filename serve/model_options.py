"""What loading a model needs to be told: which one, how its weights are held, where it computes.

Nothing here knows the server, so that training, checks and benchmarks load models as it does.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from serve.options import (
    FLAG,
    INTEGER_OR_AUTO,
    PATH,
    TEXT,
    ConfigError,
    option,
    options_of,
    read_given,
)

MODEL = "Model"
ADAPTERS = "Adapters"
COMPUTE = "Where and how it computes"

_CPU_KERNELS = ("native", "avx2", "avxvnni", "avx512", "amx")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """Which model, how its weights are held, and where it computes.

    Raises:
        ConfigError: a value is out of range, or two options contradict each other.
    """

    model: str | None = option(
        None,
        "A Hugging Face folder, a hub id, or a .gguf file. Without it: the demo model, "
        "SmolLM2-135M-Instruct.",
        kind=PATH,
        group=MODEL,
        is_positional=True,
    )
    quantization: str = option(
        "auto",
        "How weights are held. keep: as they are stored, a GGUF file's in its own codes; nf4: "
        "quantised once, the result is kept in the cache folder; none: in 16 bits. bitsandbytes' "
        "4-bit folders are kept in any case. auto: keep what is quantised already, else nf4.",
        kind=TEXT,
        group=MODEL,
        choices=("auto", "keep", "nf4", "none"),
    )
    head: str = option(
        "int8",
        "Precision of the output layer, a large part of a small model's bytes.",
        kind=TEXT,
        group=MODEL,
        choices=("int8", "nf4", "dense"),
    )
    cache_dir: str | None = option(
        None,
        "Where downloaded and quantised models are kept. Without it: ~/.cache/proa.",
        kind=PATH,
        group=MODEL,
    )
    dequantize: bool = option(
        False,
        "Make variants of a model that is on disk in 4 bits only. That rounds their weights twice, "
        "which costs quality; the original weights do better.",
        kind=FLAG,
        group=ADAPTERS,
    )
    device: str = option(
        "auto",
        "auto takes the GPU if there is one.",
        kind=TEXT,
        group=COMPUTE,
        choices=("auto", "cpu", "cuda"),
    )
    kernels: str = option(
        "auto",
        "auto takes cuda on a GPU, the native kernels on a processor that has AVX2, else reference "
        "(plain torch). native measures which of the others are fastest here.",
        kind=TEXT,
        group=COMPUTE,
        choices=("auto", *_CPU_KERNELS, "reference", "cuda"),
    )
    threads: int | str = option(
        "auto",
        "Threads that compute; auto is one for each processor this process may use.",
        kind=INTEGER_OR_AUTO,
        group=COMPUTE,
        minimum=1,
        maximum=1024,
    )

    def __post_init__(self) -> None:
        for name, declared in MODEL_OPTIONS.items():
            declared.check(getattr(self, name), name)
        if self.kernels == "cuda" and self.device == "cpu":
            raise ConfigError("kernels: 'cuda' needs device 'cuda' or 'auto', got 'cpu'")
        if self.kernels in _CPU_KERNELS and self.device == "cuda":
            raise ConfigError(f"kernels: {self.kernels!r} computes on the CPU, got device 'cuda'")

    @property
    def cache_folder(self) -> Path | None:
        """The folder that keeps models; None: the default one."""
        return None if self.cache_dir is None else Path(self.cache_dir)


MODEL_OPTIONS = options_of(ModelOptions)


def build_model_options(
    arguments: Mapping[str, Any], *, environ: Mapping[str, str]
) -> ModelOptions:
    """Combine command line, environment and defaults.

    Args:
        arguments: text of the options given on the command line, by name.
        environ: the process environment.

    Raises:
        ConfigError: names the flag or variable at fault.
    """
    return ModelOptions(**read_given(MODEL_OPTIONS, arguments, environ))


def resolve_model_options(
    options: ModelOptions, *, has_cuda: bool, num_processors: int
) -> ModelOptions:
    """Replace the device "auto" by "cuda" or "cpu", and the threads "auto" by a number.

    Args:
        options: what was asked for.
        has_cuda: whether torch finds a CUDA device.
        num_processors: how many this process may use.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    device, threads = options.device, options.threads
    if device == "auto":
        wants_cpu = options.kernels in _CPU_KERNELS or not has_cuda
        device = "cpu" if wants_cpu and options.kernels != "cuda" else "cuda"
    if device == "cuda" and not has_cuda:
        raise ConfigError("device: 'cuda' is asked for, but torch finds no CUDA device")
    if threads == "auto":
        threads = max(1, num_processors)
    return replace(options, device=device, threads=threads)
