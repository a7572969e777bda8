"""`proa compare`: arms against each other on the same prompts."""

import argparse
import asyncio
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from client.address import parse_address
from evaluation.chat.answers import answer_questions
from evaluation.chat.judging import PAIRWISE, count_cases, judge_answers
from evaluation.chat.questions import read_judge_prompts, read_questions
from evaluation.chat.report import pair_tables, preferences, summarise_pairs
from evaluation.code.problems import HUMANEVAL, MBPP, join_tests, read_problems
from evaluation.code.prompts import CHAT, COMPLETION
from evaluation.code.run import CodeTest, Judge, run_code_test
from evaluation.code.sandbox import Limits, Sandbox, SandboxError
from evaluation.comparison.answers import ask_exercises, read_exercises
from evaluation.comparison.arms import read_arms
from evaluation.comparison.figures import Outcomes, compare
from evaluation.comparison.report import to_csv, to_html, to_markdown
from evaluation.errors import DataFileError, RunError
from evaluation.folder import digest_of, file_names, open_folder, write_whole
from evaluation.progress import bars
from evaluation.records import read_records, spread
from evaluation.server import Arm, open_servers
from serve.cli.arguments import CommandError, UserError, say
from serve.cli.eval_chat import add_judge_arguments, open_judgments, read_judge
from serve.cli.eval_options import (
    Task,
    add_folder_argument,
    add_part_argument,
    add_server_arguments,
    at_least,
    choose_part,
    keep_report,
    named_errors,
)

DESCRIPTION = """\
Compare models, adapters, variants and decoding strategies on the same prompts with the same random
numbers: effects with intervals, whether they are decided, how many more tasks a verdict would need.
Arms of one Proa server are asked through /v1/compare and share what it computes of a prompt.
"""

EXAMPLES = """\
examples:
  proa compare --arms arms.yaml --task answers --data gsm8k_test.jsonl --limit 200 --output ./ab
  proa compare --arms arms.yaml --task mbpp --data mbpp.jsonl --allow-code-execution --output ./ab

arms.yaml, of each arm a model and any fields of requests:
  arms:
    - {label: plain, model: smollm2, temperature: 0.6, top_p: 0.95}
    - {label: adapt, model: smollm2, top_p: 0.95, decoding: {strategy: adapt, a: 0.8, b: 0.3}}
    - {label: other, model: qwen, url: "http://127.0.0.1:8080", key_env: QWEN_KEY}
"""

ANSWERS, CHATS = "answers", "chats"
PAIRS = "pairs.json"
_AGAIN = " (again)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    group = parser.add_argument_group("Comparison")
    group.add_argument("--arms", metavar="FILE", type=Path, required=True, help="YAML; see below")
    group.add_argument("--task", choices=(HUMANEVAL, MBPP, ANSWERS, CHATS), required=True)
    group.add_argument(
        "--data", metavar="FILE", type=Path, required=True,
        help="problems; for answers JSON lines with question and answer, for chats with "
        "question_id and turns",
    )  # fmt: skip
    group.add_argument(
        "--plus", metavar="FILE", type=Path, help="more tests for programs; both must pass"
    )
    group.add_argument(
        "--samples", metavar="N", type=int, default=1,
        help="of each task and arm [default: %(default)s]",
    )  # fmt: skip
    group.add_argument("--limit", metavar="N", type=int, help="only so many tasks, spread over all")
    add_part_argument(group)
    group.add_argument(
        "--calibrate", action="store_true",
        help="ask the first arm twice, with other random numbers: what chance alone makes",
    )  # fmt: skip
    group.add_argument(
        "--prompt", choices=(COMPLETION, CHAT), default=CHAT,
        help="how a program is asked for [default: %(default)s]",
    )  # fmt: skip
    group.add_argument(
        "--max-tokens", metavar="N", type=int, default=512, help="of an answer [default: 512]"
    )
    group.add_argument("--seed", metavar="N", type=int, default=0, help="[default: 0]")
    group.add_argument(
        "--allow-code-execution", action="store_true", help="run programs, in a sandbox"
    )
    group.add_argument("--jobs", metavar="N", type=int, help="programs run at once")
    group.add_argument(
        "--references", metavar="FILE", type=Path,
        help="answers to chats that the judge sees for math, reasoning and coding",
    )  # fmt: skip
    add_judge_arguments(parser, without="none; chats need one")
    add_folder_argument(parser)
    add_server_arguments(parser, with_models=False)


def run(arguments: argparse.Namespace) -> int:
    """Ask, judge and report.

    Raises:
        UserError: an option is wrong, or a file cannot be used.
        CommandError: a server or the sandbox fails, or a file cannot be written.
    """
    at_least(arguments, samples=1, limit=1, max_tokens=1, jobs=1, concurrency=1, patience=0)
    is_code = arguments.task in (HUMANEVAL, MBPP)
    if is_code and not arguments.allow_code_execution:
        raise UserError(f"--task {arguments.task}: runs programs; give --allow-code-execution too")
    if arguments.plus is not None and not is_code:
        raise UserError("--plus: is for programs")
    if (arguments.judge is not None) != (arguments.task == CHATS):
        raise UserError("--judge: is for chats, which need one")
    if arguments.task == CHATS and arguments.samples > 1:
        raise UserError("--samples: each chat is held once")
    with named_errors():
        arms = _read_arms(arguments)
        try:
            outcomes = asyncio.run(_run(arguments, arms))
        except SandboxError as error:
            raise CommandError(str(error)) from None
        _report(arguments, outcomes, arms[0].label + _AGAIN if arguments.calibrate else None)
    return 0


def _read_arms(arguments: argparse.Namespace) -> list[Arm]:
    try:
        url = parse_address(arguments.url)
    except ValueError as error:
        raise UserError(f"--url: {error}") from None
    try:
        arms = read_arms(arguments.arms, url=url, key=arguments.api_key or "", environ=os.environ)
    except DataFileError as error:
        raise UserError(f"--arms: {error}") from None
    if arguments.calibrate:
        first = arms[0]
        arms.append(replace(first, label=first.label + _AGAIN, salt="again"))
    return arms


async def _run(arguments: argparse.Namespace, arms: list[Arm]) -> dict[str, Outcomes]:
    settings = {
        "task": arguments.task,
        "data": digest_of(arguments.data),
        "plus": None if arguments.plus is None else digest_of(arguments.plus),
        "limit": arguments.limit,
        "part": arguments.part,
        "arms": [arm.describe() for arm in arms],
        "samples": arguments.samples,
        "max_tokens": arguments.max_tokens,
        "seed": arguments.seed,
        "form": arguments.prompt,
    }
    if arguments.task == ANSWERS:
        return await _run_exercises(arguments, arms, settings)
    if arguments.task == CHATS:
        return await _run_chats(arguments, arms, settings)
    return await _run_code(arguments, arms, settings)


async def _run_exercises(
    arguments: argparse.Namespace, arms: list[Arm], settings: dict[str, Any]
) -> dict[str, Outcomes]:
    exercises = _choose(read_exercises(arguments.data), arguments)
    open_folder(arguments.output, settings)
    count = len(exercises) * arguments.samples * len(arms)
    async with open_servers(patience_s=arguments.patience) as servers:
        with bars(sys.stderr, sample=count) as progress:
            return await ask_exercises(
                exercises, arms, arguments.output, servers, num_samples=arguments.samples,
                max_tokens=arguments.max_tokens, seed=arguments.seed,
                concurrency=arguments.concurrency, progress=progress,
            )  # fmt: skip


async def _run_chats(
    arguments: argparse.Namespace, arms: list[Arm], settings: dict[str, Any]
) -> dict[str, Outcomes]:
    """Return what each arm has of its pairs with the others, by question and turn."""
    questions = _choose(read_questions(arguments.data, arguments.references), arguments)
    prompts = read_judge_prompts(arguments.judge_prompts)
    judge = read_judge(arguments, arms[0])
    assert judge is not None
    open_folder(arguments.output, settings)
    open_judgments(arguments, judge)
    models = [arm.label for arm in arms]
    count = count_cases(questions, models, PAIRWISE)
    async with open_servers(patience_s=arguments.patience) as servers:
        with bars(sys.stderr, answer=len(questions) * len(arms), judgment=count) as progress:
            answers = await answer_questions(
                questions, arms, arguments.output, servers, max_tokens=arguments.max_tokens,
                seed=arguments.seed, concurrency=arguments.concurrency, progress=progress,
            )  # fmt: skip
            judgments = await judge_answers(
                questions, answers, judge, prompts, arguments.output, servers, kind=PAIRWISE,
                concurrency=arguments.concurrency, progress=progress,
            )  # fmt: skip
    found = preferences(judgments)
    if missing := [model for model in models if model not in found]:
        raise RunError(f"the judge gave no verdict on {missing[0]!r}")
    write_whole(
        arguments.output / PAIRS, json.dumps(summarise_pairs(judgments, models), indent=1) + "\n"
    )
    return {model: found[model] for model in models}


def _choose(tasks: list[Task], arguments: argparse.Namespace) -> list[Task]:
    """Return the tasks that --part and --limit leave."""
    return spread(choose_part(tasks, arguments.part), arguments.limit)


async def _run_code(
    arguments: argparse.Namespace, arms: list[Arm], settings: dict[str, Any]
) -> dict[str, Outcomes]:
    problems = _choose(read_problems(arguments.data, arguments.task), arguments)
    more = {} if arguments.plus is None else join_tests(problems, arguments.plus, arguments.task)
    test = CodeTest(
        problems=problems, more_tests=more, form=arguments.prompt, num_samples=arguments.samples,
        max_tokens=arguments.max_tokens, seed=arguments.seed, limits=Limits(),
    )  # fmt: skip
    jobs = arguments.jobs or max(1, (os.cpu_count() or 1) // 2)
    judge = Judge(Sandbox(), test, jobs=jobs)
    open_folder(arguments.output, settings)
    count = len(problems) * arguments.samples * len(arms)
    try:
        async with open_servers(patience_s=arguments.patience) as servers:
            with bars(sys.stderr, sample=count, result=count) as progress:
                await run_code_test(
                    test, arms, arguments.output, servers, judge=judge,
                    concurrency=arguments.concurrency, progress=progress,
                )  # fmt: skip
    finally:
        judge.close()
    names = file_names([arm.label for arm in arms])
    return {
        arm.label: _read_outcomes(arguments.output / f"{names[arm.label]}_results.jsonl")
        for arm in arms
    }


def _read_outcomes(path: Path) -> Outcomes:
    found: dict[str, dict[int, float]] = {}
    for _, record in read_records(path):
        passed = record.get("plus_passed", record["passed"])
        found.setdefault(str(record["task_id"]), {})[int(record["sample"])] = float(bool(passed))
    return {task: [of[sample] for sample in sorted(of)] for task, of in found.items()}


def _report(
    arguments: argparse.Namespace, outcomes: dict[str, Outcomes], calibration: str | None
) -> None:
    folder: Path = arguments.output
    summary = compare(outcomes, calibration=calibration)
    # Loads matplotlib, which takes a second.
    from evaluation.comparison.plots import plot_effects

    plot_effects(summary, folder / "effects.png")
    page = to_markdown(
        summary, f"{arguments.task}, {arguments.data.name}", {"Effects": "effects.png"}
    )
    if arguments.task == CHATS:
        pairs = json.loads((folder / PAIRS).read_text(encoding="utf-8"))
        words = f"## Pairs, judged by `{arguments.judge}` in both orders"
        page += "\n".join(["", words, "", *pair_tables(pairs)]) + "\n"
    keep_report(folder, summary, page)
    write_whole(folder / "report.html", to_html(page, folder))
    write_whole(folder / "outcomes.csv", to_csv(outcomes))
    print(page, end="")
    say(f"{folder}: report.html, report.md, report.json, outcomes.csv, effects.png")
