"""`proa eval`: measure how good a model is."""

import argparse
from types import MappingProxyType

from serve.cli import eval_chat, eval_code, eval_glue, eval_images, eval_language

EXAMPLES = """\
examples:
  proa eval humaneval --data HumanEval.jsonl.gz --output ./he --allow-code-execution
  proa eval mbpp --data mbpp.jsonl --model smollm2,smollm2@adapt --samples 20 --output ./mbpp
  proa eval mt-bench --questions question.jsonl --judge qwen --output ./mt
  proa eval perplexity --text wiki.test.raw --output ./ppl
  proa eval choices --task hellaswag --data hellaswag_val.jsonl --output ./hs
  proa eval glue --data dev.tsv --model smollm2:rte --output ./rte-run
  proa eval images --model ./vit --data ./images/test
"""

_KINDS = MappingProxyType(
    {
        "humaneval": eval_code,
        "mbpp": eval_code,
        "mt-bench": eval_chat,
        "perplexity": eval_language,
        "choices": eval_language,
        "glue": eval_glue,
        "images": eval_images,
    }
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.epilog = EXAMPLES
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    for name, module in _KINDS.items():
        module.add_kind(kinds, name)


def run(arguments: argparse.Namespace) -> int:
    """Measure.

    Raises:
        UserError: an option is wrong, or a file cannot be used.
        CommandError: the run cannot go on.
    """
    return _KINDS[arguments.kind].run(arguments)
