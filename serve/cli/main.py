"""The `proa` command: finds the command, loads only its module, and turns errors into one line."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches

from client.errors import RequestError
from serve.cli.arguments import CommandError, Parser, UserError, explain
from serve.options import ConfigError
from serve.version import VERSION
from text.errors import DataError

COMMANDS = {
    "serve": "serve a model over an OpenAI-style HTTP API",
    "chat": "chat with a running server in the terminal",
    "ui": "serve the web interface of a running server",
    "generate": "continue a prompt in this process, without a server",
    "train": "train a side network or a temperature head on the frozen 4-bit base",
    "prune": "search for a pruned variant of the model",
    "compress": "make a mixed-rank variant of the model",
    "eval": "measure how good a model is",
    "compare": "compare models and strategies on the same prompts",
    "analyse": "how hard a model finds code and prose",
    "experiments": "what a server's experiments have shown",
    "adapters": "list, inspect and verify adapters",
    "quantize": "write a 4-bit checkpoint that transformers loads too",
    "bench": "measure decode and prefill speed",
}

DESCRIPTION = """\
Proa serves one 4-bit language model over an OpenAI-style API, with any number of side networks
attached to it and decoding strategies that adapt the temperature token by token.
"""

EXAMPLES = """\
examples:
  proa serve                              the demo model on http://127.0.0.1:8000
  proa serve ./Llama-3.2-1B --port 9000   a Hugging Face folder; a hub id or a .gguf file work too
  proa chat --decoding adapt              talk to it from another terminal
  proa generate "def fibonacci(n):" --decoding adapt --max-tokens 100
  proa train qst --data chats.jsonl --output ./my-adapter
  proa serve --adapter mine=./my-adapter  the model ids are then smollm2 and smollm2:mine
  proa prune disp --data text.txt --remove 0.3 --output ./small
  proa serve --variant small=./small      the model ids are then smollm2 and smollm2:small
  proa compress --data text.txt --remove 0.2 --output ./thin
  proa eval humaneval --data HumanEval.jsonl.gz --output ./he --allow-code-execution
  proa compare --arms arms.yaml --task answers --data questions.jsonl --output ./ab
  proa adapters inspect ./my-adapter
  proa quantize ./Llama-3.2-1B ./Llama-3.2-1B-nf4
  proa bench --streams 1,8,32

'proa COMMAND --help' describes a command's options. Exit status: 0 done, 1 failed, 2 wrong usage.
"""


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """Return the parser, with the options of one command, or with none of them.

    Args:
        command: whose module to load; None loads no command, which keeps `proa --help` instant.
    """
    parser = Parser(prog="proa", description=DESCRIPTION, epilog=EXAMPLES)
    parser.set_defaults(parser=parser)
    parser.add_argument("--version", action="version", version=f"proa {VERSION}")
    commands = parser.add_subparsers(
        title="commands", dest="command", metavar="COMMAND", parser_class=Parser
    )
    for name, summary in COMMANDS.items():
        if name == command:
            module = importlib.import_module(f"serve.cli.{name}")
            sub = commands.add_parser(name, help=summary, description=summary)
            module.add_arguments(sub)
            sub.set_defaults(run=module.run, parser=sub)
        else:
            commands.add_parser(name, help=summary, add_help=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments after the program's name; None takes the process's.

    Returns:
        The exit status: 0 done, 1 failed, 2 wrong usage.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    named = next((word for word in words if not word.startswith("-")), None)
    try:
        parser = build_parser(named)
        arguments, unknown = parser.parse_known_args(words)
        if unknown:
            arguments.parser.error(_explain_unknown(unknown[0], arguments.parser))
        if arguments.command is None:
            build_parser().print_help()
            return 2
        return int(arguments.run(arguments) or 0)
    except (UserError, ConfigError, DataError) as error:
        print(f"proa: error: {error}", file=sys.stderr)
        return 2
    except CommandError as error:
        print(f"proa: error: {error}", file=sys.stderr)
        return 1
    except RequestError as error:
        print(f"proa: error: {explain(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("proa: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`proa generate ... | head`); nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"proa: error: {error}", file=sys.stderr)
        return 1
    except ImportError as error:
        reason = str(error).strip().rpartition("\n")[2]  # numpy says much before it
        print(f"proa: error: a library cannot be loaded: {reason}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        # What torch raises has no type of its own.
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        print(
            "proa: error: out of memory; does the process get enough (ulimit -v)?", file=sys.stderr
        )
        return 1


def _explain_unknown(word: str, parser: argparse.ArgumentParser) -> str:
    flag = word.partition("=")[0]
    if not flag.startswith("-"):
        return f"unexpected argument {word!r}"
    known = [text for action in parser._actions for text in action.option_strings]
    close = get_close_matches(flag, known, n=1)
    return f"no option {flag}" + (f"; did you mean {close[0]}?" if close else "")


if __name__ == "__main__":
    sys.exit(main())
