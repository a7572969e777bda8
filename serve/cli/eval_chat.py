"""`proa eval mt-bench`: two-turn chat answers, judged by a model."""

import argparse
import asyncio
import os
import sys
from pathlib import Path
from typing import Any

from client.address import parse_address
from evaluation.chat.answers import answer_questions
from evaluation.chat.judging import PAIRWISE, SINGLE, count_cases, judge_answers
from evaluation.chat.questions import (
    JUDGE_PROMPTS,
    Question,
    read_judge_prompts,
    read_questions,
)
from evaluation.chat.report import summarise_grades, summarise_pairs, to_markdown
from evaluation.folder import digest_of, open_folder
from evaluation.progress import bars
from evaluation.server import Arm, open_servers
from serve.cli.arguments import UserError, add_request_arguments, request_fields, say
from serve.cli.eval_options import (
    add_folder_argument,
    add_server_arguments,
    at_least,
    build_arms,
    keep_report,
    named_errors,
)
from serve.environment import JUDGE_KEY, judge_key

DESCRIPTION = """\
Ask models questions of two turns and let a judge, any model with an OpenAI-style API, grade the
answers from 1 to 10 or compare them in pairs, in both orders. Files are in FastChat's layouts, so
its own tools read them.
"""

EXAMPLES = """\
examples:
  proa eval mt-bench --questions question.jsonl --output ./mt
  proa eval mt-bench --questions question.jsonl --references gpt-4.jsonl \\
      --model smollm2,smollm2:poet --judge qwen --judge-url http://127.0.0.1:8001 \\
      --judging both --output ./mt

data: https://github.com/lm-sys/FastChat, fastchat/llm_judge/data/mt_bench
"""

_BOTH, _NONE = "both", "none"


def add_kind(kinds: Any, name: str) -> None:
    """Declare the kind of evaluation with its options."""
    parser = kinds.add_parser(
        name, help="chat answers, judged by a model", description=DESCRIPTION, epilog=EXAMPLES
    )
    group = parser.add_argument_group("Questions")
    group.add_argument(
        "--questions", metavar="FILE", type=Path, required=True, dest="data",
        help="JSON lines with question_id, category, turns and perhaps reference",
    )  # fmt: skip
    group.add_argument(
        "--references", metavar="FILE", type=Path,
        help="answers that the judge sees for math, reasoning and coding",
    )  # fmt: skip
    group.add_argument("--limit", metavar="N", type=int, help="only so many of each category")
    add_folder_argument(group)
    group = add_judge_arguments(parser, without="answers only")
    group.add_argument(
        "--judging", choices=(SINGLE, PAIRWISE, _BOTH), default=SINGLE,
        help="grades, pairs of models in both orders, or both [default: %(default)s]",
    )  # fmt: skip
    add_server_arguments(parser)
    add_request_arguments(parser, max_tokens=1024)


def add_judge_arguments(
    parser: argparse.ArgumentParser, *, without: str
) -> argparse._ArgumentGroup:
    """Declare who judges; `without` says what is done if nobody does."""
    group = parser.add_argument_group("Judge")
    group.add_argument("--judge", metavar="ID", help=f"model id [default: {without}]")
    group.add_argument("--judge-url", metavar="URL", help="its server [default: that of --url]")
    group.add_argument(
        "--judge-api-key", metavar="KEY", default=judge_key(os.environ),
        help=f"[default: that of --api-key; env: {JUDGE_KEY}]",
    )  # fmt: skip
    group.add_argument(
        "--judge-prompts", metavar="FILE", type=Path, default=JUDGE_PROMPTS,
        help="prompts in FastChat's layout [default: ours, which share its names]",
    )  # fmt: skip
    return group


def run(arguments: argparse.Namespace) -> int:
    """Ask, judge and report.

    Raises:
        UserError: an option is wrong, or a file cannot be used.
        CommandError: a server fails, or a file cannot be written.
    """
    at_least(arguments, concurrency=1, max_tokens=1, patience=0, limit=1)
    fields = request_fields(arguments)
    for name in ("max_tokens", "seed"):
        fields.pop(name, None)
    with named_errors():
        questions = _limit(read_questions(arguments.data, arguments.references), arguments.limit)
        asyncio.run(_run(arguments, questions, fields))
    return 0


def _limit(questions: list[Question], limit: int | None) -> list[Question]:
    counts: dict[str, int] = {}
    kept = []
    for question in questions:
        counts[question.category] = counts.get(question.category, 0) + 1
        if limit is None or counts[question.category] <= limit:
            kept.append(question)
    return kept


async def _run(
    arguments: argparse.Namespace, questions: list[Question], fields: dict[str, Any]
) -> None:
    arms = await build_arms(arguments, fields)
    judge = read_judge(arguments, arms[0])
    prompts = read_judge_prompts(arguments.judge_prompts)
    settings = {
        "questions": digest_of(arguments.data),
        "ids": [question.question_id for question in questions],
        "arms": [arm.describe() for arm in arms],
        "max_tokens": arguments.max_tokens,
        "seed": arguments.seed or 0,
    }
    open_folder(arguments.output, settings)
    if judge is not None:
        open_judgments(arguments, judge)
    kinds = [] if judge is None else _kinds(arguments, len(arms))
    models = [arm.label for arm in arms]
    count = sum(count_cases(questions, models, kind) for kind in kinds)
    async with open_servers(patience_s=arguments.patience) as servers:
        with bars(sys.stderr, answer=len(questions) * len(arms), judgment=count) as progress:
            answers = await answer_questions(
                questions, arms, arguments.output, servers, max_tokens=arguments.max_tokens,
                seed=arguments.seed or 0, concurrency=arguments.concurrency, progress=progress,
            )  # fmt: skip
            judgments = {}
            for kind in kinds:
                assert judge is not None
                judgments[kind] = await judge_answers(
                    questions, answers, judge, prompts, arguments.output, servers, kind=kind,
                    concurrency=arguments.concurrency, progress=progress,
                )  # fmt: skip
    if judge is None:
        say(f"{arguments.output}: answers of {len(arms)} models; --judge grades them")
        return
    _report(arguments.output, questions, judgments, models, judge)


def read_judge(arguments: argparse.Namespace, arm: Arm) -> Arm | None:
    """Return who judges, None: nobody; without an address of its own it is where an arm is.

    Raises:
        UserError: the address is none, or there is one without a judge.
    """
    if arguments.judge is None:
        for name in ("judge_url", "judge_api_key"):
            if getattr(arguments, name) is not None:
                raise UserError(f"--{name.replace('_', '-')}: give --judge too")
        return None
    try:
        url = arm.url if arguments.judge_url is None else parse_address(arguments.judge_url)
    except ValueError as error:
        raise UserError(f"--judge-url: {error}") from None
    key = arguments.judge_api_key or (arm.key if arguments.judge_url is None else "")
    return Arm(label="judge", model=arguments.judge, url=url, key=key)


def open_judgments(arguments: argparse.Namespace, judge: Arm) -> None:
    """Check that judgments in the folder are of the same judge."""
    references = arguments.references
    settings = {
        "judge": judge.model,
        "judge_url": judge.url,
        "judge_prompts": digest_of(arguments.judge_prompts),
        "references": None if references is None else digest_of(references),
    }
    open_folder(arguments.output / "model_judgment", settings)


def _kinds(arguments: argparse.Namespace, num_models: int) -> list[str]:
    kinds = [SINGLE, PAIRWISE] if arguments.judging == _BOTH else [arguments.judging]
    if PAIRWISE in kinds and num_models < 2:
        raise UserError(f"--judging {arguments.judging}: pairs need two models; see --model")
    return kinds


def _report(
    folder: Path,
    questions: list[Question],
    judgments: dict[str, list[dict[str, Any]]],
    models: list[str],
    judge: Arm,
) -> None:
    grades = pairs = None
    if SINGLE in judgments:
        grades = summarise_grades(questions, judgments[SINGLE], models)
    if PAIRWISE in judgments:
        pairs = summarise_pairs(judgments[PAIRWISE], models)
    page = to_markdown("MT-Bench", grades, pairs, judge.model)
    content = {"judge": judge.model, "grades": grades, "pairs": pairs}
    keep_report(folder, content, page)
    if grades is not None:
        # Loads matplotlib, which takes a second.
        from evaluation.chat.plots import plot_categories

        plot_categories(grades, folder / "categories.png")
    print(page, end="")
    say(f"{folder}: report.md, report.json" + (", categories.png" if grades else ""))
