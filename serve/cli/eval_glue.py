"""`proa eval glue`: texts whose class is known, for adapters that classify."""

import argparse
import asyncio
import sys
from pathlib import Path
from typing import Any

from evaluation.folder import digest_of, open_folder
from evaluation.language import labels
from evaluation.progress import bars
from evaluation.records import spread
from evaluation.server import open_servers
from serve.cli.arguments import UserError, say
from serve.cli.eval_options import (
    add_folder_argument,
    add_server_arguments,
    at_least,
    build_arms,
    keep_report,
    named_errors,
)
from text.errors import DataError
from text.records import read_records

DESCRIPTION = """\
Measure adapters that classify (`proa train qst --task classification`) on texts whose class is
known, over /v1/classify: accuracy with its 95 % interval, F1 and Matthews' correlation; for a
regression Pearson's and Spearman's. Data is what training takes: a .tsv file whose header names
"label" and "sentence", or "sentence1" and "sentence2" and the like, as the GLUE tasks have them, or
JSON lines with "text" and "label".
"""

EXAMPLES = """\
examples:
  proa eval glue --data dev.tsv --model smollm2:rte --output ./rte-run
  proa eval glue --data dev.tsv --model smollm2:sst2,smollm2:sst2-wide --output ./sst2-run
"""


def add_kind(kinds: Any, name: str) -> None:
    """Declare the kind of evaluation with its options."""
    parser = kinds.add_parser(
        name, help="texts whose class is known", description=DESCRIPTION, epilog=EXAMPLES
    )
    group = parser.add_argument_group("Data")
    group.add_argument("--data", metavar="FILE", type=Path, required=True)
    group.add_argument("--limit", metavar="N", type=int, help="only so many texts, spread over all")
    add_folder_argument(group)
    add_server_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure and report.

    Raises:
        UserError: an option is wrong, or a file cannot be used.
        CommandError: a server fails, or a file cannot be written.
    """
    at_least(arguments, concurrency=1, patience=0, limit=1)
    if arguments.model is None:
        raise UserError("--model: name an adapter that classifies, such as smollm2:rte")
    examples = _read(arguments)
    folder: Path = arguments.output
    with named_errors():
        results = asyncio.run(_run(arguments, examples))
        summary = labels.summarise(results)
        page = labels.to_markdown(summary, f"Classification, {arguments.data.name}")
        keep_report(folder, summary, page)
    print(page, end="")
    say(f"{folder}: report.md, report.json")
    return 0


def _read(arguments: argparse.Namespace) -> list[labels.Labelled]:
    try:
        records = read_records(arguments.data)
    except DataError as error:
        raise UserError(f"--data: {error}") from None
    examples = []
    for record in records:
        text, label = record.fields.get("text"), record.fields.get("label")
        if not isinstance(text, str) or not text.strip():
            raise UserError(f'--data: {record.place}: "text" must be text, got {text!r:.80}')
        if not isinstance(label, str | int | float) or isinstance(label, bool) or label == "":
            raise UserError(
                f'--data: {record.place}: "label" must be text or a number, got {label!r:.80}'
            )
        name = record.place.rpartition(" ")[2]
        examples.append(labels.Labelled(name=name, text=text, label=str(label)))
    return spread(examples, arguments.limit)


async def _run(
    arguments: argparse.Namespace, examples: list[labels.Labelled]
) -> dict[str, list[dict[str, Any]]]:
    arms = await build_arms(arguments, {})
    settings = {
        "data": digest_of(arguments.data),
        "limit": arguments.limit,
        "arms": [arm.describe() for arm in arms],
    }
    open_folder(arguments.output, settings)
    async with open_servers(patience_s=arguments.patience) as servers:
        with bars(sys.stderr, text=len(examples) * len(arms)) as progress:
            return await labels.ask_labels(
                examples, arms, arguments.output, servers, concurrency=arguments.concurrency,
                progress=progress,
            )  # fmt: skip
