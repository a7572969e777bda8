"""`proa train`: train an adapter for a model."""

import argparse
import os
from pathlib import Path
from typing import Any

from adapters.qst.training_config import CHOICES, TrainingConfig
from serve.cli import train_temperature
from serve.cli.arguments import UserError, add_options, add_run_arguments, given_options
from serve.cli.config_flags import add_config_flag, read_config
from serve.environment import let_threads_sleep
from serve.model_options import MODEL_OPTIONS, build_model_options

DESCRIPTION = """\
Train a side network (Quantized Side Tuning) for a model and write it as an adapter. The model stays
in 4 bits and only runs forward; without --model it is the demo model.

Data is a file of JSON lines, or one JSON array. Each entry is one of
  {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}
  {"instruction": ..., "output" or "response": ..., "input": ... (may be missing)}
  {"question": ..., "answer": ...}
  {"prompt": ..., "completion": ...}
  {"text": ...}
The first three go through the model's chat template. What is learnt are the answers, each with the
token that ends it; of "text", everything. With --task classification an entry is
{"text": ..., "label": ...}, or the data is a .tsv file whose header names "label" and "sentence",
or "sentence1" and "sentence2", as the GLUE tasks have them.

The output folder receives the adapter, metrics.jsonl (one line for each step and evaluation),
loss.png and, until the end, checkpoints. Ctrl-C saves a checkpoint; the same command with --resume
goes on from there, or from the last one after a crash, and computes the very same numbers.

With --on the side network is trained on a pruned variant of the model, which heals it: it runs on
that variant alone.
"""

EXAMPLES = """\
examples:
  proa train qst --data chats.jsonl --output ./my-adapter
  proa train qst --on ./small --data chats.jsonl --output ./healed
  proa train qst --data gsm8k.jsonl --output ./gsm --epochs 2 --max-length 512 --long skip
  proa train qst --data chats.jsonl --output ./my-adapter --resume
  proa train qst --task classification --data train.tsv --eval-data dev.tsv --output ./rte
  proa train temperature --evaluation ./drawn --data HumanEval.jsonl.gz --output ./warm
"""

QST, TEMPERATURE = "qst", "temperature"
TASKS = ("causal-lm", "classification")
SIDE_ATTENTIONS = ("own", "base")
DOWNSAMPLES = ("linear", "lora", "adapter", "maxpool", "avgpool")
LONG_POLICIES = ("error", "truncate", "skip")
MODEL_FLAGS = {name: declared.as_flag() for name, declared in MODEL_OPTIONS.items()}
# Flag, type, placeholder, help. What is not given keeps the default of `QstConfig`, whose module
# loads torch; a test compares the numbers here with it.
SIDE_FLAGS: tuple[tuple[str, Any, str, str], ...] = (
    ("--reduction", int, "R", "the side network is this many times narrower than the model "
     "[default: 16]"),
    ("--rank", int, "K", "middle width of the downsamples lora and adapter, or rank of a fork's "
     "differences [default: 16]"),
    ("--side-layers", int, "M", "layers that are forked with --side-attention base [default: 4]"),
    ("--side-heads", int, "N", "attention heads of the side network [default: the model's]"),
    ("--side-kv-heads", int, "N", "its key and value heads [default: the model's]"),
    ("--side-head-dim", int, "N", "width of a head [default: the model's / R]"),
    ("--side-intermediate", int, "N", "MLP width [default: the model's / R]"),
)  # fmt: skip
# Field of TrainingConfig, placeholder, help.
TRAINING_FLAGS = (
    ("learning_rate", "X", "of everything but the gates"),
    ("alpha_learning_rate", "X", "of the final blend's weight and of the mix gates"),
    ("schedule", "", "of both rates after the warm-up"),
    ("warmup", "SHARE", "share of the steps in which the rates rise from 0"),
    ("batch_size", "N", "sequences computed together"),
    ("accumulate", "N", "batches whose gradients make one step"),
    ("weight_decay", "X", "of matrices"),
    ("clip", "X", "largest norm of a step's gradient"),
    ("seed", "N", "of initial weights, data order and held-out examples"),
    ("compute_dtype", "", "of the side network; auto is bfloat16 where that is faster"),
    ("eval_every", "N", "steps between evaluations; there is one at the end in any case"),
    ("checkpoint_every", "N", "steps between checkpoints"),
    ("keep", "", "which weights become the adapter: the last, or those with the least held-out "
     "loss"),
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.epilog = EXAMPLES
    kinds = parser.add_subparsers(dest="method", metavar="METHOD", required=True)
    _add_qst(kinds.add_parser(QST, help="a side network", description=DESCRIPTION, epilog=EXAMPLES))
    train_temperature.add_kind(kinds, TEMPERATURE)


def _add_qst(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("Data")
    data.add_argument("--data", metavar="FILE", type=Path, required=True, help="to train on")
    data.add_argument("--eval-data", metavar="FILE", type=Path, help="to evaluate on")
    _add_training(data, "eval_fraction", "SHARE", "share held out of --data without --eval-data")
    _add_training(data, "eval_limit", "N", "most examples held out")
    data.add_argument("--task", choices=TASKS, default=TASKS[0], help=f"[default: {TASKS[0]}]")
    data.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="most tokens of a sequence [default: the model's context]",
    )
    data.add_argument(
        "--long",
        choices=LONG_POLICIES,
        default=LONG_POLICIES[0],
        help=f"what becomes of longer sequences [default: {LONG_POLICIES[0]}]",
    )
    side = parser.add_argument_group("Side network")
    side.add_argument(
        "--on",
        metavar="DIR",
        type=Path,
        nargs="+",
        default=(),
        help="the variant of the model that it sits on, and what that sits on",
    )
    side.add_argument(
        "--side-attention",
        choices=SIDE_ATTENTIONS,
        default=argparse.SUPPRESS,
        help="base: the model's last layers once more with low-rank differences, on the model's "
        "keys and values; own: a narrow decoder with keys and values of its own, as in the paper "
        "[default: base, or own if an option of such a decoder is given]",
    )
    for flag, kind, metavar, text in SIDE_FLAGS:
        side.add_argument(flag, type=kind, metavar=metavar, help=text, default=argparse.SUPPRESS)
    side.add_argument(
        "--downsample",
        choices=DOWNSAMPLES,
        default=argparse.SUPPRESS,
        help="how it narrows the model's hidden states [default: adapter]",
    )
    training = parser.add_argument_group("Training")
    length = training.add_mutually_exclusive_group()
    _add_training(length, "epochs", "N", "passes over the data")
    _add_training(length, "steps", "N", "optimiser steps, instead of epochs")
    for name, metavar, text in TRAINING_FLAGS:
        _add_training(training, name, metavar, text)
    training.add_argument(
        "--cache-states",
        metavar="DIR",
        type=Path,
        help="keep the model's states of each sequence here: later epochs and other trainings on "
        "the same data do not compute them again",
    )
    add_run_arguments(parser, "adapter")
    add_options(parser, MODEL_FLAGS)


def _add_training(group: Any, name: str, metavar: str, text: str) -> None:
    add_config_flag(group, TrainingConfig(), CHOICES, name, metavar, text)


def read_training_config(arguments: argparse.Namespace) -> TrainingConfig:
    """Return the options of the training.

    Raises:
        UserError: one is out of range.
    """
    known = TrainingConfig.__dataclass_fields__
    given = {name: value for name, value in vars(arguments).items() if name in known}
    return read_config(TrainingConfig, given)


def run(arguments: argparse.Namespace) -> int:
    """Train.

    Returns:
        0, or 130 if it was asked to stop and has saved a checkpoint.

    Raises:
        UserError: an option or the data is wrong.
        CommandError: the training failed.
    """
    if arguments.method == TEMPERATURE:
        return train_temperature.run(arguments)
    config = read_training_config(arguments)
    for flag, path in (("--data", arguments.data), ("--eval-data", arguments.eval_data)):
        if path is not None and not path.is_file():
            raise UserError(f"{flag}: {path} is not a file")
    for folder in arguments.on:
        if not folder.is_dir():
            raise UserError(f"--on: {folder} is not a folder")
    if arguments.max_length is not None and arguments.max_length < 2:
        raise UserError(f"--max-length must be at least 2, got {arguments.max_length}")
    given = given_options(arguments, MODEL_FLAGS)
    options = build_model_options(given, environ=os.environ)
    let_threads_sleep(os.environ)
    # Loads torch, which takes seconds: wrong arguments are refused first.
    from serve.cli.train_run import run_training

    return run_training(arguments, config, options)
