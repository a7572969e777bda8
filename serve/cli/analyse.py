"""`proa analyse`: how a model sees text."""

import argparse
import asyncio
import sys
from pathlib import Path
from typing import Any

from evaluation.code.problems import HUMANEVAL, MBPP, read_problems
from evaluation.errors import DataFileError
from evaluation.folder import digest_of, open_folder
from evaluation.language.difficulty import (
    CODE,
    Sample,
    measure_difficulty,
    read_prose,
    summarise,
    to_markdown,
)
from evaluation.language.perplexity import read_windows_text
from evaluation.progress import bars
from evaluation.records import RecordLog, spread
from evaluation.server import open_servers
from serve.cli.arguments import say
from serve.cli.eval_options import (
    add_folder_argument,
    add_server_arguments,
    at_least,
    build_arms,
    keep_report,
    named_errors,
)

DESCRIPTION = """\
Show a served model programs and prose that people wrote, and read how hard each token was to
predict: losses of both, and in programs by where a token stands in its line.
"""

EXAMPLES = """\
examples:
  proa analyse difficulty --code mbpp.jsonl --prose wiki.test.raw --output ./difficulty

data: programs are the references of HumanEval's or MBPP's file
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    sub = actions.add_parser(
        "difficulty", help="the loss of each token", description=DESCRIPTION, epilog=EXAMPLES
    )
    group = sub.add_argument_group("Texts")
    group.add_argument(
        "--code", metavar="FILE", type=Path, required=True, dest="data",
        help="HumanEval or MBPP, whose reference programs are shown",
    )  # fmt: skip
    group.add_argument("--prose", metavar="FILE", type=Path, help="a text of paragraphs")
    group.add_argument(
        "--limit", metavar="N", type=int, default=500,
        help="most texts of each kind [default: %(default)s]",
    )  # fmt: skip
    add_folder_argument(sub)
    add_server_arguments(sub)


def run(arguments: argparse.Namespace) -> int:
    """Show, read and report.

    Raises:
        UserError: an option is wrong, or a file cannot be used.
        CommandError: the server fails, or a file cannot be written.
    """
    at_least(arguments, limit=1, concurrency=1, patience=0)
    with named_errors():
        samples = _read_samples(arguments)
        summary, label = asyncio.run(_run(arguments, samples))
        folder: Path = arguments.output
        page = to_markdown(summary, f"Prediction difficulty, {label}")
        keep_report(folder, summary, page)
    # Loads matplotlib, which takes a second.
    from evaluation.language.difficulty_plot import plot_difficulty

    plot_difficulty(summary, folder / "difficulty.png")
    print(page, end="")
    say(f"{folder}: report.md, report.json, difficulty.png")
    return 0


def _read_samples(arguments: argparse.Namespace) -> list[Sample]:
    problems = None
    for kind in (HUMANEVAL, MBPP):
        try:
            problems = read_problems(arguments.data, kind)
            break
        except DataFileError as error:
            failure = error
    if problems is None:
        raise failure
    written = [problem for problem in problems if problem.reference]
    if not written:
        raise DataFileError(f"{arguments.data} has no reference programs")
    samples = []
    for problem in spread(written, arguments.limit):
        reference = str(problem.reference).replace("\r\n", "\n")
        # A function's head and its description are given; of a task in words nothing is.
        head = problem.prompt if reference.startswith(problem.prompt) else ""
        text = reference.removeprefix(head)
        samples.append(Sample(name=problem.task_id, kind=CODE, context=head, text=text))
    if arguments.prose is not None:
        text = read_windows_text(arguments.prose)
        samples += read_prose(arguments.prose, text, arguments.limit)
    return samples


async def _run(arguments: argparse.Namespace, samples: list[Sample]) -> tuple[dict[str, Any], str]:
    (arm, *_) = await build_arms(arguments, {})
    settings = {
        "code": digest_of(arguments.data),
        "prose": None if arguments.prose is None else digest_of(arguments.prose),
        "limit": arguments.limit,
        "arm": arm.describe(),
    }
    open_folder(arguments.output, settings)
    with RecordLog(arguments.output / "losses.jsonl") as log:
        async with open_servers(patience_s=arguments.patience) as servers:
            with bars(sys.stderr, text=len(samples)) as progress:
                records = await measure_difficulty(
                    samples, arm, log, servers, concurrency=arguments.concurrency,
                    progress=progress,
                )  # fmt: skip
    return summarise(records), arm.label
