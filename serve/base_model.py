"""Load the base and its variants as the options say; the server, training and checks share it."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import cast

from adapters.disp.variant import DispVariant, load_disp
from decoding import TokenTables, build_token_tables
from models.checkpoints import Checkpoint, load_checkpoint
from models.checkpoints.pruned import load_pruned
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


def load_variant(
    options: ModelOptions, base: Checkpoint, folder: Path, *, report: Callable[[str], None]
) -> tuple[DispVariant, Checkpoint]:
    """Load a pruned variant of the base, and the weights that it leaves.

    Args:
        options: what `base` was loaded with.
        base: not pruned.
        folder: of the variant.
        report: called with one line at a time about what is being done.

    Raises:
        AdapterError: the folder does not hold a variant of this base.
        CheckpointError: the base's original weights cannot be read, or there are none.
    """
    variant = load_disp(
        folder, base.spec, fingerprint=base.fingerprint, quantization=base.quantization,
        model_id=base.name,
    )  # fmt: skip
    pruned = load_pruned(
        options.model, base, variant.selections, digest=variant.digest,
        cache_dir=options.cache_folder, dequantize=options.dequantize, report=report,
    )  # fmt: skip
    return variant, pruned


def load_tokenizer(checkpoint: Checkpoint) -> tuple[Tokenizer, TokenTables]:
    """Return the tokenizer, and the tables of its tokens with one entry for each logit."""
    vocab_size = checkpoint.spec.vocab_size
    tokenizer = Tokenizer.from_folder(checkpoint.folder, num_embeddings=vocab_size)
    token_bytes = tokenizer.token_bytes()[:vocab_size]
    padding = [None] * (vocab_size - len(token_bytes))
    return tokenizer, build_token_tables([*token_bytes, *padding])


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
