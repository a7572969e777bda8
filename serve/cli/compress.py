"""`proa compress`: make a mixed-rank variant of a model."""

import argparse
import os
from pathlib import Path

from adapters.mixed_rank.compress_config import CHOICES, CompressConfig
from serve.cli.arguments import UserError, add_options, add_run_arguments, given_options
from serve.cli.config_flags import add_config_flag, read_config
from serve.environment import let_threads_sleep
from serve.model_options import MODEL_OPTIONS, build_model_options

DESCRIPTION = """\
Compress a model: two thin factors in place of each matrix that can do with them, at the rank that
loses least under one budget, fitted to what the matrices read of a text. The variant is an
attachment; without --model it is one of the demo model.

TEXT is a UTF-8 text file, such as a part of WikiText-2; --sequences stretches of --length tokens of
it are read, and its end is held out. --remove is the share of the parameters of the decoder's
linears that goes. Linears that share their input (q, k, v; gate, up) share a factor.

The output folder receives the variant, metrics.jsonl (one line for each layer of both passes),
report.json, pictures of spectra, ranks and errors and, until the end, checkpoints. Ctrl-C saves a
checkpoint; the same command with --resume goes on from there, or from the last one after a crash,
and computes the very same numbers.
"""

EXAMPLES = """\
examples:
  proa compress --data wiki.train.txt --remove 0.2 --output ./thin
  proa compress --data wiki.train.txt --remove 0.4 --form int4 --output ./thinner
  proa compress --on ./small --data wiki.train.txt --remove 0.2 --output ./thin
  proa serve --variant thin=./thin
  proa train qst --on ./thin --data train.jsonl --output ./healed
"""

MODEL_FLAGS = {
    name: MODEL_OPTIONS[name].as_flag()
    for name in ("model", "quantization", "cache_dir", "dequantize", "threads")
}
# Field of CompressConfig, placeholder, help.
FLAGS = (
    ("remove", "SHARE", "share of the linears' parameters to remove"),
    ("form", "", "what factors are rounded to; int4: the right one to 4 bits, the left one, fitted "
     "to it, to 8"),
    ("plan", "", "a rank for each matrix, or as large a share of every one"),
    ("calibration", "", "what factors are fitted to: the covariance of the inputs, a mean input in "
     "its place, or nothing (plain SVD); the latter two want --no-compensate"),
    ("compensate", "", "fit to what a matrix reads in the compressed model"),
    ("steps", "N", "of gradient for each layer, that bring its output near that of the model as it "
     "was; 0: none"),
    ("learning_rate", "X", "of these steps, relative to the size of the factors"),
    ("rank_step", "N", "ranks are multiples of it"),
    ("sequences", "N", "stretches of the text to fit to"),
    ("length", "N", "tokens of each"),
    ("eval_sequences", "N", "most stretches held out at the end of the text"),
    ("checkpoint_every", "N", "layers between checkpoints"),
    ("seed", "N", "of the choice of stretches, and of their order"),
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.usage = "proa compress --data TEXT [--remove SHARE] --output DIR [options]"
    what = parser.add_argument_group("What to make")
    what.add_argument("--data", metavar="TEXT", type=Path, required=True, help="text to fit to")
    what.add_argument(
        "--on", metavar="DIR", type=Path, action="append", default=[],
        help="compress this variant of the model; several times for one on another",
    )  # fmt: skip
    options = parser.add_argument_group("Compression")
    for name, metavar, text in FLAGS:
        add_config_flag(options, CompressConfig(), CHOICES, name, metavar, text)
    add_run_arguments(parser, "variant")
    add_options(parser, MODEL_FLAGS)


def run(arguments: argparse.Namespace) -> int:
    """Compress.

    Returns:
        0, or 130 if it was asked to stop and has saved a checkpoint.

    Raises:
        UserError: an option or the text is wrong.
        CommandError: the compression failed.
    """
    known = CompressConfig.__dataclass_fields__
    given = {name: value for name, value in vars(arguments).items() if name in known}
    config = read_config(CompressConfig, given)
    if not arguments.data.is_file():
        raise UserError(f"--data: {arguments.data} is not a file")
    given = given_options(arguments, MODEL_FLAGS)
    options = build_model_options(given, environ=os.environ)
    let_threads_sleep(os.environ)
    # Loads torch, which takes seconds: wrong arguments are refused first.
    from serve.cli.compress_run import run_compression

    return run_compression(arguments, config, options)
