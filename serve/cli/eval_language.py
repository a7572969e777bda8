"""`proa eval perplexity` and `proa eval choices`: log-likelihoods."""

import argparse
import asyncio
import sys
from pathlib import Path
from typing import Any

from evaluation.folder import digest_of, open_folder
from evaluation.language import choices, perplexity
from evaluation.language.tasks import TASKS, read_task
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

PERPLEXITY, CHOICES = "perplexity", "choices"

DESCRIPTIONS = {
    PERPLEXITY: """\
Measure the perplexity of served models on a text: windows of so many tokens, each read by itself,
all tokens but the first predicted. The server must offer /tokenize and echo log probabilities.
""",
    CHOICES: """\
Ask multiple-choice questions by log-likelihood, with the contexts and the metrics of
lm-evaluation-harness: acc takes the likeliest choice, acc_norm the likeliest a character. The
server must echo log probabilities of prompts.
""",
}

EXAMPLES = {
    PERPLEXITY: """\
examples:
  proa eval perplexity --text wiki.test.raw --windows 16 --output ./ppl
  proa eval perplexity --text wiki.test.raw --model smollm2,smollm2:poet --output ./ppl2
""",
    CHOICES: """\
examples:
  proa eval choices --task hellaswag --data hellaswag_val.jsonl --output ./hs
  proa eval choices --task mmlu --data ./mmlu/test --limit 1000 --output ./mmlu-run
""",
}


def add_kind(kinds: Any, name: str) -> None:
    """Declare the kind of evaluation with its options."""
    helps = {PERPLEXITY: "perplexity on a text", CHOICES: "multiple choice by log-likelihood"}
    parser = kinds.add_parser(
        name, help=helps[name], description=DESCRIPTIONS[name], epilog=EXAMPLES[name]
    )
    group = parser.add_argument_group("Data")
    if name == PERPLEXITY:
        group.add_argument("--text", metavar="FILE", type=Path, required=True, dest="data")
        group.add_argument(
            "--length", metavar="N", type=int, default=2048,
            help="tokens of a window [default: %(default)s]",
        )  # fmt: skip
        group.add_argument("--windows", metavar="N", type=int, help="[default: all whole ones]")
    else:
        group.add_argument("--task", choices=sorted(TASKS), required=True)
        group.add_argument(
            "--data", metavar="FILE", type=Path, required=True,
            help="the data set's JSON lines; for mmlu also a CSV file or a folder of them",
        )  # fmt: skip
        group.add_argument("--limit", metavar="N", type=int, help="only every so many questions")
    add_folder_argument(group)
    add_server_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure and report.

    Raises:
        UserError: an option is wrong, or a file cannot be used.
        CommandError: a server fails, or a file cannot be written.
    """
    at_least(arguments, concurrency=1, patience=0)
    with named_errors():
        if arguments.kind == PERPLEXITY:
            at_least(arguments, length=2, windows=1)
            page, summary = asyncio.run(_run_perplexity(arguments))
        else:
            at_least(arguments, limit=1)
            page, summary = asyncio.run(_run_choices(arguments))
        folder: Path = arguments.output
        keep_report(folder, summary, page)
    print(page, end="")
    say(f"{folder}: report.md, report.json")
    return 0


async def _run_perplexity(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    text = perplexity.read_windows_text(arguments.data)
    arms = await build_arms(arguments, {})
    settings = {
        "text": digest_of(arguments.data),
        "length": arguments.length,
        "windows": arguments.windows,
        "arms": [arm.describe() for arm in arms],
    }
    open_folder(arguments.output, settings)
    async with open_servers(patience_s=arguments.patience) as servers:
        with bars(sys.stderr, window=(arguments.windows or 0) * len(arms)) as progress:
            summary = await perplexity.measure_perplexity(
                arms, text, arguments.output, servers, length=arguments.length,
                windows=arguments.windows, concurrency=arguments.concurrency, progress=progress,
            )  # fmt: skip
    return perplexity.to_markdown(summary, f"Perplexity on {arguments.data.name}"), summary


async def _run_choices(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    questions = spread(read_task(arguments.task, arguments.data), arguments.limit)
    if len({question.name for question in questions}) < len(questions):
        raise UserError(f"--data: {arguments.data} has questions of the same name")
    arms = await build_arms(arguments, {})
    settings = {
        "task": arguments.task,
        "data": _digest(arguments.data),
        "limit": arguments.limit,
        "arms": [arm.describe() for arm in arms],
    }
    open_folder(arguments.output, settings)
    async with open_servers(patience_s=arguments.patience) as servers:
        with bars(sys.stderr, question=len(questions) * len(arms)) as progress:
            results = await choices.ask_choices(
                questions, arms, arguments.output, servers, concurrency=arguments.concurrency,
                progress=progress,
            )  # fmt: skip
    summary = choices.summarise(results)
    return choices.to_markdown(summary, f"{arguments.task}, {arguments.data.name}"), summary


def _digest(path: Path) -> list[str]:
    return [digest_of(file) for file in (sorted(path.glob("*.csv")) if path.is_dir() else [path])]
