"""Run a compression from the command line: model, text, signals, what is told."""

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch

from adapters.format import AdapterError
from adapters.methods import host_of
from adapters.mixed_rank.compress import CompressResult, compress
from adapters.mixed_rank.compress_config import CompressConfig
from adapters.mixed_rank.ranks import BudgetError
from models.checkpoints import Checkpoint, CheckpointError
from serve.base_model import load_base, load_variant, settle_memory
from serve.cli.arguments import UserError, say
from serve.cli.long_run import run_to_end
from serve.cli.stop_signals import INTERRUPTED
from serve.cli.variant_result import describe_variant, say_what_next
from serve.machine import count_processors
from serve.model_options import ModelOptions, resolve_model_options
from text.chat_template import ChatTemplateError
from text.errors import TokenOutsideVocabularyError
from text.text_file import read_text
from text.token_bytes import TokenizerError
from text.tokenizer import Tokenizer


def run_compression(
    arguments: argparse.Namespace, config: CompressConfig, options: ModelOptions
) -> int:
    """Compress as `serve.cli.compress` was told; see its `run`."""
    options = resolve_model_options(options, has_cuda=False, num_processors=count_processors())
    text = read_text(arguments.data)
    if not text.strip():
        raise UserError(f"{arguments.data}: the file is empty")
    try:
        served, original = load_both(arguments, options)
        tokenizer = Tokenizer.from_folder(served.folder, num_embeddings=served.spec.vocab_size)
        token_ids = tokenizer.encode(text, add_special_tokens=False)
    except TokenOutsideVocabularyError as error:
        raise UserError(f"--data: {arguments.data}: {error}") from None
    except AdapterError as error:
        raise UserError(f"--on: {error}") from None
    except (CheckpointError, TokenizerError, ChatTemplateError) as error:
        raise UserError(str(error)) from error
    context = served.spec.max_position_embeddings
    if config.length > context:
        raise UserError(f"--length: {config.length} is more than the model's {context} tokens")
    needed = (config.sequences + 1) * config.length
    if len(token_ids) < needed:
        raise UserError(
            f"--data: {arguments.data} has {len(token_ids)} tokens; --sequences "
            f"{config.sequences} of --length {config.length} take {needed}; give more text, or "
            "fewer or shorter sequences"
        )
    torch.set_num_threads(int(options.threads))
    settle_memory(original.weights_folder)
    say(f"{arguments.data}: {len(token_ids)} tokens; {options.threads} threads")

    def start(should_stop: Callable[[], bool]) -> CompressResult:
        return compress(
            original, torch.as_tensor(token_ids), arguments.output, host=host_of(served),
            config=config, resume=arguments.resume, description=arguments.description,
            should_stop=should_stop, report=say,
        )  # fmt: skip

    try:
        result = run_to_end(start)
    except BudgetError as error:
        raise UserError(f"--remove: {error}") from None
    if result is None:
        return INTERRUPTED
    say(describe_variant(result))
    say_what_next(result.folder)
    return 0


def load_both(
    arguments: argparse.Namespace, options: ModelOptions
) -> tuple[Checkpoint, Checkpoint]:
    """Load a model as it is served, then with the weights that are factored.

    These are the original ones; of a variant, those that it is served with.

    Raises:
        CheckpointError: the model cannot be found or read.
        AdapterError: a folder of `--on` does not hold a variant of it.
    """
    served = load_base(options, report=say)
    if arguments.on:
        variant = load_variant(options, served, arguments.on, report=say)
        return variant, variant
    if served.quantization in ("gguf", "none"):
        return served, served
    return served, load_base(replace(options, quantization="none"), report=say)
