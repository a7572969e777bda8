"""Multiple-choice data sets, as the contexts and continuations that lm-evaluation-harness makes.

Each reader takes one record of a file and returns a question. The layouts are those of the data
sets' own files and of their copies on the Hugging Face hub.
"""

import csv
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from evaluation.errors import DataFileError
from evaluation.records import Record, read_records, shown, text_field


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question with its choices.

    Attributes:
        name: of the question within its task.
        subject: part of the task, or empty.
        pairs: (context, continuation) of each choice.
        answer: index of the right choice.
        lengths: characters of each choice, by which `acc_norm` divides.
    """

    name: str
    subject: str
    pairs: tuple[tuple[str, str], ...]
    answer: int
    lengths: tuple[int, ...]


def read_task(task: str, path: Path) -> list[Question]:
    """Return the questions of a task.

    Args:
        task: one of `TASKS`.
        path: JSON lines; for MMLU also a CSV file of a subject, or a folder of them.

    Raises:
        DataFileError: a file cannot be read; the line, the field and the reason are named.
    """
    if task == "mmlu":
        return _read_mmlu(path)
    questions = []
    for number, record in read_records(path):
        place = f"{path}, line {number}"
        questions.append(TASKS[task](record, str(number), place))
    return questions


def _hellaswag(record: Record, name: str, place: str) -> Question:
    first, second = (text_field(record, field, place) for field in ("ctx_a", "ctx_b"))
    label = text_field(record, "activity_label", place)
    context = _clean(f"{label}: {first} {second.capitalize()}")
    endings = [_clean(ending) for ending in _texts(record, "endings", place)]
    return _question(name, context, endings, _index(record, "label", len(endings), place))


def _clean(text: str) -> str:
    """Return a text without the marks of WikiHow, as the harness cleans it."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _arc(record: Record, name: str, place: str) -> Question:
    if "query" in record:
        return _queried(record, name, place)
    choices = record.get("choices")
    if isinstance(choices, dict):
        texts, labels = _texts(choices, "text", place), _texts(choices, "label", place)
    else:
        raise DataFileError(f"{place}: choices must be an object, got {shown(choices)}")
    key = text_field(record, "answerKey", place)
    if key not in labels:
        raise DataFileError(f"{place}: answerKey must be one of {shown(labels)}, got {shown(key)}")
    question = text_field(record, "question", place)
    return _question(name, f"Question: {question}\nAnswer:", texts, labels.index(key))


def _piqa(record: Record, name: str, place: str) -> Question:
    if "query" in record:
        return _queried(record, name, place)
    goal = text_field(record, "goal", place)
    choices = [text_field(record, field, place) for field in ("sol1", "sol2")]
    return _question(name, f"Question: {goal}\nAnswer:", choices, _index(record, "label", 2, place))


def _queried(record: Record, name: str, place: str) -> Question:
    """Return a question whose prompt the file has."""
    choices = _texts(record, "choices", place)
    query = text_field(record, "query", place)
    return _question(
        name, f"{query}\nAnswer:", choices, _index(record, "gold", len(choices), place)
    )


def _winogrande(record: Record, name: str, place: str) -> Question:
    """Return a question whose choices differ in their contexts: the rest of the sentence counts."""
    if "context_options" in record:
        contexts = _texts(record, "context_options", place)
        rest = text_field(record, "continuation", place)
        answer = _index(record, "gold", len(contexts), place)
    else:
        sentence = text_field(record, "sentence", place)
        head, found, tail = sentence.partition("_")
        if not found:
            raise DataFileError(f"{place}: sentence has no _ to be filled")
        contexts = [head + text_field(record, f"option{n}", place) for n in (1, 2)]
        rest, answer = tail.strip(), _index(record, "answer", 2, place, first=1)
    return Question(
        name=name,
        subject="",
        pairs=tuple((context, " " + rest) for context in contexts),
        answer=answer,
        lengths=(len(rest),) * len(contexts),
    )


def _read_mmlu(path: Path) -> list[Question]:
    """Return the questions of subjects, each asked without examples."""
    if path.is_dir():
        files = sorted(path.glob("*.csv"))
        if not files:
            raise DataFileError(f"{path} holds no CSV files")
    else:
        files = [path]
    questions = []
    for file in files:
        subject = file.stem.removesuffix("_test").removesuffix("_val").removesuffix("_dev")
        rows = read_records(file) if file.suffix != ".csv" else _read_csv(file)
        for number, record in rows:
            place = f"{file}, line {number}"
            subject_name = str(record.get("subject") or subject)
            questions.append(_mmlu(record, f"{subject_name}/{number}", subject_name, place))
    return questions


def _mmlu(record: Record, name: str, subject: str, place: str) -> Question:
    choices = record.get("choices")
    texts = (
        _texts(record, "choices", place)
        if choices is not None
        else [text_field(record, letter, place) for letter in "ABCD"]
    )
    if len(texts) != 4:
        raise DataFileError(f"{place}: choices must be four, got {len(texts)}")
    question = text_field(record, "question", place).strip()
    lines = [f"{letter}. {text}" for letter, text in zip("ABCD", texts, strict=True)]
    context = (
        "The following are multiple choice questions (with answers) about "
        f"{subject.replace('_', ' ')}.\n\n{question}\n" + "\n".join(lines) + "\nAnswer:"
    )
    answer = _index(record, "answer", 4, place)
    made = _question(name, context, list("ABCD"), answer)
    return Question(
        name=name, subject=subject, pairs=made.pairs, answer=answer, lengths=made.lengths
    )


def _read_csv(path: Path) -> list[tuple[int, Record]]:
    """Return the rows of a CSV file, with its own head or MMLU's, which has none."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
    except OSError as error:
        raise DataFileError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataFileError(f"{path} is no CSV file in UTF-8: {error}") from None
    head = ["question", "A", "B", "C", "D", "answer"]
    start = 1 if rows and rows[0] == head else 0
    if len(rows) <= start:
        raise DataFileError(f"{path} holds no questions")
    found = []
    for number, row in enumerate(rows[start:], start=start + 1):
        if len(row) != len(head):
            raise DataFileError(f"{path}, row {number}: has {len(row)} columns, not {len(head)}")
        found.append((number, dict(zip(head, row, strict=True))))
    return found


def _question(name: str, context: str, choices: list[str], answer: int) -> Question:
    return Question(
        name=name,
        subject="",
        pairs=tuple((context, " " + choice) for choice in choices),
        answer=answer,
        lengths=tuple(map(len, choices)),
    )


def _texts(record: Mapping[str, Any], field: str, place: str) -> list[str]:
    value = record.get(field)
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(v, str) for v in value):
        raise DataFileError(f"{place}: {field} must be a list of texts, got {shown(value)}")
    return value


def _index(record: Record, field: str, count: int, place: str, *, first: int = 0) -> int:
    """Return the index of the right choice: a number, a number as a text, or a letter."""
    value = record.get(field)
    if isinstance(value, str):
        letters = "ABCDEFGHIJ"[:count]
        value = letters.index(value) + first if value in letters and value else value
        value = int(value) if isinstance(value, str) and value.isdecimal() else value
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value - first < count:
        given, last = shown(record.get(field)), first + count - 1
        raise DataFileError(f"{place}: {field} must be {first} to {last}, got {given}")
    return value - first


TASKS: Mapping[str, Callable[[Record, str, str], Question]] = MappingProxyType(
    {
        "hellaswag": _hellaswag,
        "winogrande": _winogrande,
        "arc": _arc,
        "piqa": _piqa,
        "mmlu": lambda record, name, place: _mmlu(record, name, "", place),
    }
)
