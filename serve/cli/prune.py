"""`proa prune`: search for a pruned variant of a model."""

import argparse
import os
from dataclasses import replace
from pathlib import Path

from adapters.disp.search_config import CHOICES, SearchConfig
from serve.cli.arguments import UserError, add_options, add_run_arguments, given_options
from serve.cli.config_flags import add_config_flag, read_config
from serve.environment import let_threads_sleep
from serve.model_options import MODEL, MODEL_OPTIONS, build_model_options

DESCRIPTION = """\
Search for a pruned variant of a model (DISP-LLM) and write it as an attachment: the channels that
each layer keeps, a few hundred kilobytes. The model's weights stay as they are; without --model it
is the demo model.

TEXT is a UTF-8 text file, such as a part of WikiText-2; --length tokens of it are read at a time.
The search takes the model's original weights. --remove is the share of the parameters of the
decoder's linears that goes; the share of the whole model, embeddings included, is told beside it,
and --remove-total asks for that one.

The output folder receives the variant, metrics.jsonl (one line for each step and evaluation),
pictures and, until the end, checkpoints. Several shares in one run take less time than one after
the other; each has a folder of its own in the output folder then. Ctrl-C saves a checkpoint; the
same command with --resume goes on from there, or from the last one after a crash, and computes the
very same numbers.
"""

EXAMPLES = """\
examples:
  proa prune disp --data wiki.train.txt --remove 0.3 --output ./small
  proa prune disp --data wiki.train.txt --remove 0.1,0.2,0.3,0.4,0.5 --output ./smaller
  proa prune disp --data wiki.train.txt --remove 0.3 --output ./small --resume
  proa prune disp --model ./Llama-3.2-1B --data wiki.train.txt --remove-total 0.2 --output ./small
  proa serve --variant small=./small
  proa train qst --on ./small --data train.jsonl --output ./healed
"""

METHODS = ("disp",)
MODEL_FLAGS = {
    name: MODEL_OPTIONS[name].as_flag() for name in ("model", "cache_dir", "device", "threads")
} | {"dequantize": replace(MODEL_OPTIONS["dequantize"], group=MODEL)}
# Field of SearchConfig, placeholder, help.
SEARCH_FLAGS = (
    ("steps", "N", "optimiser steps for the least share"),
    ("further_steps", "N", "optimiser steps for each share after it, which goes on from there "
     "[default: two thirds of --steps]"),
    ("batch_size", "N", "windows of text computed together"),
    ("length", "N", "tokens of a window"),
    ("draws", "N", "of masks for a window, each for an equal stretch of it"),
    ("learning_rate", "X", "of the hypernetwork that proposes masks"),
    ("decay", "SHARE", "share of the steps, at their end, in which the rate falls to 0"),
    ("weight_decay", "X", "of the hypernetwork"),
    ("clip", "X", "largest norm of a step's gradient"),
    ("penalty", "X", "weight of the log of kept over wanted parameters (lambda)"),
    ("ramp", "SHARE", "share of the steps in which the wanted number goes down"),
    ("settle", "SHARE", "share of the steps, at their end, with widths fixed at what --align asks "
     "for"),
    ("estimator", "", "gradient of the binary masks"),
    ("residual", "", "channels of the residual stream: chosen by each block for itself, or one set "
     "for all"),
    ("align", "N", "widths are multiples of this"),
    ("gradient_checkpointing", "", "compute layers again for the gradient: a quarter more time, "
     "much less memory"),
    ("compute_dtype", "", "of the model in the search; auto is bfloat16 where that is faster"),
    ("seed", "N", "of the hypernetwork, the windows and the masks"),
    ("eval_windows", "N", "most windows held out at the end of the text"),
    ("eval_every", "N", "steps between evaluations; there is one for each share in any case"),
    ("checkpoint_every", "N", "steps between checkpoints"),
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.usage = "proa prune disp --data TEXT [--remove SHARE] --output DIR [options]"
    parser.add_argument("method", metavar="METHOD", choices=METHODS, help="disp")
    what = parser.add_argument_group("What to make")
    what.add_argument("--data", metavar="TEXT", type=Path, required=True, help="text to search on")
    share = what.add_mutually_exclusive_group()
    default = ",".join(f"{share:g}" for share in SearchConfig().remove)
    share.add_argument(
        "--remove",
        metavar="SHARE",
        type=_shares,
        default=argparse.SUPPRESS,
        help="share of the linears' parameters to remove, or several: 0.1,0.2,0.3 "
        f"[default: {default}]",
    )
    share.add_argument(
        "--remove-total",
        metavar="SHARE",
        type=_shares,
        help="the same as a share of the whole model, embeddings included",
    )
    search = parser.add_argument_group("Search")
    for name, metavar, text in SEARCH_FLAGS:
        add_config_flag(search, SearchConfig(), CHOICES, name, metavar, text)
    add_run_arguments(parser, "variant")
    add_options(parser, MODEL_FLAGS)


def _shares(text: str) -> tuple[float, ...]:
    """Parse numbers between commas; their range is checked where it is declared."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a share such as 0.3, or several such as 0.1,0.2, got {text!r}"
        ) from None


def read_search_config(arguments: argparse.Namespace) -> SearchConfig:
    """Return the options of the search; with --remove-total its shares stand for those of linears.

    Raises:
        UserError: one is out of range.
    """
    known = SearchConfig.__dataclass_fields__
    given = {name: value for name, value in vars(arguments).items() if name in known}
    spelled = {}
    if arguments.remove_total is not None:
        given["remove"], spelled["remove"] = arguments.remove_total, "--remove-total"
    return read_config(SearchConfig, given, spelled)


def run(arguments: argparse.Namespace) -> int:
    """Search.

    Returns:
        0, or 130 if it was asked to stop and has saved a checkpoint.

    Raises:
        UserError: an option or the text is wrong.
        CommandError: the search failed.
    """
    config = read_search_config(arguments)
    if not arguments.data.is_file():
        raise UserError(f"--data: {arguments.data} is not a file")
    given = given_options(arguments, MODEL_FLAGS)
    options = build_model_options(given, environ=os.environ)
    let_threads_sleep(os.environ)
    # Loads torch, which takes seconds: wrong arguments are refused first.
    from serve.cli.prune_run import run_search

    return run_search(arguments, config, options)
