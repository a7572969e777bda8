"""Samples of programs from models, and their verdicts: made side by side, kept as they come."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.code.problems import Problem
from evaluation.code.prompts import CHAT, COMPLETION, build_program, build_request
from evaluation.code.sandbox import Limits, Sandbox, Task, Verdict
from evaluation.errors import DataFileError, RunError
from evaluation.folder import file_names, seed_of
from evaluation.records import Record, RecordLog, read_records, shown, text_field
from evaluation.server import Arm, Servers, run_each, task_group

Key = tuple[str, int]

# Programs that wait to be judged, where no server paces them.
_WAITING_PROGRAMS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeTest:
    """What is asked, and how the answers are judged.

    Attributes:
        problems: the tasks.
        more_tests: the same tasks with more tests, by task id; may lack some.
        form: `completion` or `chat`.
        num_samples: of each task.
        max_tokens: of one answer.
        seed: of the samples.
        limits: of one program.
    """

    problems: Sequence[Problem]
    more_tests: Mapping[str, Problem]
    form: str = COMPLETION
    num_samples: int = 1
    max_tokens: int = 512
    seed: int = 0
    limits: Limits = Limits()


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How one sample did.

    Attributes:
        verdict: of the tests of the data set.
        more: of the further tests, for a sample that passed; None where there are none.
    """

    verdict: Verdict
    more: Verdict | None = None


class Judge:
    """Judges programs, in threads, each different program of a task once.

    Args:
        sandbox: where they run.
        test: whose limits and further tests hold.
        jobs: how many run at once.
    """

    def __init__(self, sandbox: Sandbox, test: CodeTest, *, jobs: int) -> None:
        self._sandbox = sandbox
        self._test = test
        self._threads = ThreadPoolExecutor(jobs, thread_name_prefix="judge")
        self._known: dict[tuple[str, str], asyncio.Future[Outcome]] = {}

    async def judge(self, problem: Problem, program: str) -> Outcome:
        """Return how a program does.

        Raises:
            SandboxError: a sandbox does not start.
        """
        key = (problem.task_id, program)
        if key not in self._known:
            loop = asyncio.get_running_loop()
            self._known[key] = loop.run_in_executor(self._threads, self._run, problem, program)
        # Who waits for the same program may be cancelled; the others go on.
        return await asyncio.shield(self._known[key])

    def _run(self, problem: Problem, program: str) -> Outcome:
        verdict = self._sandbox.run(_task(problem, program), self._test.limits)
        more = self._test.more_tests.get(problem.task_id)
        if more is None:
            return Outcome(verdict=verdict)
        if verdict.passed:
            return Outcome(
                verdict=verdict, more=self._sandbox.run(_task(more, program), self._test.limits)
            )
        return Outcome(verdict=verdict, more=verdict)

    def close(self) -> None:
        """End the threads once what they run has ended."""
        self._threads.shutdown(cancel_futures=True)


def _task(problem: Problem, program: str) -> Task:
    return Task(program=program, setup=problem.setup, tests=problem.tests, names=problem.names)


class ArmFiles:
    """The samples and results of one arm.

    Args:
        folder: of the run.
        name: of the arm's files.
    """

    def __init__(self, folder: Path, name: str, stack: ExitStack) -> None:
        self.samples = stack.enter_context(RecordLog(folder / f"{name}_samples.jsonl"))
        self.results = stack.enter_context(RecordLog(folder / f"{name}_results.jsonl"))

    def missing_samples(self, wanted: Sequence[Key]) -> list[Key]:
        """Return the samples that are not there yet."""
        there = {_key(record) for record in self.samples.records}
        return [key for key in wanted if key not in there]

    def missing_results(self) -> list[Record]:
        """Return the samples that have no result yet."""
        there = {_key(record) for record in self.results.records}
        return [record for record in self.samples.records if _key(record) not in there]


def _key(record: Record) -> Key:
    return str(record.get("task_id")), int(record.get("sample", 0))


async def run_code_test(
    test: CodeTest,
    arms: Sequence[Arm],
    folder: Path,
    servers: Servers,
    *,
    judge: Judge | None,
    concurrency: int,
    progress: Callable[[str, int], None],
) -> None:
    """Let each arm answer each task, and judge the answers as they come.

    What the folder already holds is not done again.

    Args:
        test: what is asked.
        arms: who is asked.
        folder: of the run.
        servers: of the arms.
        judge: of the programs; None keeps samples only.
        concurrency: requests under way at once.
        progress: told `sample` or `result` and how many more are there.

    Raises:
        RunError: a server refuses or is gone, or a file cannot be written.
        SandboxError: a sandbox does not start.
    """
    problems = {problem.task_id: problem for problem in test.problems}
    wanted = [(task, sample) for task in problems for sample in range(test.num_samples)]
    with ExitStack() as stack:
        names = file_names([arm.label for arm in arms])
        files = {arm.label: ArmFiles(folder, names[arm.label], stack) for arm in arms}
        await servers.check(arms)
        async with task_group() as group:
            for label in files:
                progress("sample", len(files[label].samples.records))
                progress("result", len(files[label].results.records))

            def examine(label: str, sample: Record) -> None:
                if judge is not None:
                    problem = problems[str(sample["task_id"])]
                    group.create_task(_examine(judge, problem, sample, files[label], progress))

            for label in files:
                for sample in files[label].missing_results():
                    examine(label, sample)

            async def answer(item: tuple[Key, list[Arm]]) -> None:
                (task_id, sample), asked = item
                found = await _sample(test, problems[task_id], sample, asked, servers)
                for arm, record in zip(asked, found, strict=True):
                    files[arm.label].samples.add(record)
                    progress("sample", 1)
                    examine(arm.label, record)

            # All arms for each sample: they meet the same state of the server, and share what it
            # computes of the prompt.
            missing = {arm.label: set(files[arm.label].missing_samples(wanted)) for arm in arms}
            items = [
                (key, asked)
                for key in wanted
                for salt in dict.fromkeys(arm.salt for arm in arms)
                if (asked := [a for a in arms if a.salt == salt and key in missing[a.label]])
            ]
            await run_each(items, answer, concurrency=max(1, concurrency // len(arms)))


async def _sample(
    test: CodeTest, problem: Problem, sample: int, arms: Sequence[Arm], servers: Servers
) -> list[Record]:
    """Return the sample of each arm; they share their seed."""
    path, body = build_request(problem, test.form)
    seed = seed_of(test.seed, problem.task_id, sample, *([arms[0].salt] if arms[0].salt else []))
    body |= {"max_tokens": test.max_tokens, "seed": seed}
    try:
        answers = await servers.ask_each(arms, path, body)
    except RunError as error:
        labels = ", ".join(repr(arm.label) for arm in arms)
        raise RunError(f"arm {labels}, task {problem.task_id}: {error}") from None
    return [
        _describe_sample(test, problem, sample, seed, arm, answer)
        for arm, answer in zip(arms, answers, strict=True)
    ]


def _describe_sample(
    test: CodeTest, problem: Problem, sample: int, seed: int, arm: Arm, answer: dict[str, Any]
) -> Record:
    try:
        choice = answer["choices"][0]
        text = choice["text"] if test.form != CHAT else choice["message"]["content"] or ""
        finish, usage = choice.get("finish_reason"), answer.get("usage") or {}
    except (KeyError, IndexError, TypeError, AttributeError):
        raise RunError(f"arm {arm.label!r}: the server at {arm.url} gives no choices") from None
    program = build_program(problem, text, test.form)
    record: Record = {
        "task_id": problem.task_id,
        "sample": sample,
        "seed": seed,
        "solution": program,
        "finish_reason": finish,
        "prompt_tokens": usage.get("prompt_tokens"),
        "completion_tokens": usage.get("completion_tokens"),
    }
    if test.form == CHAT:
        return {**record, "answer": text}
    return {**record, "completion": program.removeprefix(problem.setup)}


async def _examine(
    judge: Judge,
    problem: Problem,
    sample: Record,
    files: ArmFiles,
    progress: Callable[[str, int], None],
) -> None:
    outcome = await judge.judge(problem, str(sample["solution"]))
    files.results.add(describe(sample, outcome))
    progress("result", 1)


def describe(sample: Record, outcome: Outcome) -> Record:
    """Return the line of a result: of HumanEval's own results, with the kind of the failure."""
    line: dict[str, Any] = {
        "task_id": sample["task_id"],
        "sample": sample.get("sample", 0),
        "passed": outcome.verdict.passed,
        "result": outcome.verdict.kind,
        "stage": outcome.verdict.stage,
    }
    if outcome.more is not None:
        line |= {"plus_passed": outcome.more.passed, "plus_result": outcome.more.kind}
    return line


async def score_samples(
    test: CodeTest,
    samples: Sequence[Record],
    folder: Path,
    judge: Judge,
    progress: Callable[[str, int], None],
) -> None:
    """Judge samples that were made elsewhere; what the folder holds is not judged again.

    Args:
        test: whose tests hold.
        samples: with `task_id`, `sample`, and `solution`, a program.
        folder: of the run.
        judge: of the programs.
        progress: as for `run_code_test`.

    Raises:
        RunError: a file cannot be written.
        SandboxError: a sandbox does not start.
    """
    problems = {problem.task_id: problem for problem in test.problems}
    with ExitStack() as stack:
        files = ArmFiles(folder, "scored", stack)
        progress("result", len(files.results.records))
        there = {_key(record) for record in files.results.records}
        missing = [sample for sample in samples if _key(sample) not in there]

        async def examine(sample: Record) -> None:
            await _examine(judge, problems[str(sample["task_id"])], sample, files, progress)

        await run_each(missing, examine, concurrency=_WAITING_PROGRAMS)


def read_samples(path: Path, problems: Sequence[Problem]) -> list[Record]:
    """Return samples that were made elsewhere, as `score_samples` takes them.

    Args:
        path: JSON lines with `task_id`, and `completion` or, a whole program, `solution`.
        problems: that they are of.

    Raises:
        DataFileError: the file cannot be read; the line and the reason are named.
    """
    known = {problem.task_id: problem for problem in problems}
    counts: dict[str, int] = {}
    samples = []
    for number, record in read_records(path):
        place = f"{path}, line {number}"
        task_id = str(record.get("task_id"))
        if task_id not in known:
            raise DataFileError(f"{place}: the data has no task {shown(record.get('task_id'))}")
        if "solution" in record:
            program = text_field(record, "solution", place)
        else:
            program = known[task_id].setup + text_field(record, "completion", place)
        sample = counts.setdefault(task_id, 0)
        counts[task_id] += 1
        samples.append({"task_id": task_id, "sample": sample, "solution": program})
    return samples
