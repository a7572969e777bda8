"""`proa experiments`: what a server tries out, and what has come of it."""

import argparse
import json
import os
from typing import Any

from evaluation.tables import p_value
from serve.cli.arguments import printable
from serve.cli.connection import connect
from serve.environment import client_settings

DESCRIPTION = """\
Show the experiments of a running server (proa serve --experiments FILE). Intervals and p hold at
all times together, so look as often as you like and stop when one is decided.
"""

EXAMPLES = """\
examples:
  proa experiments list
  proa experiments report adapt-or-not
  proa experiments report adapt-or-not --json --url https://example.org
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="the experiments that run")
    report = actions.add_parser("report", help="what one has shown")
    report.add_argument("name", metavar="NAME")
    url, api_key = client_settings(os.environ)
    for sub in (listing, report):
        sub.add_argument(
            "--url", default=url,
            help="address of the server [default: http://127.0.0.1:8000; env: PROA_URL]",
        )  # fmt: skip
        sub.add_argument(
            "--api-key", metavar="KEY", default=api_key, help="its key [env: PROA_API_KEY]"
        )
        sub.add_argument("--json", action="store_true", help="print what the server sends")


def run(arguments: argparse.Namespace) -> int:
    """Ask and print.

    Raises:
        UserError: the address is none.
        RequestError: the server cannot be reached, refuses, or has no such experiment.
    """
    client = connect(arguments.url, key=arguments.api_key)
    if arguments.action == "list":
        entries = client.entries("/v1/experiments")
        print(json.dumps(entries) if arguments.json else _list(entries))
        return 0
    report = json.loads(client.text(f"/v1/experiments/{arguments.name}"))
    print(json.dumps(report) if arguments.json else _report(report))
    return 0


def _list(entries: list[dict[str, Any]]) -> str:
    lines = [
        f"{printable(entry['id'])}  by {entry['unit']}: "
        + ", ".join(f"{printable(arm['label'])} ({arm['weight']:g})" for arm in entry["arms"])
        for entry in entries
    ]
    return "\n".join(lines) or "the server runs no experiments"


def _report(report: dict[str, Any]) -> str:
    lines = [f"{printable(report['name'])}, by {report['unit']}", ""]
    lines.append(
        f"{'arm':<24} {'answers':>8} {'units':>7} {'first token':>12} {'whole':>8} {'tokens':>7} "
        f"{'failed':>7}"
    )
    for arm in report["arms"]:
        lines.append(
            f"{printable(arm['label']):<24} {arm['exposures']:>8} {arm['units']:>7} "
            f"{_seconds(arm['first_token_s']):>12} {_seconds(arm['seconds']):>8} "
            f"{_number(arm['completion_tokens']):>7} {arm['failures']:>7}"
        )
    for name, outcome in report["outcomes"].items():
        lines += ["", f"{name}:"]
        for label, of in outcome["arms"].items():
            mean = "" if of["mean"] is None else f"{of['mean']:.3f}"
            lines.append(f"  {printable(label):<22} {mean:>7}  of {of['count']}")
        for label, difference in outcome["differences"].items():
            lines.append(f"  {printable(label)} against the first arm: {_difference(difference)}")
    if not report["outcomes"]:
        lines += ["", "no feedback yet (POST /v1/feedback)"]
    return "\n".join(lines)


def _difference(difference: dict[str, Any] | None) -> str:
    if difference is None:
        return "too little feedback"
    return (
        f"{difference['value']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}], "
        f"{p_value(difference['p'])}: {difference['verdict']}"
    )


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} s"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"
