"""`proa quantize`: write a 4-bit checkpoint in bitsandbytes' format."""

import argparse
import os
from pathlib import Path

from serve.cli.arguments import UserError, add_options, given_options
from serve.environment import let_threads_sleep
from serve.model_options import MODEL_OPTIONS, build_model_options
from text.text_file import read_text

DESCRIPTION = """\
Quantise a model to 4 bits and write it as a Hugging Face folder in bitsandbytes' format:
'proa serve' and transformers both load it.

--search looks for the scale of each block of 64 weights at which they lose least, in the same
format; --text weighs that loss by what the linears read of a text, such as a part of WikiText-2.
"""

EXAMPLES = """\
examples:
  proa quantize ./Llama-3.2-1B ./Llama-3.2-1B-nf4
  proa quantize ./Llama-3.2-1B ./Llama-3.2-1B-nf4 --search --text wiki.train.txt
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
    parser.add_argument(
        "--search",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="search the scales at which the weights lose least [default: off]",
    )
    parser.add_argument(
        "--text",
        metavar="FILE",
        type=Path,
        help="UTF-8 text: in the search, inputs count as much as they do on it",
    )
    add_options(parser, CACHE_OPTION)


def run(arguments: argparse.Namespace) -> int:
    """Quantise and write.

    Raises:
        UserError: the model cannot be loaded, the output folder is in use, or the text is too
            short or has nothing to weigh.
        DataError: the text cannot be read.
    """
    output: Path = arguments.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"OUT: {output} exists already; name a new folder")
    if arguments.text is not None and not arguments.search:
        raise UserError("--text: weighs what --search looks for; give --search too")
    text = None if arguments.text is None else read_text(arguments.text)
    given = given_options(arguments, CACHE_OPTION)
    options = build_model_options(given | {"model": arguments.model}, environ=os.environ)
    let_threads_sleep(os.environ)
    # Loads torch, which takes seconds: wrong arguments are refused first.
    from serve.cli.quantize_run import run_quantize

    run_quantize(arguments, options, text)
    return 0
