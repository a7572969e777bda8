"""Run a search for a pruned variant from the command line: model, text, signals, what is told."""

import argparse
from dataclasses import replace

import torch

from adapters.disp.budget import BudgetError, check_shares, linears_share
from adapters.disp.search import search
from adapters.disp.search_config import SearchConfig
from models.checkpoints import Checkpoint, CheckpointError
from models.spec import DecoderSpec
from models.weights import Weight, dense
from serve.base_model import load_base, settle_memory
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


def run_search(arguments: argparse.Namespace, config: SearchConfig, options: ModelOptions) -> int:
    """Search as `serve.cli.prune` was told; see its `run`."""
    options = resolve_model_options(
        options, has_cuda=torch.cuda.is_available(), num_processors=count_processors()
    )
    text = read_text(arguments.data)
    if not text.strip():
        raise UserError(f"{arguments.data}: the file is empty")
    try:
        original, served = load_originals(options)
        tokenizer = Tokenizer.from_folder(original.folder, num_embeddings=original.spec.vocab_size)
        token_ids = tokenizer.encode(text, add_special_tokens=False)
    except TokenOutsideVocabularyError as error:
        raise UserError(f"--data: {arguments.data}: {error}") from None
    except (CheckpointError, TokenizerError, ChatTemplateError) as error:
        raise UserError(str(error)) from error
    context = original.spec.max_position_embeddings
    if config.length > context:
        raise UserError(f"--length: {config.length} is more than the model's {context} tokens")
    if len(token_ids) <= config.length:
        raise UserError(
            f"--data: {arguments.data} has {len(token_ids)} tokens; a window of --length "
            f"{config.length} takes {config.length + 1}, give more text or a smaller --length"
        )
    config = resolve_shares(config, original.spec, is_total=arguments.remove_total is not None)
    torch.set_num_threads(int(options.threads))
    settle_memory(original.weights_folder)
    say(f"{arguments.data}: {len(token_ids)} tokens; {options.threads} threads")
    results = run_to_end(
        lambda should_stop: search(
            as_served(original, served),
            token_ids,
            arguments.output,
            base_fingerprint=served.fingerprint,
            base_quantization=served.quantization,
            config=config,
            device=options.device,
            resume=arguments.resume,
            description=arguments.description,
            should_stop=should_stop,
            report=say,
        )
    )
    if results is None:
        return INTERRUPTED
    for result in results:
        say(describe_variant(result))
    say_what_next(results[0].folder)
    return 0


def load_originals(options: ModelOptions) -> tuple[Checkpoint, Checkpoint]:
    """Load a model twice: its original weights, and as it is served by default.

    Args:
        options: name the model; `dequantize` takes 4-bit weights where there are no others.

    Raises:
        CheckpointError: the model cannot be found or read.
        UserError: it has only 4-bit weights.
    """
    served = load_base(replace(options, quantization="auto"), report=say)
    original = load_base(replace(options, quantization="none"), report=say)
    if original.quantization != "none":
        if not options.dequantize:
            raise UserError(
                f"--model: the weights of {original.name} are in 4 bits "
                f"({original.quantization}); a search, and slicing after it, need the original "
                "ones. Name those, or give --dequantize, which takes what 4 bits have left of them "
                "and costs quality"
            )
        say(
            f"warning: {original.name} has 4-bit weights only; what is cut out of them is rounded "
            "to 4 bits a second time, which costs quality"
        )
        weights = dense_weights(original)
        original = replace(original, weights=weights, quantization="none", known_fingerprint=None)
    return original, served


def as_served(original: Checkpoint, served: Checkpoint) -> Checkpoint:
    """Return the original with weights that are rounded as those it is served with.

    A variant is rounded too before it is served, and a search that knows it chooses channels that
    suffer less.
    """
    weights, fingerprint = dense_weights(served), original.fingerprint
    return replace(original, weights=weights, known_fingerprint=fingerprint)


def dense_weights(checkpoint: Checkpoint) -> dict[str, Weight]:
    """Return a checkpoint's weights with no matrix in 4 bits."""
    return {name: dense(weight) for name, weight in checkpoint.weights.items()}


def resolve_shares(config: SearchConfig, spec: DecoderSpec, *, is_total: bool) -> SearchConfig:
    """Turn shares of the whole model into those of linears, and refuse what cannot be reached.

    Raises:
        UserError: names the largest share that can be.
    """
    try:
        if is_total:
            shares = [linears_share(spec, share, align=config.align) for share in config.remove]
            config = replace(config, remove=tuple(shares))
        check_shares(spec, config.remove, config.align)
    except BudgetError as error:
        raise UserError("--" + str(error).replace("remove_total", "remove-total", 1)) from None
    return config
