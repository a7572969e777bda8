"""`proa ui`: the chat interface alone, for a server elsewhere."""

import argparse
import os

from serve.cli.arguments import UserError, say
from serve.environment import client_settings, let_gradio_stay_silent

DESCRIPTION = """\
Serve the web interface (chat, compare, inside, server) of a running server. A server started by
'proa serve' has it at /ui already; this command is for one elsewhere.

It listens on this machine only, because whoever opens the page can use the server it shows. A key
that the server wants is typed into the page.
"""

EXAMPLES = """\
examples:
  proa ui
  proa ui --url https://example.org --port 7000
"""

HOSTS = ("127.0.0.1", "localhost", "::1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.usage = "proa ui [options]"
    url, _ = client_settings(os.environ)
    parser.add_argument(
        "--url",
        default=url,
        help="address of the server [default: http://127.0.0.1:8000; env: PROA_URL]",
    )
    parser.add_argument(
        "--host", default=HOSTS[0], choices=HOSTS, help="address to listen on [default: 127.0.0.1]"
    )
    parser.add_argument(
        "--port", type=int, default=7860, metavar="N", help="port to listen on [default: 7860]"
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve the page until stopped.

    Returns:
        0.

    Raises:
        UserError: the port or an address is wrong.
    """
    if not 0 <= arguments.port <= 65535:
        raise UserError(f"--port must be from 0 to 65535, got {arguments.port}")
    let_gradio_stay_silent(os.environ)
    # Loads Gradio and torch, which takes seconds: wrong arguments are refused first.
    from serve.cli.ui_run import run_ui

    return run_ui(arguments.url, arguments.host, arguments.port, report=say)
