"""`proa quantize`: write a 4-bit checkpoint in bitsandbytes' format."""

import argparse
import os
from pathlib import Path

from serve.cli.arguments import UserError, add_options, given_options, say
from serve.model_options import MODEL_OPTIONS, build_model_options

DESCRIPTION = """\
Quantise a model to 4 bits and write it as a Hugging Face folder in bitsandbytes' format:
'proa serve' and transformers both load it.
"""

EXAMPLES = """\
examples:
  proa quantize ./Llama-3.2-1B ./Llama-3.2-1B-nf4
  proa quantize Qwen/Qwen2.5-0.5B-Instruct ./qwen-nf4 --double-quant
"""

CACHE_OPTION = {"cache_dir": MODEL_OPTIONS["cache_dir"]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a folder, a hub id, a .gguf file, or smollm2 (the demo model)",
    )
    parser.add_argument("output", metavar="OUT", type=Path, help="folder to write; must not exist")
    parser.add_argument(
        "--quant-type",
        choices=("nf4", "fp4"),
        default="nf4",
        help="4-bit number format [default: nf4]",
    )
    parser.add_argument(
        "--double-quant",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="quantise the scales too: about 0.4 bits less per weight [default: off]",
    )
    add_options(parser, CACHE_OPTION)


def run(arguments: argparse.Namespace) -> int:
    """Quantise and write.

    Raises:
        UserError: the model cannot be loaded, or the output folder is in use.
    """
    output: Path = arguments.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"OUT: {output} exists already; name a new folder")
    given = given_options(arguments, CACHE_OPTION)
    options = build_model_options(given, environ=os.environ)
    # Loads torch, which takes seconds: wrong arguments are refused first.
    from models.checkpoints import CheckpointError, quantize_checkpoint

    try:
        quantize_checkpoint(
            arguments.model,
            output,
            double_quant=arguments.double_quant,
            quant_type=arguments.quant_type,
            cache_dir=options.cache_folder,
            report=say,
        )
    except CheckpointError as error:
        raise UserError(str(error)) from None
    say(f"serve it with: proa serve {output}")
    return 0
