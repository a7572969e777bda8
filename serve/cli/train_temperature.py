"""`proa train temperature`: a temperature head from programs that passed and failed their tests."""

import argparse
import os
from pathlib import Path
from typing import Any

from serve.cli.arguments import UserError, add_options, given_options
from serve.environment import let_threads_sleep
from serve.model_options import MODEL_OPTIONS, build_model_options

DESCRIPTION = """\
Train a temperature head for the strategy "learned": a small network that reads the model's final
hidden state and gives the temperature of the next token. It learns from the folder of a finished
`proa eval humaneval` or `mbpp` (or `proa compare`) with many samples of each task, drawn at one
plain temperature: tokens of programs that did better than others of their task become more likely.
The model is frozen; without --model it is the demo model. Reading the programs takes most of the
time, and nothing is written before the end.
"""

EXAMPLES = """\
examples:
  proa eval humaneval --data HumanEval.jsonl.gz --part 1/2 --temperature 0.8 --samples 20 \\
      --allow-code-execution --output ./drawn
  proa train temperature --evaluation ./drawn --data HumanEval.jsonl.gz --output ./warm
  proa serve --adapter warm=./warm        (then ask the model id smollm2:warm)
"""

_MODEL_FLAGS = {name: declared.as_flag() for name, declared in MODEL_OPTIONS.items()}
# Field of HeadTraining or HeadConfig, type, placeholder, help; a test compares the defaults.
HEAD_FLAGS: tuple[tuple[str, Any, str, str], ...] = (
    ("k", int, "K", "of the pass@k that is to rise [default: 10]"),
    ("width", int, "N", "middle units of the head [default: 32]"),
    ("least", float, "T", "least temperature that it can give [default: 0.1]"),
    ("most", float, "T", "largest [default: 1.5]"),
    ("epochs", int, "N", "passes over all programs; the best by held-out tasks is kept "
     "[default: 200]"),
    ("learning_rate", float, "X", "of Adam [default: 0.003]"),
    ("weight_decay", float, "X", "of the matrices [default: 0.01]"),
    ("clip", float, "X", "how far from 1 the ratio of a token's probabilities counts "
     "[default: 0.5]"),
    ("held_out", float, "SHARE", "of the tasks, which choose the epoch [default: 0.25]"),
    ("seed", int, "N", "of initial weights and held-out tasks [default: 0]"),
)  # fmt: skip


def add_kind(kinds: Any, name: str) -> None:
    """Declare the kind of training with its options."""
    parser = kinds.add_parser(
        name, help="a temperature head", description=DESCRIPTION, epilog=EXAMPLES
    )
    data = parser.add_argument_group("Data")
    data.add_argument(
        "--evaluation", metavar="DIR", type=Path, required=True, help="folder of the evaluation"
    )
    data.add_argument(
        "--data", metavar="FILE", type=Path, required=True, help="the problems it was run on"
    )
    data.add_argument("--arm", metavar="LABEL", help="whose samples, of several models")
    head = parser.add_argument_group("Head")
    for field, kind, metavar, text in HEAD_FLAGS:
        flag = "--" + field.replace("_", "-")
        head.add_argument(flag, type=kind, metavar=metavar, help=text, default=argparse.SUPPRESS)
    run = parser.add_argument_group("Run")
    run.add_argument(
        "--output", metavar="DIR", type=Path, required=True, help="folder of the adapter"
    )
    run.add_argument(
        "--description", metavar="TEXT", default="", help="a line about the head, kept in it"
    )
    add_options(parser, _MODEL_FLAGS)


def run(arguments: argparse.Namespace) -> int:
    """Train.

    Raises:
        UserError: an option is wrong, or the run cannot be learned from.
        CommandError: the adapter cannot be written.
    """
    if not arguments.evaluation.is_dir():
        raise UserError(f"--evaluation: {arguments.evaluation} is not a folder")
    if not arguments.data.is_file():
        raise UserError(f"--data: {arguments.data} is not a file")
    options = build_model_options(given_options(arguments, _MODEL_FLAGS), environ=os.environ)
    let_threads_sleep(os.environ)
    # Loads torch, which takes seconds: wrong arguments are refused first.
    from serve.cli.temperature_run import run_head_training

    return run_head_training(arguments, options)
