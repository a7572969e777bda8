"""Put the vLLM backend together: checkpoint, engines, adapters."""

import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.network_utils import get_ip

from adapters.format import CONFIG_FILE, AdapterError, StoredAdapter, read_adapter, read_config
from adapters.methods import HeadMethod, SideMethod, host_of, method_of
from models.checkpoints import Checkpoint, CheckpointError, Lineage
from models.spec import DecoderSpec
from models.weights import count_linear_parameters
from serve.attachments.registry import AdapterRegistry, Loaded
from serve.attachments.start import attach_at_start
from serve.backends.building import BuiltBackend, Report
from serve.backends.vllm import linears, loader
from serve.backends.vllm.addresses import AdapterAddress
from serve.backends.vllm.attachments import SideHandle, VllmAttachment
from serve.backends.vllm.backend import VllmBackend
from serve.backends.vllm.engine import EngineLoop, VllmEngine
from serve.backends.vllm.models import BASES, PREFIX, side_cache_values
from serve.backends.vllm.packed_linear import check_share
from serve.backends.vllm.reports import ReportReader
from serve.backends.vllm.settings import (
    KEY,
    SUPPORTED,
    Heads,
    Settings,
    divide_cores,
    find_forms,
    heads_of,
)
from serve.base_model import find_lineage, load_base, load_tokenizer
from serve.config import ServeConfig
from serve.machine import free_memory_bytes
from serve.options import ConfigError
from serve.resolve import resolve_capacity
from text.chat_template import ChatTemplateError
from text.token_bytes import TokenizerError

MAX_ADAPTERS_IN_BATCH = 16
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
GPU_MEMORY = 0.9

logger = logging.getLogger(__name__)


def assemble(config: ServeConfig, *, report: Report) -> BuiltBackend:
    """Build the backend.

    Args:
        config: checked, device and threads resolved.
        report: told what happens.

    Raises:
        ConfigError: see `serve.backends.building.build_backend`.
    """
    options = config.model_options
    try:
        checkpoint = load_base(options, needs_tokenizer=True, report=report)
        tokenizer, _ = load_tokenizer(checkpoint)
    except (CheckpointError, TokenizerError, ChatTemplateError) as error:
        raise ConfigError(str(error)) from error
    for line in tokenizer.warnings():
        report(f"warning: {line}")
    check_adapters(config, checkpoint)
    loop, starter = EngineLoop(), None
    try:
        reports = loop.submit(_listen(config)).result()
        starter = EngineStarter(config, loop, reports, report=report)
        base = starter.start(find_lineage(options, checkpoint), ())
        loader = VllmLoader(starter, base)
        registry: AdapterRegistry[Any, VllmHost] = AdapterRegistry(
            loader.load,
            roots=() if config.adapter_root is None else (Path(config.adapter_root),),
            max_bytes=config.adapter_memory_bytes,
        )
        model_id = config.served_model_name or checkpoint.name
        attach_at_start(registry, config, model_id, report=report)
        starter.is_starting = False
    except BaseException:
        for host in starter.hosts if starter is not None else ():
            host.engine.close()
        loop.close()
        raise
    return BuiltBackend(
        config=starter.config,
        model_name=checkpoint.name,
        kernels=f"vllm-{config.device}",
        backend=VllmBackend(
            base.engine, [host.engine for host in starter.hosts], loop, reports, registry,
            vocab_size=checkpoint.spec.vocab_size,
            max_context_tokens=int(starter.config.max_context),
            end_token_ids=tokenizer.eos_token_ids,
            max_waiting_requests=config.max_waiting_requests,
            max_waiting_tokens=config.max_waiting_tokens,
        ),
        tokenizer=tokenizer,
    )  # fmt: skip


def check_adapters(config: ServeConfig, base: Checkpoint) -> None:
    """Hold what sits on the base against it, before an engine takes its time to start.

    Raises:
        ConfigError: one does not fit.
    """
    for name, folder in (*config.variants, *config.adapters):
        try:
            stored = read_adapter(Path(folder))
            if not stored.config.chain:
                method_of(stored.config).check(stored, host_of(base))
        except AdapterError as error:
            raise ConfigError(f"adapter {name!r}: {error}") from error


async def _listen(config: ServeConfig) -> ReportReader:
    """Open what samplers report to; runs on the engines' loop."""
    if config.executor == "ray":  # workers may be on other machines
        return ReportReader(f"tcp://{get_ip()}:*")
    folder = tempfile.TemporaryDirectory(prefix="proa-")  # for this user only
    return ReportReader(f"ipc://{folder.name}/reports", folder)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class VllmHost:
    """What an adapter can sit on: the base, or a variant.

    Attributes:
        engine: runs it.
        lineage: its weights, and what further variants are derived from.
        variants: folders of the variants that it is made of.
        forms: attention of the side networks that it has caches for.
    """

    engine: VllmEngine
    lineage: Lineage
    variants: tuple[str, ...]
    forms: tuple[Heads, ...]


class EngineStarter:
    """Starts engines: one for the base, one for each variant.

    Args:
        config: device and threads resolved.
        loop: where they run.
        reports: reads what their samplers report.
        report: told what happens.

    Attributes:
        config: with the capacity resolved.
        hosts: what was started.
        is_starting: whether the server is not up yet.
    """

    def __init__(
        self,
        config: ServeConfig,
        loop: EngineLoop,
        reports: ReportReader,
        *,
        report: Report,
    ) -> None:
        self.config = config
        self.report = report
        self.hosts: list[VllmHost] = []
        self.is_starting = True
        self._loop = loop
        self._reports = reports
        self._known = list(known_adapters(config))
        self._num_engines = 1 + len(config.variants)

    def start(self, lineage: Lineage, variants: tuple[str, ...]) -> VllmHost:
        """Start the engine of the base, or of a variant.

        Raises:
            ConfigError: vLLM does not run it as the options say.
        """
        spec = lineage.checkpoint.spec
        try:
            check_share(spec, self.config.tensor_parallel_size)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        widths = sorted({layer.head_dim for layer in spec.layers} - set(CPU_HEAD_SIZES))
        if self.config.device == "cpu" and widths:
            raise ConfigError(
                f"backend: vLLM's attention on the CPU takes heads of {_listed(CPU_HEAD_SIZES)} "
                f"channels; {lineage.checkpoint.name} has {_listed(widths)}"
            )
        chain = lineage.checkpoint.chain
        adapters = [folder for folder in self._known if sits_on(folder, chain)]
        forms = find_forms(adapters, spec)
        self.config = self._size(spec, forms)
        arguments = self._arguments(lineage.checkpoint, variants, adapters, forms)
        try:
            engine = VllmEngine(arguments, self._reports, self._loop)
        except Exception as error:
            logger.debug("vLLM does not start", exc_info=True)
            raise ConfigError(f"backend: vLLM does not start: {error}") from error
        host = VllmHost(engine=engine, lineage=lineage, variants=variants, forms=tuple(forms))
        self.hosts.append(host)
        self.report(
            f"vLLM {SUPPORTED} on {self.config.device}, {self.config.tensor_parallel_size} ranks; "
            f"KV cache for {engine.num_blocks * engine.config.cache_config.block_size} tokens, "
            f"context {self.config.max_context}"
        )
        return host

    def _size(self, spec: DecoderSpec, forms: Sequence[Heads]) -> ServeConfig:
        """Resolve the capacity as the native backend does; on a GPU vLLM itself finds the rest."""
        config = self.config
        free_bytes = free_memory_bytes() // self._num_engines
        if config.device == "cuda":
            free_bytes = int(2 * GPU_MEMORY * torch.cuda.mem_get_info()[0]) // self._num_engines
        return resolve_capacity(
            config, model_context=spec.max_position_embeddings,
            bytes_per_block=config.block_size * self._token_bytes(spec, forms),
            free_bytes=free_bytes,
        )  # fmt: skip

    def _token_bytes(self, spec: DecoderSpec, forms: Sequence[Heads]) -> int:
        """Return the bytes that a token takes in the cache of a rank."""
        size = self.config.tensor_parallel_size
        values = sum(
            2 * max(1, layer.num_key_value_heads // size) * layer.head_dim for layer in spec.layers
        )
        return (values + side_cache_values(forms)) * self._dtype.itemsize

    @property
    def _dtype(self) -> torch.dtype:
        """Format of the hidden states."""
        return torch.float32 if self.config.device == "cpu" else torch.bfloat16

    def _arguments(
        self,
        checkpoint: Checkpoint,
        variants: tuple[str, ...],
        adapters: Sequence[Path],
        forms: Sequence[Heads],
    ) -> AsyncEngineArgs:
        config, spec = self.config, checkpoint.spec
        architecture = architecture_of(checkpoint)
        if architecture not in BASES:
            raise ConfigError(
                f"backend: 'vllm' runs {', '.join(BASES)}; {checkpoint.name} is a {architecture}"
            )
        settings = Settings(
            model=None if config.model is None else str(_absolute(config.model)),
            quantization=config.quantization, cache_dir=config.cache_dir,
            dequantize=config.dequantize, kernels=config.kernels,
            cores=tuple(map(tuple, divide_cores(config))), variants=variants,
            adapters=tuple(map(str, adapters)), reports=self._reports.address,
        )  # fmt: skip
        num_tokens = int(config.kv_cache_tokens)
        cache = num_tokens + 2 * config.block_size  # vLLM keeps a block back
        return AsyncEngineArgs(
            model=str(checkpoint.folder), served_model_name=checkpoint.name,
            # Its metrics are of one engine for each process.
            disable_log_stats=bool(variants), skip_tokenizer_init=True, dtype=str(self._dtype)[6:],
            quantization=linears.NAME, load_format=loader.NAME,
            hf_overrides={"architectures": [f"{PREFIX}{architecture}"]},
            additional_config={KEY: settings.to_json()},
            max_model_len=min(int(config.max_context) + 1, spec.max_position_embeddings),
            max_num_seqs=config.max_running_sequences,
            max_num_batched_tokens=max(config.max_batch_tokens, config.max_running_sequences),
            block_size=config.block_size, enable_prefix_caching=config.prefix_caching,
            kv_cache_memory_bytes=cache * self._token_bytes(spec, forms),
            tensor_parallel_size=config.tensor_parallel_size,
            distributed_executor_backend=None if config.executor == "auto" else config.executor,
            # Side networks run from Python hooks, which a captured graph would leave out.
            enforce_eager=config.device == "cpu" or bool(forms),
            enable_lora=bool(forms), max_loras=MAX_ADAPTERS_IN_BATCH, max_lora_rank=8, seed=0,
        )  # fmt: skip


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _absolute(model: str) -> Path | str:
    """Return a path that means the same in every process; a hub id stays as it is."""
    path = Path(model).expanduser()
    return path.resolve() if path.exists() else model


def architecture_of(checkpoint: Checkpoint) -> str:
    """Return the architecture that a checkpoint's config.json names."""
    config: Any = json.loads(Path(checkpoint.folder, "config.json").read_text(encoding="utf-8"))
    return str((config.get("architectures") or ["?"])[0])


def known_adapters(config: ServeConfig) -> Iterator[Path]:
    """Yield the folders of the adapters that may be attached: vLLM makes room for their caches when
    it starts.
    """
    yield from (Path(folder) for _, folder in config.adapters)
    if config.adapter_root is not None:
        root = Path(config.adapter_root)
        for pattern in (f"*/{CONFIG_FILE}", f"*/*/{CONFIG_FILE}"):
            yield from sorted(path.parent for path in root.glob(pattern))


def sits_on(folder: Path, chain: tuple[str, ...]) -> bool:
    """Tell whether an adapter was made for a model with a chain."""
    try:
        return tuple(read_config(folder).chain) == chain
    except AdapterError:
        return False  # whoever attaches it is told


class VllmLoader:
    """Makes of an adapter what requests need of it.

    Args:
        starter: starts the engines of variants.
        base: what nothing is below.
    """

    def __init__(self, starter: EngineStarter, base: VllmHost) -> None:
        self._starter = starter
        self._base = base
        self._num_linear_parameters = count_linear_parameters(base.lineage.checkpoint.weights)

    def load(self, stored: StoredAdapter, below: VllmHost | None) -> Loaded[Any, VllmHost]:
        """Hold an adapter against what it sits on, and start what it needs.

        Raises:
            AdapterError: it does not fit, or vLLM makes no room for it while it runs.
            CheckpointError: the base's original weights cannot be read, or there are none.
        """
        on, method = below or self._base, method_of(stored.config)
        host = host_of(on.lineage.checkpoint)
        address = AdapterAddress(folder=str(stored.folder), digest=stored.digest)
        num_parameters = sum(tensor.numel() for tensor in stored.tensors.values())
        num_bytes = 4 * num_parameters
        if isinstance(method, SideMethod):
            adapter = method.build(stored, host)
            heads = heads_of(adapter.network)
            if heads not in on.forms:
                raise AdapterError(
                    f"vLLM makes room for a side network's cache when it starts, and has none for "
                    f"heads such as {heads[0]}; start it with --adapter, or with the folder below "
                    "--adapter-root"
                )
            side = SideHandle(on.engine, address)
            return Loaded(
                given=VllmAttachment(engine=on.engine, side=side), num_parameters=num_parameters,
                num_bytes=num_bytes, labels=adapter.qst.label_names,
            )  # fmt: skip
        if isinstance(method, HeadMethod):
            method.build(stored, host)
            given = VllmAttachment(engine=on.engine, head=str(address))
            return Loaded(given=given, num_parameters=num_parameters, num_bytes=num_bytes)
        derivation = method.derive(stored, host)
        if not self._starter.is_starting:
            raise AdapterError(
                "vLLM runs each variant in an engine of its own, which is started with the server: "
                "give it with --variant"
            )
        lineage = on.lineage.derive(derivation, report=self._starter.report)
        variant = self._starter.start(lineage, (*on.variants, str(stored.folder)))
        num_parameters = count_linear_parameters(lineage.checkpoint.weights)
        return Loaded(
            given=VllmAttachment(engine=variant.engine), below=variant,
            num_parameters=num_parameters, num_bytes=num_bytes,
            removed=1 - num_parameters / self._num_linear_parameters,
        )  # fmt: skip
