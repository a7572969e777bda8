"""A model as judge: grades of answers, and verdicts on pairs of them in both orders."""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from evaluation.chat.answers import Answers
from evaluation.chat.questions import JudgePrompt, Question
from evaluation.errors import DataFileError, RunError
from evaluation.folder import seed_of
from evaluation.records import Record, RecordLog
from evaluation.server import Arm, Servers, message_of, run_each

JUDGMENTS = "model_judgment"
SINGLE, PAIRWISE = "single", "pairwise"

NO_GRADE = -1
"""Grade of an answer that the judge gave none to, as FastChat has it."""

_MAX_TOKENS = 1024
_TRIES = 3
_GRADES = [re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]"), re.compile(r"\[\s*(\d+(?:\.\d+)?)\s*\]")]
_FIELD = re.compile(r"\{(\w+)\}")
_VERDICT = re.compile(r"\[\[\s*([ABC])\s*\]\]")
_WINNERS = {"A": 0, "B": 1, "C": None}
_TIE, _ERROR = "tie", "error"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Case:
    """One thing to judge: the answer of a model, or of two, to a turn."""

    question: Question
    turn: int
    models: tuple[str, ...]

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.question.question_id, self.turn, *self.models)


async def judge_answers(
    questions: Sequence[Question],
    answers: Answers,
    judge: Arm,
    prompts: Mapping[str, JudgePrompt],
    folder: Path,
    servers: Servers,
    *,
    kind: str,
    concurrency: int,
    progress: Callable[[str, int], None],
) -> list[Record]:
    """Let a judge grade all answers, or compare them in pairs; what is judged stays judged.

    Args:
        questions: that were answered.
        answers: of the models.
        judge: who judges.
        prompts: by name, as FastChat's files name them.
        folder: of the run; judgments go to `model_judgment/JUDGE_KIND.jsonl`, in FastChat's layout.
        servers: of the judge.
        kind: `single` or `pairwise`.
        concurrency: requests under way at once.
        progress: told `judgment` and how many more are there.

    Returns:
        All judgments. A judge that gives no grade or verdict is asked again, twice; then the grade
        is -1, the winner `error`.

    Raises:
        DataFileError: a prompt is missing.
        RunError: the judge refuses or is gone, or a file cannot be written.
    """
    (folder / JUDGMENTS).mkdir(exist_ok=True)
    path = folder / JUDGMENTS / ("single.jsonl" if kind == SINGLE else "pair.jsonl")
    with ExitStack() as stack:
        log = stack.enter_context(RecordLog(path))
        await servers.check([judge])
        there = {_key(record) for record in log.records}
        progress("judgment", len(there))
        asker = _Judge(judge, prompts, servers)

        async def examine(case: _Case) -> None:
            log.add(await (asker.grade if kind == SINGLE else asker.compare)(case, answers))
            progress("judgment", 1)

        cases = [case for case in _cases(questions, list(answers), kind) if case.key not in there]
        await run_each(cases, examine, concurrency=concurrency)
        return log.records


def count_cases(questions: Sequence[Question], models: Sequence[str], kind: str) -> int:
    """Return how many judgments there will be."""
    return sum(1 for _ in _cases(questions, models, kind))


def _cases(questions: Sequence[Question], models: Sequence[str], kind: str) -> Iterator[_Case]:
    groups = list(combinations(models, 1 if kind == SINGLE else 2))
    for question in questions:
        # Judges know of two turns.
        for turn in range(1, min(2, len(question.turns)) + 1):
            for group in groups:
                yield _Case(question=question, turn=turn, models=group)


def _key(record: Record) -> tuple[Any, ...]:
    models = [record[name] for name in ("model", "model_1", "model_2") if name in record]
    return (record["question_id"], record["turn"], *models)


class _Judge:
    """Asks the judge and reads what it says."""

    def __init__(self, arm: Arm, prompts: Mapping[str, JudgePrompt], servers: Servers) -> None:
        self._arm = arm
        self._prompts = prompts
        self._servers = servers

    async def grade(self, case: _Case, answers: Answers) -> Record:
        """Return the line of a grade."""
        prompt = self._prompt("single", "v1", "math-v1", case)
        (model,) = case.models
        text = _fill(prompt, _fields(case, {"": answers[model][case.question.question_id]}))
        said, grade = await self._ask(prompt, text, case, _read_grade)
        return {
            "question_id": case.question.question_id,
            "model": model,
            "judge": [self._arm.model, prompt.name],
            "user_prompt": text,
            "judgment": said,
            "score": NO_GRADE if grade is None else grade,
            "turn": case.turn,
            "tstamp": time.time(),
        }

    async def compare(self, case: _Case, answers: Answers) -> Record:
        """Return the line of two verdicts, the answers in both orders."""
        prompt = self._prompt("pair", "v2", "math-v1", case)
        line: Record = {
            "question_id": case.question.question_id,
            "model_1": case.models[0],
            "model_2": case.models[1],
            "judge": [self._arm.model, prompt.name],
            "turn": case.turn,
        }
        for game, (first, second) in enumerate([(0, 1), (1, 0)], start=1):
            of = [answers[model][case.question.question_id] for model in case.models]
            shown = {"a": of[first], "b": of[second]}
            text = _fill(prompt, _fields(case, shown))
            said, verdict = await self._ask(prompt, text, case, _read_verdict)
            winner = _ERROR if verdict is None else _TIE
            if verdict is not None and (place := _WINNERS[verdict]) is not None:
                winner = f"model_{(first, second)[place] + 1}"
            line |= {
                f"g{game}_user_prompt": text,
                f"g{game}_judgment": said,
                f"g{game}_winner": winner,
            }
        return {**line, "tstamp": time.time()}

    def _prompt(self, kind: str, general: str, referenced: str, case: _Case) -> JudgePrompt:
        name = f"{kind}-{referenced if case.question.is_referenced else general}"
        name += "-multi-turn" if case.turn == 2 else ""
        if name not in self._prompts:
            raise DataFileError(f"the judge prompts lack {name!r}")
        return self._prompts[name]

    async def _ask(
        self, prompt: JudgePrompt, text: str, case: _Case, read: Callable[[str], Any]
    ) -> tuple[str, Any]:
        """Return what the judge said, and what `read` finds in it; None: nothing, in any try."""
        said, found = "", None
        for attempt in range(_TRIES):
            body: dict[str, Any] = {
                "messages": [
                    {"role": "system", "content": prompt.system},
                    {"role": "user", "content": text},
                ],
                "max_tokens": _MAX_TOKENS,
                # The first try is the judge's likeliest answer; the others are drawn.
                "temperature": 0.0 if attempt == 0 else 0.7,
                "seed": seed_of(attempt, *case.key),
            }
            try:
                answer = await self._servers.ask(self._arm, "/v1/chat/completions", body)
            except RunError as error:
                raise RunError(
                    f"the judge, question {case.question.question_id}: {error}"
                ) from None
            said = message_of(answer, f"the judge at {self._arm.url}")
            found = read(said)
            if found is not None:
                break
        return said, found


def _fill(prompt: JudgePrompt, fields: Mapping[str, str]) -> str:
    """Return a prompt's text.

    Raises:
        DataFileError: the template has a field that there is not.
    """

    def value(match: re.Match[str]) -> str:
        if match[1] not in fields:
            raise DataFileError(f"the judge prompt {prompt.name!r} has no field {match[1]!r}")
        return fields[match[1]]

    return _FIELD.sub(value, prompt.template)


def _fields(case: _Case, answers: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return what a template's fields are replaced by.

    Args:
        case: what is judged.
        answers: of the assistants, by their letter; of a single one by an empty text.
    """
    question = case.question
    fields = {"question": question.turns[0]}
    for number in range(case.turn):
        fields[f"question_{number + 1}"] = question.turns[number]
        reference = question.reference[number] if number < len(question.reference) else ""
        fields[f"ref_answer_{number + 1}"] = reference
    for letter, turns in answers.items():
        stem = f"answer_{letter}" if letter else "answer"
        fields[stem] = turns[0]
        for number in range(case.turn):
            fields[f"{stem}_{number + 1}"] = turns[number]
    return fields


def _read_grade(said: str) -> float | None:
    found = next((match for pattern in _GRADES if (match := pattern.search(said))), None)
    grade = None if found is None else float(found[1])
    return grade if grade is not None and 1 <= grade <= 10 else None


def _read_verdict(said: str) -> str | None:
    found = _VERDICT.findall(said)
    # One that names several has not decided.
    return found[0] if len(set(found)) == 1 else None
