"""`proa compress`: make a mixed-rank variant of a model."""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.mixed_rank.compress_config import CHOICES, CompressConfig
from serve.cli.arguments import UserError, add_options, add_run_arguments, given_options
from serve.cli.config_flags import add_config_flag, read_config
from serve.environment import let_threads_sleep
from serve.model_options import MODEL_OPTIONS, build_model_options

DESCRIPTION = """\
Compress a model: two thin factors in place of each matrix that can do with them, at the rank that
loses least under one budget, fitted to what the matrices read of a text. The variant is an
attachment; without --model it is one of the demo model.

DATA is a UTF-8 text file, such as a part of WikiText-2; --sequences stretches of --length tokens of
it are read, and its end is held out. --remove is the share of the parameters of the decoder's
linears that goes. Linears that share their input (q, k, v; gate, up) share a factor.

Where DATA is a folder, with a folder of images for each class, --model is the folder of an image
classifier (ViT, DeiT or Swin as transformers writes them), and --sequences is how many images are
read. The output is a classifier of its own; `adapters.mixed_rank.vision_folder.load_vision` loads
it, `proa eval images` measures it.

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
  proa compress --model ./vit --data ./images/train --remove 0.4 --output ./thin-vit
"""

IMAGES = 512
"""That a classifier is fitted to."""
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
     "its place, or nothing (plain SVD); the latter two want --no-compensate --metric outputs"),
    ("metric", "", "lost parts of outputs count by what they do to the loss, or all alike"),
    ("compensate", "", "have each layer make up for what those before it have lost"),
    ("steps", "N", "of gradient for each layer, that bring its output near that of the model as it "
     "was; 0: none"),
    ("learning_rate", "X", "of these steps, relative to the size of the factors"),
    ("rank_step", "N", "ranks are multiples of it"),
    ("sequences", "N", "stretches of the text to fit to, or images (512 then)"),
    ("length", "N", "tokens of each"),
    ("eval_sequences", "N", "most stretches held out at the end of the text"),
    ("checkpoint_every", "N", "layers between checkpoints"),
    ("seed", "N", "of the choice of stretches, and of their order"),
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.usage = "proa compress --data DATA [--remove SHARE] --output DIR [options]"
    what = parser.add_argument_group("What to make")
    what.add_argument(
        "--data", metavar="DATA", type=Path, required=True,
        help="text to fit to, or a folder of images",
    )  # fmt: skip
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
    if is_vision := arguments.data.is_dir():
        check_vision_options(arguments, given)
        given = {"sequences": IMAGES, **given}
    config = read_config(CompressConfig, given)
    if not is_vision and not arguments.data.is_file():
        raise UserError(f"--data: {arguments.data} is no file and no folder")
    options = build_model_options(given_options(arguments, MODEL_FLAGS), environ=os.environ)
    let_threads_sleep(os.environ)
    # Loads torch, which takes seconds: wrong arguments are refused first.
    if is_vision:
        from serve.cli.vision_run import run_vision_compression

        return run_vision_compression(arguments, config, options)
    from serve.cli.compress_run import run_compression

    return run_compression(arguments, config, options)


def check_vision_options(arguments: argparse.Namespace, given: Mapping[str, Any]) -> None:
    """Refuse options that say nothing about an image classifier.

    Raises:
        UserError: one is given, or none of a model.
    """
    others = {name: given_options(arguments, MODEL_FLAGS).get(name) for name in MODEL_FLAGS}
    if others.pop("model") is None:
        raise UserError("--model: the folder of an image classifier is needed where --data is one")
    others |= {name: given.get(name) for name in ("length", "eval_sequences")}
    others["on"] = arguments.on or None
    others.pop("threads")
    for name, value in others.items():
        if value is not None:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag}: says nothing about images; --data is a folder")
    if given.get("form") == "int4":
        raise UserError("--form: must be float16 or int8 for images, got int4")
