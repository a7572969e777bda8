"""Load the base and its variants as the options say; the server, training and checks share it."""

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from adapters.format import read_adapter
from adapters.methods import derive_variant, host_of, order_chain
from decoding import TokenTables, build_token_tables
from models.checkpoints import Checkpoint, Lineage, Originals, load_checkpoint
from models.decoder import Decoder, HeadPrecision, KernelChoice
from serve.machine import release_mapped_pages, trim_heap
from serve.model_options import ModelOptions
from serve.options import ConfigError
from text.tokenizer import Tokenizer


def load_base(
    options: ModelOptions, *, needs_tokenizer: bool = False, report: Callable[[str], None]
) -> Checkpoint:
    """Load the checkpoint that the options name; see `load_checkpoint`.

    Raises:
        CheckpointError: it cannot be found or read.
    """
    return load_checkpoint(
        options.model,
        quantization=options.quantization,
        cache_dir=options.cache_folder,
        needs_tokenizer=needs_tokenizer,
        report=report,
    )


def find_lineage(options: ModelOptions, base: Checkpoint) -> Lineage:
    """Return what variants of a base are derived from; `options` are what it was loaded with."""
    originals = Originals(
        options.model, base, cache_dir=options.cache_folder, dequantize=options.dequantize
    )
    return Lineage(checkpoint=base, originals=originals)


def load_variant(
    options: ModelOptions,
    base: Checkpoint,
    folders: Sequence[Path],
    *,
    report: Callable[[str], None],
) -> Checkpoint:
    """Load the variant that some adapters make of a base, one on the other.

    Args:
        options: what `base` was loaded with.
        base: no variant.
        folders: of the adapters, in any order; at least one.
        report: called with one line at a time about what is being done.

    Raises:
        AdapterError: a folder does not hold a variant of this base, or they do not follow one
            another.
        CheckpointError: the base's original weights cannot be read, or there are none.
    """
    adapters = {folder: read_adapter(folder) for folder in folders}
    top = max(adapters.values(), key=lambda stored: len(stored.config.chain))
    lineage = find_lineage(options, base)
    for folder in order_chain((*top.config.chain, top.digest), adapters):
        step = derive_variant(folder, adapters[folder], host_of(lineage.checkpoint))
        lineage = lineage.derive(step, report=report)
    return lineage.checkpoint


def load_tokenizer(checkpoint: Checkpoint) -> tuple[Tokenizer, TokenTables]:
    """Return the tokenizer, and the tables of its tokens with one entry for each logit."""
    vocab_size = checkpoint.spec.vocab_size
    tokenizer = Tokenizer.from_folder(checkpoint.folder, num_embeddings=vocab_size)
    return tokenizer, make_tables(tokenizer, vocab_size)


def make_tables(tokenizer: Tokenizer, vocab_size: int) -> TokenTables:
    """Return the tables of a tokenizer's tokens, one entry for each of `vocab_size` logits."""
    token_bytes = tokenizer.token_bytes()[:vocab_size]
    padding = [None] * (vocab_size - len(token_bytes))
    return build_token_tables([*token_bytes, *padding])


def build_decoder(
    options: ModelOptions, checkpoint: Checkpoint, base: Decoder | None = None
) -> Decoder:
    """Build the decoder.

    Args:
        options: with device and threads resolved.
        checkpoint: its weights.
        base: the decoder of the base that `checkpoint` is a variant of; the two share what is
            equal. None: nothing is shared.

    Raises:
        ConfigError: the kernels asked for cannot run here.
    """
    try:
        return Decoder(
            checkpoint.spec,
            checkpoint.weights,
            kernels=cast(KernelChoice, options.kernels),
            device=options.device,
            head=cast(HeadPrecision, options.head),
            num_threads=int(options.threads),
            base=base,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def settle_memory(folder: Path) -> None:
    """Give back what loading a checkpoint's folder has used and nothing needs any more."""
    gc.collect()
    trim_heap()
    release_mapped_pages(folder)
