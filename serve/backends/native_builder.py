"""Build the embedded backend: checkpoint, decoder, adapters, sampler and engine."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from decoding import Sampler
from models.checkpoints import Checkpoint, CheckpointError
from models.decoder import Decoder
from serve.attachments.native import NativeHost, NativeLoader, NativeRegistry
from serve.attachments.start import attach_at_start
from serve.backends.building import BuiltBackend, Report
from serve.backends.native import NativeBackend
from serve.base_model import (
    build_decoder,
    find_lineage,
    load_base,
    load_tokenizer,
    settle_memory,
)
from serve.config import ServeConfig
from serve.engine.limits import EngineLimits
from serve.machine import count_processors, free_memory_bytes
from serve.model_options import resolve_model_options
from serve.options import ConfigError
from serve.resolve import resolve_capacity
from text.chat_template import ChatTemplateError
from text.token_bytes import TokenizerError

CACHE_DTYPES = {
    "auto": None,
    "float16": torch.float16,
    "float32": torch.float32,
    "int8": torch.int8,
}


def build(config: ServeConfig, *, report: Report) -> BuiltBackend:
    """Build the backend; see `serve.backends.building.build_backend`."""
    options = resolve_model_options(
        config.model_options,
        has_cuda=torch.cuda.is_available(),
        num_processors=count_processors(),
    )
    config = replace(config, **asdict(options))
    try:
        checkpoint = load_base(options, needs_tokenizer=True, report=report)
        # The tokenizer loads while the decoder packs its weights: both leave Python's lock alone.
        with ThreadPoolExecutor(1) as pool:
            loading = pool.submit(load_tokenizer, checkpoint)
            decoder = build_decoder(options, checkpoint)
            # The native kernels have their own threads; torch's would only get in their way.
            is_torch = decoder.kernels == "reference"
            torch.set_num_threads(int(config.threads) if is_torch else 1)
            tokenizer, tables = loading.result()
        # Nothing else computes while the speed of variants is measured.
        registry = _build_registry(config, decoder, checkpoint, report)
    except (CheckpointError, TokenizerError, ChatTemplateError) as error:
        raise ConfigError(str(error)) from error
    for line in tokenizer.warnings():
        report(f"warning: {line}")
    name, folder, eos_token_ids = (
        checkpoint.name,
        checkpoint.weights_folder,
        tokenizer.eos_token_ids,
    )
    # Its weights are mapped from disk, and stay so for variants; what the decoder reads, it has.
    del checkpoint
    settle_memory(folder)
    config = _size_cache(config, decoder, report)
    sampler = Sampler(
        tables, eos_token_ids=eos_token_ids, device=config.device, picker=decoder.make_picker()
    )
    try:
        backend = NativeBackend(
            decoder, sampler, _limits(config), eos_token_ids=eos_token_ids, adapters=registry
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return BuiltBackend(
        config=config,
        model_name=name,
        kernels=decoder.kernels,
        backend=backend,
        tokenizer=tokenizer,
    )


def _build_registry(
    config: ServeConfig, decoder: Decoder, checkpoint: Checkpoint, report: Report
) -> NativeRegistry | None:
    """Attach the variants and adapters of the start; None where there can be none.

    The fingerprint that they are held against may take a pass over all weights.
    """
    if not config.adapter and not config.variant and config.adapter_root is None:
        return None
    loader = NativeLoader(
        NativeHost(decoder=decoder, lineage=find_lineage(config.model_options, checkpoint)),
        partial(build_decoder, config.model_options),
        report=report,
    )
    registry = NativeRegistry(
        loader.load,
        roots=() if config.adapter_root is None else (Path(config.adapter_root),),
        max_bytes=config.adapter_memory_bytes,
    )
    model_id = config.served_model_name or checkpoint.name
    attach_at_start(registry, config, model_id, report=report)
    return registry


def _size_cache(config: ServeConfig, decoder: Decoder, report: Report) -> ServeConfig:
    block_bytes = decoder.cache_bytes_per_block(
        block_size=config.block_size, dtype=CACHE_DTYPES[config.kv]
    )
    if config.device == "cuda":
        free_bytes = torch.cuda.mem_get_info()[0]
    else:
        free_bytes = free_memory_bytes()
    model_context = decoder.spec.max_position_embeddings
    config = resolve_capacity(
        config, model_context=model_context, bytes_per_block=block_bytes, free_bytes=free_bytes
    )
    size_mb = int(config.kv_cache_tokens) // config.block_size * block_bytes / 1e6
    report(
        f"{decoder.kernels} kernels, {config.threads} threads; KV cache for "
        f"{config.kv_cache_tokens} tokens (at most {size_mb:.0f} MB), context {config.max_context}"
    )
    return config


def _limits(config: ServeConfig) -> EngineLimits:
    """Return the engine's share of a configuration whose capacity is resolved."""
    return EngineLimits(
        num_cache_blocks=int(config.kv_cache_tokens) // config.block_size,
        block_size=config.block_size,
        cache_dtype=CACHE_DTYPES[config.kv],
        prefix_caching=config.prefix_caching,
        max_context_tokens=int(config.max_context),
        max_batch_tokens=config.max_batch_tokens,
        max_running_sequences=config.max_running_sequences,
        max_waiting_requests=config.max_waiting_requests,
        max_waiting_tokens=config.max_waiting_tokens,
    )
