"""`proa eval humaneval` and `proa eval mbpp`: programs that models write."""

import argparse
import asyncio
import os
import sys
from pathlib import Path
from typing import Any

from evaluation.code.problems import HUMANEVAL, Problem, join_tests, read_problems
from evaluation.code.prompts import CHAT, COMPLETION
from evaluation.code.report import summarise, to_markdown
from evaluation.code.run import (
    CodeTest,
    Judge,
    read_samples,
    run_code_test,
    score_samples,
)
from evaluation.code.sandbox import Limits, Sandbox, SandboxError
from evaluation.folder import digest_of, file_names, open_folder
from evaluation.progress import bars
from evaluation.records import read_records
from evaluation.server import open_servers
from serve.cli.arguments import (
    CommandError,
    UserError,
    add_request_arguments,
    request_fields,
    say,
)
from serve.cli.eval_options import (
    add_folder_argument,
    add_part_argument,
    add_server_arguments,
    at_least,
    build_arms,
    choose_part,
    keep_report,
    named_errors,
)

DESCRIPTION = """\
Let models write programs and run them against their tests: pass@k with 95 % intervals, and what
failed. Programs run in a sandbox (bubblewrap, else user namespaces) and only with
--allow-code-execution; without it samples are kept, to be judged later by the same command.
"""

EXAMPLES = """\
examples:
  proa eval humaneval --data HumanEval.jsonl.gz --output ./he --allow-code-execution
  proa eval humaneval --data HumanEval.jsonl.gz --plus HumanEvalPlus-OriginFmt.jsonl.gz \\
      --model smollm2,smollm2@adapt --temperature 0.8 --top-p 0.95 --samples 20 --output ./he20
  proa eval mbpp --data mbpp.jsonl --tasks 11-510 --prompt chat --output ./mbpp
  proa eval humaneval --data HumanEval.jsonl.gz --score samples.jsonl --output ./scored \\
      --allow-code-execution

data: https://github.com/openai/human-eval, https://github.com/google-research/google-research/tree/
master/mbpp; --plus takes the files in the originals' format of https://github.com/evalplus
"""

_SCORED = "scored"


def add_kind(kinds: Any, name: str) -> None:
    """Declare the kind of evaluation with its options."""
    title = "HumanEval" if name == HUMANEVAL else "MBPP"
    parser = kinds.add_parser(
        name, help=f"programs for {title}", description=DESCRIPTION, epilog=EXAMPLES
    )
    group = parser.add_argument_group("Tasks")
    group.add_argument(
        "--data", metavar="FILE", type=Path, required=True, help=f"{title}, as JSON lines or .gz"
    )
    group.add_argument(
        "--plus", metavar="FILE", type=Path,
        help="more tests for the same tasks (EvalPlus); a sample must pass both",
    )  # fmt: skip
    group.add_argument(
        "--tasks", metavar="FIRST-LAST", help="only the tasks with these numbers [default: all]"
    )
    add_part_argument(group)
    group.add_argument(
        "--prompt", choices=(COMPLETION, CHAT), default=COMPLETION,
        help="how a program is asked for [default: %(default)s]",
    )  # fmt: skip
    group.add_argument(
        "--samples", metavar="N", type=int, default=1,
        help="programs for each task [default: %(default)s]",
    )  # fmt: skip
    group.add_argument(
        "--k", metavar="K[,K...]", help="for pass@k [default: 1, 5, 10, ... up to the samples]"
    )
    group.add_argument(
        "--score", metavar="FILE", type=Path,
        help="judge these samples in place of a server's: JSON lines with task_id and completion, "
        "or solution",
    )  # fmt: skip
    add_folder_argument(group)
    group = parser.add_argument_group("Execution")
    group.add_argument(
        "--allow-code-execution", action="store_true", help="run the programs, in a sandbox"
    )
    group.add_argument(
        "--time-limit", metavar="SECONDS", type=int, default=Limits().cpu_s,
        help="processor time of a program; three times as long by the clock "
        "[default: %(default)s]",
    )  # fmt: skip
    group.add_argument(
        "--memory-limit", metavar="MB", type=int, default=Limits().memory_bytes >> 20,
        help="address space of a program [default: %(default)s]",
    )  # fmt: skip
    group.add_argument(
        "--jobs", metavar="N", type=int, help="programs run at once [default: half the processors]"
    )
    add_server_arguments(parser)
    add_request_arguments(parser, max_tokens=512)


def run(arguments: argparse.Namespace) -> int:
    """Sample, judge and report.

    Raises:
        UserError: an option is wrong, or a file cannot be used.
        CommandError: the server or the sandbox fails, or a file cannot be written.
    """
    at_least(
        arguments, samples=1, time_limit=1, memory_limit=64, jobs=1, concurrency=1, max_tokens=1,
        patience=0,
    )  # fmt: skip
    ks = _parse_ks(arguments.k)
    if arguments.score is not None and not arguments.allow_code_execution:
        raise UserError("--score: runs programs; give --allow-code-execution too")
    fields = request_fields(arguments)
    for name in ("max_tokens", "seed", "stop"):
        fields.pop(name, None)
    with named_errors():
        problems = _choose(read_problems(arguments.data, arguments.kind), arguments)
        more = (
            {} if arguments.plus is None else join_tests(problems, arguments.plus, arguments.kind)
        )
        test = CodeTest(
            problems=problems,
            more_tests=more,
            form=arguments.prompt,
            num_samples=arguments.samples,
            max_tokens=arguments.max_tokens,
            seed=arguments.seed or 0,
            limits=Limits(cpu_s=arguments.time_limit, memory_bytes=arguments.memory_limit << 20),
        )
        try:
            judge = _build_judge(arguments, test)
            try:
                names = asyncio.run(_run(arguments, test, fields, judge))
            finally:
                if judge is not None:
                    judge.close()
        except SandboxError as error:
            raise CommandError(str(error)) from None
        return _report(arguments, names, ks)


async def _run(
    arguments: argparse.Namespace, test: CodeTest, fields: dict[str, Any], judge: Judge | None
) -> dict[str, str]:
    """Return the name of the results of each arm, by its label."""
    settings: dict[str, Any] = {
        "data": digest_of(arguments.data),
        "plus": None if arguments.plus is None else digest_of(arguments.plus),
        "tasks": [problem.task_id for problem in test.problems],
        "time_limit_s": test.limits.cpu_s,
        "memory_limit_bytes": test.limits.memory_bytes,
    }
    if arguments.score is not None:
        assert judge is not None
        samples = read_samples(arguments.score, test.problems)
        open_folder(arguments.output, {**settings, "samples": digest_of(arguments.score)})
        with bars(sys.stderr, sample=0, result=len(samples)) as progress:
            await score_samples(test, samples, arguments.output, judge, progress)
        return {_SCORED: _SCORED}
    arms = await build_arms(arguments, fields)
    settings |= {
        "arms": [arm.describe() for arm in arms],
        "form": test.form,
        "samples": test.num_samples,
        "max_tokens": test.max_tokens,
        "seed": test.seed,
    }
    open_folder(arguments.output, settings)
    count = len(test.problems) * test.num_samples * len(arms)
    async with open_servers(patience_s=arguments.patience) as servers:
        with bars(sys.stderr, sample=count, result=0 if judge is None else count) as progress:
            await run_code_test(
                test, arms, arguments.output, servers, judge=judge,
                concurrency=arguments.concurrency, progress=progress,
            )  # fmt: skip
    return file_names([arm.label for arm in arms])


def _choose(problems: list[Problem], arguments: argparse.Namespace) -> list[Problem]:
    """Return the problems that --tasks and --part leave."""
    if arguments.tasks is not None:
        first, _, last = arguments.tasks.partition("-")
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise UserError(f"--tasks must be FIRST-LAST such as 11-510, got {arguments.tasks!r}")
        wanted = range(int(first), int(last) + 1)
        problems = [
            problem
            for problem in problems
            if (number := problem.task_id.rpartition("/")[2]).isdecimal() and int(number) in wanted
        ]
        if not problems:
            raise UserError(f"--tasks: {arguments.data} has no task of {arguments.tasks}")
    return choose_part(problems, arguments.part)


def _parse_ks(text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) >= 1 for part in parts):
        raise UserError(f"--k must be whole numbers of at least 1, got {text!r}")
    return sorted({int(part) for part in parts})


def _build_judge(arguments: argparse.Namespace, test: CodeTest) -> Judge | None:
    if not arguments.allow_code_execution:
        return None
    jobs = arguments.jobs or max(1, (os.cpu_count() or 1) // 2)
    return Judge(Sandbox(), test, jobs=jobs)


def _report(arguments: argparse.Namespace, names: dict[str, str], ks: list[int] | None) -> int:
    folder: Path = arguments.output
    if not arguments.allow_code_execution:
        say(
            f"{folder}: samples of {len(names)} models, not run; the same command with "
            "--allow-code-execution judges them in a sandbox"
        )
        return 0
    results = {
        label: [record for _, record in read_records(folder / f"{name}_results.jsonl")]
        for label, name in names.items()
    }
    summary = summarise(results, ks)
    title = "HumanEval" if arguments.kind == HUMANEVAL else "MBPP"
    page = to_markdown(summary, f"{title}, {arguments.data.name}")
    keep_report(folder, summary, page)
    # Loads matplotlib, which takes a second.
    from evaluation.code.plots import plot_pass_at_k

    plot_pass_at_k(summary, folder / "pass_at_k.png")
    print(page, end="")
    say(f"{folder}: report.md, report.json, pass_at_k.png")
    return 0
