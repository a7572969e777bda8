"""Load the base model as the options say; what the server, training and adapter checks share."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import cast

from decoding import TokenTables, build_token_tables
from models.checkpoints import Checkpoint, load_checkpoint
from models.decoder import Decoder, HeadPrecision, KernelChoice
from serve.config import ServeConfig
from serve.machine import release_mapped_pages, trim_heap
from serve.options import ConfigError
from serve.text.tokenizer import Tokenizer


def load_base(config: ServeConfig, *, report: Callable[[str], None]) -> Checkpoint:
    """Load the checkpoint that the options name.

    Raises:
        CheckpointError: it cannot be found or read.
    """
    return load_checkpoint(
        config.model,
        quantization=config.quantization,
        cache_dir=None if config.cache_dir is None else Path(config.cache_dir),
        report=report,
    )


def load_tokenizer(checkpoint: Checkpoint) -> tuple[Tokenizer, TokenTables]:
    """Return the tokenizer, and the tables of its tokens with one entry for each logit."""
    tokenizer = Tokenizer.from_folder(checkpoint.folder)
    vocab_size = checkpoint.spec.vocab_size
    token_bytes = tokenizer.token_bytes()[:vocab_size]
    padding = [None] * (vocab_size - len(token_bytes))
    return tokenizer, build_token_tables([*token_bytes, *padding])


def build_decoder(config: ServeConfig, checkpoint: Checkpoint) -> Decoder:
    """Build the decoder.

    Args:
        config: with device and threads resolved.
        checkpoint: its weights.

    Raises:
        ConfigError: the kernels asked for cannot run here.
    """
    try:
        return Decoder(
            checkpoint.spec,
            checkpoint.weights,
            kernels=cast(KernelChoice, config.kernels),
            device=config.device,
            head=cast(HeadPrecision, config.head),
            num_threads=int(config.threads),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def settle_memory(folder: Path) -> None:
    """Give back what loading a checkpoint's folder has used and nothing needs any more."""
    gc.collect()
    trim_heap()
    release_mapped_pages(folder)
