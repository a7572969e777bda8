"""Questions with an answer that can be checked: a number, or a text."""

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.comparison.figures import Outcomes
from evaluation.errors import DataFileError
from evaluation.folder import open_logs, seed_of
from evaluation.records import RecordLog, read_records, shown
from evaluation.server import Arm, Servers, message_of, run_each

# GSM8K's own mark before the answer.
_MARK = "####"
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Exercise:
    """A question and what is right.

    Attributes:
        name: of it, unique in its file.
        question: that is asked.
        answer: that is right: its number, if it has one at its end.
    """

    name: str
    question: str
    answer: str


def read_exercises(path: Path) -> list[Exercise]:
    """Return the exercises of a file.

    Args:
        path: JSON lines with `question` (or `prompt`) and `answer`; of an answer with `####` in it,
            what follows that.

    Raises:
        DataFileError: it cannot be read; the line, the field and the reason are named.
    """
    found = []
    for number, record in read_records(path):
        question, answer = record.get("question", record.get("prompt")), record.get("answer")
        for name, value in (("question", question), ("answer", answer)):
            if not isinstance(value, str) or not value.strip():
                raise DataFileError(
                    f"{path}, line {number}: {name} must be a text, got {shown(value)}"
                )
        assert isinstance(question, str)
        assert isinstance(answer, str)
        right = answer.rpartition(_MARK)[2].strip()
        found.append(Exercise(name=str(number), question=question, answer=right))
    return found


def is_right(said: str, answer: str) -> bool:
    """Return whether a reply gives the answer: its last number, or for a text its last line."""
    wanted = _NUMBER.fullmatch(answer.rstrip(".").removeprefix("$"))
    if wanted is not None:
        numbers = _NUMBER.findall(said)
        return bool(numbers) and _value(numbers[-1]) == _value(wanted[0])
    lines = [line for line in said.splitlines() if line.strip()]
    return bool(lines) and _plain(lines[-1]) == _plain(answer)


def _value(number: str) -> float:
    return float(number.replace(",", ""))


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())


async def ask_exercises(
    exercises: Sequence[Exercise],
    arms: Sequence[Arm],
    folder: Path,
    servers: Servers,
    *,
    num_samples: int,
    max_tokens: int,
    seed: int,
    concurrency: int,
    progress: Callable[[str, int], None],
) -> dict[str, Outcomes]:
    """Let each arm answer each exercise in a chat; what the folder holds is not asked again.

    Args:
        exercises: that are asked.
        arms: who is asked.
        folder: of the run.
        servers: of the arms.
        num_samples: of each exercise.
        max_tokens: of a reply.
        seed: of the samples; arms share their random numbers.
        concurrency: requests under way at once.
        progress: told `sample` and how many more are there.

    Returns:
        1 for each right reply and 0 for each wrong one.

    Raises:
        RunError: a server refuses or is gone, or a file cannot be written.
    """
    with ExitStack() as stack:
        logs = open_logs(folder, [arm.label for arm in arms], "_replies.jsonl", stack)
        await servers.check(arms)
        there = {
            label: {(r["task_id"], r["sample"]) for r in log.records} for label, log in logs.items()
        }
        progress("sample", sum(map(len, there.values())))

        async def ask(item: tuple[Exercise, int, list[Arm]]) -> None:
            exercise, sample, asked = item
            body: dict[str, Any] = {
                "messages": [{"role": "user", "content": exercise.question}],
                "max_tokens": max_tokens,
                "seed": seed_of(seed, exercise.name, sample, *filter(None, [asked[0].salt])),
            }
            answers = await servers.ask_each(asked, "/v1/chat/completions", body)
            for arm, answer in zip(asked, answers, strict=True):
                said = message_of(answer, f"arm {arm.label!r}: the server at {arm.url}")
                logs[arm.label].add(
                    {
                        "task_id": exercise.name,
                        "sample": sample,
                        "reply": said,
                        "right": is_right(said, exercise.answer),
                    }
                )
                progress("sample", 1)

        items = [
            (exercise, sample, asked)
            for exercise in exercises
            for sample in range(num_samples)
            for salt in dict.fromkeys(arm.salt for arm in arms)
            if (
                asked := [
                    arm
                    for arm in arms
                    if arm.salt == salt and (exercise.name, sample) not in there[arm.label]
                ]
            )
        ]
        await run_each(items, ask, concurrency=max(1, concurrency // len(arms)))
        return {label: _outcomes(log, exercises, num_samples) for label, log in logs.items()}


def _outcomes(log: RecordLog, exercises: Sequence[Exercise], num_samples: int) -> Outcomes:
    values = {(r["task_id"], r["sample"]): float(r["right"]) for r in log.records}
    return {e.name: [values[e.name, sample] for sample in range(num_samples)] for e in exercises}
