"""Answers of models to questions of several turns."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from evaluation.chat.questions import Question
from evaluation.errors import RunError
from evaluation.folder import open_logs, seed_of
from evaluation.records import Record
from evaluation.server import Arm, Servers, message_of, run_each

ANSWERS = "model_answer"

Answers = Mapping[str, Mapping[int | str, tuple[str, ...]]]


async def answer_questions(
    questions: Sequence[Question],
    arms: Sequence[Arm],
    folder: Path,
    servers: Servers,
    *,
    max_tokens: int,
    seed: int,
    concurrency: int,
    progress: Callable[[str, int], None],
) -> Answers:
    """Let each arm answer each question; what the folder holds is not asked again.

    An arm without a temperature is asked at the one of the question's category.

    Args:
        questions: of any number of turns.
        arms: who is asked.
        folder: of the run; answers go to `model_answer/ARM.jsonl`, in FastChat's layout.
        servers: of the arms.
        max_tokens: of one turn's answer.
        seed: of the draws; arms share them.
        concurrency: questions under way at once.
        progress: told `answer` and how many more are there.

    Returns:
        The turns of each answer, by arm and question.

    Raises:
        RunError: a server refuses or is gone, or a file cannot be written.
    """
    (folder / ANSWERS).mkdir(exist_ok=True)
    with ExitStack() as stack:
        logs = open_logs(folder / ANSWERS, [arm.label for arm in arms], ".jsonl", stack)
        await servers.check(arms)
        there = {label: {r["question_id"] for r in log.records} for label, log in logs.items()}
        progress("answer", sum(map(len, there.values())))

        async def answer(item: tuple[Arm, Question]) -> None:
            arm, question = item
            turns, usage = await _ask(arm, question, servers, max_tokens=max_tokens, seed=seed)
            logs[arm.label].add(_describe(arm, question, turns, usage))
            progress("answer", 1)

        items = [
            (arm, question)
            for question in questions
            for arm in arms
            if question.question_id not in there[arm.label]
        ]
        await run_each(items, answer, concurrency=concurrency)
        return {
            label: {r["question_id"]: tuple(r["choices"][0]["turns"]) for r in log.records}
            for label, log in logs.items()
        }


async def _ask(
    arm: Arm, question: Question, servers: Servers, *, max_tokens: int, seed: int
) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the answer to each turn, and the tokens that the server counted."""
    messages: list[dict[str, str]] = []
    turns, usage = [], []
    for turn, text in enumerate(question.turns):
        messages.append({"role": "user", "content": text})
        body: dict[str, Any] = {
            "messages": messages,
            "max_tokens": max_tokens,
            "seed": seed_of(seed, question.question_id, turn, *filter(None, [arm.salt])),
            "temperature": question.temperature,
        }
        try:
            answer = await servers.ask(arm, "/v1/chat/completions", body)
        except RunError as error:
            raise RunError(f"arm {arm.label!r}, question {question.question_id}: {error}") from None
        content = message_of(answer, f"arm {arm.label!r}: the server at {arm.url}")
        turns.append(content)
        usage.append(answer.get("usage") or {})
        messages.append({"role": "assistant", "content": content})
    return turns, usage


def _describe(
    arm: Arm, question: Question, turns: Sequence[str], usage: Sequence[dict[str, Any]]
) -> Record:
    return {
        "question_id": question.question_id,
        "answer_id": f"{arm.label}/{question.question_id}",
        "model_id": arm.label,
        "choices": [{"index": 0, "turns": list(turns)}],
        "tstamp": time.time(),
        "completion_tokens": [counts.get("completion_tokens") for counts in usage],
    }
