"""Run a training from the command line: model, data, signals, and what is told."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from adapters.format import AdapterError
from adapters.frozen_head import perplexity
from adapters.qst.config import QstConfig
from adapters.qst.examples import Example
from adapters.qst.network import QstNetwork
from adapters.qst.training import TrainingResult, train
from adapters.qst.training_config import TrainingConfig
from models.checkpoints import Checkpoint, CheckpointError
from serve.base_model import build_decoder, load_base, load_variant, settle_memory
from serve.cli.arguments import UserError, say
from serve.cli.long_run import run_to_end
from serve.cli.stop_signals import INTERRUPTED
from serve.machine import count_processors
from serve.model_options import ModelOptions, resolve_model_options
from text.chat_template import ChatTemplateError
from text.records import read_records
from text.token_bytes import TokenizerError
from text.tokenizer import Tokenizer
from text.training_data import Limit, build_examples, build_labelled, describe_examples

FORK_FIELDS = ("side_attention", "side_layers", "rank")
QST_FIELDS = (
    "side_attention", "side_layers", "reduction", "rank", "downsample", "side_heads",
    "side_kv_heads", "side_head_dim", "side_intermediate",
)  # fmt: skip


def run_training(
    arguments: argparse.Namespace, config: TrainingConfig, options: ModelOptions
) -> int:
    """Train as `serve.cli.train` was told; see its `run`."""
    options = resolve_model_options(
        options, has_cuda=torch.cuda.is_available(), num_processors=count_processors()
    )
    try:
        checkpoint = load_base(options, needs_tokenizer=True, report=say)
        tokenizer = Tokenizer.from_folder(
            checkpoint.folder, num_embeddings=checkpoint.spec.vocab_size
        )
    except (CheckpointError, TokenizerError, ChatTemplateError) as error:
        raise UserError(str(error)) from error
    for line in tokenizer.warnings():
        say(f"warning: {line}")
    if arguments.on:
        try:
            checkpoint = load_variant(options, checkpoint, arguments.on, report=say)
        except (AdapterError, CheckpointError) as error:
            raise UserError(f"--on: {error}") from error
    examples, eval_examples, labels = read_data(arguments, checkpoint, tokenizer)
    try:
        qst = QstConfig(
            **side_options(arguments),
            task="sequence_classification" if labels else "causal_lm",
            num_labels=len(labels),
            labels=labels,
        )
        QstNetwork(checkpoint.spec, qst, device="meta")
    except AdapterError as error:
        raise UserError(str(error)) from None
    decoder = build_decoder(options, checkpoint)
    torch.set_num_threads(int(options.threads))
    settle_memory(checkpoint.weights_folder)
    say(f"{decoder.kernels} kernels, {options.threads} threads")
    result = run_to_end(
        lambda should_stop: train(
            decoder,
            checkpoint,
            examples,
            arguments.output,
            qst=qst,
            config=config,
            eval_examples=eval_examples,
            device=options.device,
            resume=arguments.resume,
            state_folder=arguments.cache_states,
            description=arguments.description,
            should_stop=should_stop,
            report=say,
        )
    )
    if result is None:
        return INTERRUPTED
    for line in describe_result(result, arguments.output, arguments.on):
        say(line)
    return 0


def side_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of `QstConfig` that were given, and which form they are of.

    Raises:
        UserError: options of both forms were given.
    """
    given = {name: value for name, value in vars(arguments).items() if name in QST_FIELDS}
    narrow = [f"--{name.replace('_', '-')}" for name in given if name not in FORK_FIELDS]
    form = given.setdefault("side_attention", "own" if narrow else "base")
    if form == "base" and narrow:
        raise UserError(f"{', '.join(narrow)}: not with --side-attention base")
    return given


def read_data(
    arguments: argparse.Namespace, checkpoint: Checkpoint, tokenizer: Tokenizer
) -> tuple[list[Example], list[Example] | None, tuple[str, ...]]:
    """Return the examples to train on, those to evaluate on if given, and the classes.

    Raises:
        UserError: a file is malformed, or sequences are too long.
    """
    context = checkpoint.spec.max_position_embeddings
    max_length = arguments.max_length or context
    if max_length > context:
        raise UserError(f"--max-length: {max_length} is more than the model's {context} tokens")
    reason = "--max-length" if arguments.max_length else "the model's context"
    labels: tuple[str, ...] = ()
    found: list[list[Example]] = []
    for path in (arguments.data, arguments.eval_data):
        if path is None:
            continue
        limit = Limit(max_tokens=max_length, policy=arguments.long, reason=reason)
        records = read_records(path)
        if arguments.task == "classification":
            examples, labels = build_labelled(records, tokenizer, limit, labels=labels or None)
        else:
            examples = build_examples(records, tokenizer, limit)
        describe_examples(str(path), examples, limit, say)
        found.append(examples)
    return found[0], found[1] if len(found) > 1 else None, labels


def describe_result(result: TrainingResult, output: Path, variants: Sequence[Path]) -> list[str]:
    """Return the lines that end a training.

    Args:
        result: what came of it.
        output: folder of the adapter.
        variants: folders of those that it sits on.
    """
    lines = [result.memory.describe()]
    found = result.evaluation
    if found is not None:
        if found.base_loss is not None:
            base = f"base {found.base_loss:.4f}, perplexity {perplexity(found.base_loss):.3f}; "
        else:
            base = ""
        adapted = f"with the side network {found.loss:.4f}, perplexity {found.perplexity:.3f}"
        if found.accuracy is not None:
            adapted = f"{found.loss:.4f}, accuracy {found.accuracy:.1%}"
        lines.append(f"held-out loss: {base}{adapted}")
    lines.append(f"{output}: {result.steps} steps, {result.num_parameters} parameters")
    if found is None or found.accuracy is None:
        below = "".join(f"--variant {path.resolve().name}={path} " for path in variants)
        lines.append(f"serve it with: proa serve {below}--adapter {output.resolve().name}={output}")
    return lines
