"""`proa adapters`: list, inspect and verify adapters."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serve.cli.arguments import UserError, add_options, given_options, printable
from serve.cli.connection import connect
from serve.environment import client_settings
from serve.model_options import MODEL_OPTIONS, build_model_options

DESCRIPTION = """\
Adapters are folders with an adapter_config.json and an adapter_model.safetensors: side networks,
and variants of a model. List those of a running server or below a folder, show what one is, or hold
one against a base model.
"""

EXAMPLES = """\
examples:
  proa adapters list                       those of the server on http://127.0.0.1:8000
  proa adapters list ./examples            those below a folder
  proa adapters inspect ./my-adapter
  proa adapters verify ./my-adapter --model ./Llama-3.2-1B
  proa adapters verify ./healed --on ./small

Attach one when a server starts with 'proa serve --adapter NAME=DIR', or --variant NAME=DIR if it is
a variant, and talk to it by the model id BASE:NAME.
"""

VERIFY_OPTIONS = {
    name: MODEL_OPTIONS[name].as_flag() for name in ("model", "quantization", "cache_dir")
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions and their options."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="list adapters of a running server or below folders")
    listing.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="where to look")
    listing.add_argument(
        "--url", help="address of the server [default: http://127.0.0.1:8000; env: PROA_URL]"
    )
    listing.add_argument("--api-key", metavar="TEXT", help="key of the server [env: PROA_API_KEY]")
    inspecting = actions.add_parser("inspect", help="show what an adapter is")
    inspecting.add_argument("folder", type=Path, metavar="DIR", help="the adapter")
    verifying = actions.add_parser(
        "verify", help="hold an adapter against a base model; status 1 if it does not fit"
    )
    verifying.add_argument("folder", type=Path, metavar="DIR", help="the adapter")
    verifying.add_argument(
        "--on", type=Path, metavar="DIR", nargs="+", default=(), help="the variants that it sits on"
    )
    add_options(verifying, VERIFY_OPTIONS)


def run(arguments: argparse.Namespace) -> int:
    """Carry out the action.

    Returns:
        0.

    Raises:
        UserError: options contradict each other, or a folder is missing.
        CommandError: no adapter, or one that does not fit.
    """
    if arguments.action == "list" and not arguments.folders:
        url, key = client_settings(os.environ)
        client = connect(arguments.url or url, key=arguments.api_key or key)
        try:
            print(table(client.entries("/v1/adapters")))
        finally:
            client.close()
        return 0
    if arguments.action == "list" and (arguments.url or arguments.api_key):
        raise UserError("--url and --api-key: are for a server; give them or folders")
    # Loads torch, which takes seconds and a server's list does not need.
    from serve.cli.adapter_folders import describe_folders, inspect_folder, verify_folder

    if arguments.action == "list":
        print(describe_folders(arguments.folders))
    elif arguments.action == "inspect":
        print(inspect_folder(arguments.folder))
    else:
        options = build_model_options(given_options(arguments, VERIFY_OPTIONS), environ=os.environ)
        print(verify_folder(arguments.folder, options, on=arguments.on))
    return 0


def table(adapters: Sequence[dict[str, Any]]) -> str:
    """Lay out the adapters of a server for reading."""
    if not adapters:
        return "no adapter is attached; 'proa serve --adapter NAME=DIR' attaches one"
    width = max(len(entry["id"]) for entry in adapters)
    lines = [f"{'model id':{width}}  {'kind':12}  {'parameters':>10}  {'MB':>7}  state"]
    for entry in adapters:
        state = "loaded" if entry["is_loaded"] else "waits on disk"
        if entry["num_running"]:
            state = f"in use by {entry['num_running']}"
        lines.append(
            f"{entry['id']:{width}}  {entry['kind'].replace('_', ' '):12}  "
            f"{entry['num_parameters']:>10}  "
            f"{entry['num_bytes'] / 1e6:>7.1f}  {state}{_describe_place(entry)}"
            + (f"  {printable(entry['description'])}" if entry["description"] else "")
        )
    return "\n".join(lines)


def _describe_place(entry: dict[str, Any]) -> str:
    """Say what an adapter sits on, and what a variant is worth."""
    place = f", on {printable(entry['on'])}" if entry.get("on") else ""
    if entry.get("removed") is not None:
        place += f", {entry['removed']:.0%} removed"
    return place + (f", {entry['speed']:.2f}x the base" if entry.get("speed") else "")
