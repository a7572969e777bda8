"""Quantise a model from the command line: the calibration text, then the folder."""

import argparse
from dataclasses import replace

import torch
from torch import Tensor

from adapters.calibration import mean_square_inputs
from adapters.frozen_head import head_weight
from models.checkpoints import CheckpointError, quantize_checkpoint
from models.program import build_program
from serve.base_model import load_base
from serve.cli.arguments import UserError, say
from serve.model_options import ModelOptions
from text.chat_template import ChatTemplateError
from text.errors import TokenOutsideVocabularyError
from text.token_bytes import TokenizerError
from text.tokenizer import Tokenizer

MIN_TOKENS = 256
_MAX_TOKENS = 8192
_WINDOW = 512
_WINDOWS_AT_A_TIME = 4


def run_quantize(arguments: argparse.Namespace, options: ModelOptions, text: str | None) -> None:
    """Quantise as `serve.cli.quantize` was told; see its `run`."""
    try:
        quantize_checkpoint(
            arguments.model,
            arguments.output,
            double_quant=arguments.double_quant,
            quant_type=arguments.quant_type,
            search=arguments.search,
            importance=None if text is None else measure_importance(options, text),
            cache_dir=options.cache_folder,
            report=say,
        )
    except TokenOutsideVocabularyError as error:
        raise UserError(f"--text: {arguments.text}: {error}") from None
    except (CheckpointError, TokenizerError, ChatTemplateError) as error:
        raise UserError(str(error)) from None
    say(f"serve it with: proa serve {arguments.output}")


def measure_importance(options: ModelOptions, text: str) -> dict[str, Tensor]:
    """Measure, in a model's own weights, how much each input of its linears counts on a text.

    Args:
        options: name the model.
        text: windows all over it are read, 8,192 tokens at most.

    Returns:
        (in_features,) float32 by the linear's canonical name.

    Raises:
        UserError: the model is in 4 bits already, or the text is too short.
        CheckpointError: the model cannot be found or read, or has no tokenizer.
    """
    options = replace(options, quantization="none")
    checkpoint = load_base(options, needs_tokenizer=True, report=say)
    if checkpoint.quantization != "none":
        raise UserError(f"MODEL: {options.model} is quantised to 4 bits already")
    tokenizer = Tokenizer.from_folder(checkpoint.folder, num_embeddings=checkpoint.spec.vocab_size)
    windows = cut_windows(
        tokenizer.encode(text, add_special_tokens=False), checkpoint.spec.max_position_embeddings
    )
    say(f"reading {sum(map(len, windows))} tokens of the text with {checkpoint.name}")
    program = build_program(checkpoint.spec, checkpoint.weights, head_weight(checkpoint))
    batches = [
        windows[i : i + _WINDOWS_AT_A_TIME] for i in range(0, len(windows), _WINDOWS_AT_A_TIME)
    ]
    importance = mean_square_inputs(program, batches)
    if not all(bool(means.isfinite().all()) for means in importance.values()):
        raise UserError("--text: what the model computes of it overflows")
    return importance


def cut_windows(token_ids: list[int], context: int) -> list[Tensor]:
    """Choose windows at equal distances all over a text.

    Args:
        token_ids: of the text.
        context: most tokens that the model reads.

    Returns:
        (S,) int64 each, all of one length.

    Raises:
        UserError: the text is too short.
    """
    if len(token_ids) < MIN_TOKENS:
        raise UserError(
            f"--text: has {len(token_ids)} tokens; at least {MIN_TOKENS} are needed to weigh inputs"
        )
    length = min(_WINDOW, context, len(token_ids))
    count = min(_MAX_TOKENS, len(token_ids)) // length
    last = len(token_ids) - length
    starts = [i * last // max(1, count - 1) for i in range(count)]
    return [torch.tensor(token_ids[start : start + length]) for start in starts]
