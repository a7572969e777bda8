"""What evaluations of served models share: the server, the arms, the run, its errors."""

import argparse
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from client.address import parse_address
from evaluation.errors import DataFileError, RunError
from evaluation.folder import SettingsError, write_whole
from evaluation.server import CONCURRENCY, PATIENCE_S, Arm, open_servers
from serve.cli.arguments import CommandError, UserError
from serve.environment import client_settings

Task = TypeVar("Task")


def add_server_arguments(parser: argparse.ArgumentParser, *, with_models: bool = True) -> None:
    """Declare the server that is asked, and how it is asked."""
    url, api_key = client_settings(os.environ)
    group = parser.add_argument_group("Server")
    group.add_argument(
        "--url", default=url,
        help="any server with an OpenAI-style API [default: http://127.0.0.1:8000; env: PROA_URL]",
    )  # fmt: skip
    group.add_argument(
        "--api-key", metavar="KEY", default=api_key, help="its key [env: PROA_API_KEY]"
    )
    if with_models:
        group.add_argument(
            "--model", metavar="ID[,ID...]", help="model ids [default: the first of /v1/models]"
        )
    group.add_argument(
        "--concurrency", metavar="N", type=int, default=CONCURRENCY,
        help="requests under way at once; more than the server runs keep it busy "
        "[default: %(default)s]",
    )  # fmt: skip
    group.add_argument(
        "--patience", metavar="SECONDS", type=float, default=PATIENCE_S,
        help="how long the server may be gone before the run stops [default: %(default).0f]",
    )  # fmt: skip


def add_folder_argument(parser: argparse.ArgumentParser) -> None:
    """Declare the folder of the run."""
    parser.add_argument(
        "--output", metavar="DIR", type=Path, required=True,
        help="folder for samples, results and the report; the same command goes on with a run that "
        "was stopped",
    )  # fmt: skip


def add_part_argument(group: argparse._ArgumentGroup) -> None:
    """Declare which share of the tasks is done."""
    group.add_argument(
        "--part", metavar="K/N",
        help="only every Nth task from the Kth: 1/2 to choose parameters, 2/2 to report",
    )  # fmt: skip


def choose_part(tasks: list[Task], part: str | None) -> list[Task]:
    """Return the tasks that --part leaves.

    Raises:
        UserError: it is none, or leaves none.
    """
    if part is None:
        return tasks
    start, _, step = part.partition("/")
    if not (start.isdecimal() and step.isdecimal() and 1 <= int(start) <= int(step)):
        raise UserError(f"--part must be K/N with K from 1 to N, got {part!r}")
    chosen = tasks[int(start) - 1 :: int(step)]
    if not chosen:
        raise UserError(f"--part: {part} of the tasks is none")
    return chosen


def keep_report(folder: Path, summary: Mapping[str, Any], page: str) -> None:
    """Write a run's figures and its page.

    Raises:
        RunError: a file cannot be written.
    """
    write_whole(folder / "report.json", json.dumps(summary, indent=1) + "\n")
    write_whole(folder / "report.md", page)


def at_least(arguments: argparse.Namespace, **least: float) -> None:
    """Check numbers.

    Raises:
        UserError: one is less than its least value, or no number.
    """
    for name, bound in least.items():
        value = getattr(arguments, name)
        if value is not None and not value >= bound:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} must be at least {bound:g}, got {value}")


async def build_arms(arguments: argparse.Namespace, fields: dict[str, Any]) -> list[Arm]:
    """Return the arms that --model names.

    Raises:
        UserError: the address is none, or a model is named twice.
        RequestError: the server's models cannot be listed.
    """
    try:
        url = parse_address(arguments.url)
    except ValueError as error:
        raise UserError(f"--url: {error}") from None
    key = arguments.api_key or ""
    if arguments.model is None:
        async with open_servers(patience_s=arguments.patience) as servers:
            entries = await servers.retry(
                lambda: servers.client(url).entries("/v1/models", key=key)
            )
        if not entries:
            raise UserError(f"--model: the server at {url} lists no model")
        models = [str(entries[0].get("id"))]
    else:
        models = [name.strip() for name in arguments.model.split(",") if name.strip()]
    if not models or len(set(models)) < len(models):
        raise UserError(f"--model: {arguments.model!r} is no list of different model ids")
    return [Arm(label=name, model=name, fields=fields, url=url, key=key) for name in models]


@contextmanager
def named_errors() -> Iterator[None]:
    """Turn what an evaluation raises into what ends a command."""
    try:
        yield
    except DataFileError as error:
        raise UserError(f"--data: {error}") from None
    except SettingsError as error:
        raise UserError(f"--output: {error}") from None
    except RunError as error:
        raise CommandError(str(error)) from None
