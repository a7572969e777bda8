"""`proa serve`: run the HTTP server."""

import argparse
import os
from pathlib import Path

from serve.cli.arguments import CommandError, add_options, given_options, say
from serve.config import OPTIONS, ServeConfig, build_config
from serve.environment import unknown_variables

DESCRIPTION = """\
Serve a model over an OpenAI-style HTTP API on http://127.0.0.1:8000.

The first start of a model downloads it and quantises it to 4 bits; later starts take seconds. The
server stops on Ctrl-C or SIGTERM: running requests may finish first, a second Ctrl-C does not wait.

Every option can also be set by an environment variable (named with it below) or in a YAML file
given with --config, as 'max-context: 4096'. The command line wins over the environment, the
environment over the file.
"""

EXAMPLES = """\
examples:
  proa serve
  proa serve Qwen/Qwen2.5-0.5B-Instruct --port 9000 --max-context 4096
  proa serve ./model-Q4_1.gguf --served-model-name mine
  proa serve --adapter poet=./my-adapter --adapter-root ./adapters
  proa serve --variant small=./small --adapter healed=./healed
  PROA_API_KEY=secret proa serve --host 0.0.0.0
  proa serve --config proa.yaml

then:
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "smollm2@adapt", "messages": [{"role": "user", "content": "Hello"}]}'
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.usage = "proa serve [MODEL] [options]"
    parser.add_argument("--config", metavar="FILE", type=Path, help="YAML file with options")
    add_options(parser, OPTIONS)


def read_config(arguments: argparse.Namespace) -> ServeConfig:
    """Combine the parsed arguments with the environment and the file.

    Raises:
        ConfigError: an option has a bad value.
    """
    for message in unknown_variables(os.environ, OPTIONS):
        say(f"warning: {message}")
    return build_config(
        given_options(arguments, OPTIONS), environ=os.environ, file=arguments.config
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve until asked to stop.

    Returns:
        0 after a clean stop, 1 if the engine broke.
    """
    config = read_config(arguments)
    # Loads torch, which takes seconds: wrong options are refused first.
    from serve.server import ServerError, run_server

    try:
        return run_server(config, report=say)
    except ServerError as error:
        raise CommandError(str(error)) from None
