"""`proa eval images`: top-1 of an image classifier."""

import argparse
from pathlib import Path
from typing import Any

from serve.cli.arguments import UserError

DESCRIPTION = """\
Test an image classifier (ViT, DeiT or Swin as transformers writes them, or what `proa compress`
makes of one) on a folder that holds a folder of images for each class, named as the model names it.
Prints the share of images whose likeliest class is theirs, with its 95 % interval by Wilson.
"""

EXAMPLES = """\
examples:
  proa eval images --model ./vit --data ./images/test
  proa eval images --model ./thin-vit --data ./images/test --output predictions.jsonl
"""


def add_kind(kinds: Any, name: str) -> None:
    """Declare the kind of evaluation with its options."""
    images = kinds.add_parser(
        name, help="top-1 of an image classifier", description=DESCRIPTION, epilog=EXAMPLES
    )
    images.add_argument("--model", metavar="DIR", type=Path, required=True, help="the classifier")
    images.add_argument("--data", metavar="DIR", type=Path, required=True, help="class folders")
    images.add_argument("--limit", metavar="N", type=int, help="most images, drawn from all")
    images.add_argument(
        "--batch-size", metavar="N", type=int, default=32,
        help="images computed together [default: %(default)s]",
    )  # fmt: skip
    images.add_argument(
        "--threads", metavar="N", type=int, help="[default: the processors at hand]"
    )
    images.add_argument(
        "--output", metavar="FILE", type=Path, help="write a JSON line for each image"
    )


def run(arguments: argparse.Namespace) -> int:
    """Test.

    Raises:
        UserError: an option is wrong, a folder holds no model or no images, or an image cannot be
            read.
    """
    for name in ("limit", "batch_size", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} must be a whole number of at least 1, got {value}")
    if not arguments.data.is_dir():
        raise UserError(f"--data: {arguments.data} is not a folder")
    if arguments.output is not None and not arguments.output.resolve().parent.is_dir():
        raise UserError(f"--output: {arguments.output.resolve().parent} is not a folder")
    # Loads torch, which takes seconds: wrong arguments are refused first.
    from serve.cli.vision_run import run_image_test

    return run_image_test(arguments)
