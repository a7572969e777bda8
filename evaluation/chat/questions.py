"""Questions, reference answers and judge prompts, in FastChat's layouts."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from evaluation.errors import DataFileError
from evaluation.records import Record, read_records, shown, text_field

JUDGE_PROMPTS = Path(__file__).with_name("judge_prompts.jsonl")

# Categories whose answers are right or wrong: the judge sees a reference, and none is drawn.
_REFERENCED = ("math", "reasoning", "coding", "arena-hard-200")
# As MT-Bench draws its answers; what is in no category is drawn like writing.
_TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0,
    "reasoning": 0.0, "stem": 0.1, "humanities": 0.1,
}  # fmt: skip
_DEFAULT_TEMPERATURE = 0.7


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What is asked, turn by turn.

    Attributes:
        question_id: as the file has it.
        category: such as writing.
        turns: of the user, at least one.
        reference: answers to the turns, or empty.
    """

    question_id: int | str
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] = ()

    @property
    def temperature(self) -> float:
        """Temperature at which MT-Bench draws answers of the category."""
        return _TEMPERATURES.get(self.category, _DEFAULT_TEMPERATURE)

    @property
    def is_referenced(self) -> bool:
        """Whether a judge compares answers with the reference."""
        return self.category in _REFERENCED and bool(self.reference)


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgePrompt:
    """What a judge is asked.

    Attributes:
        name: such as `single-v1`.
        system: the instruction.
        template: of the question, with named fields in braces.
    """

    name: str
    system: str
    template: str


def read_questions(path: Path, references: Path | None = None) -> list[Question]:
    """Return the questions of a file, in its order.

    Args:
        path: JSON lines with `question_id`, `turns` and perhaps `category` and `reference`.
        references: JSON lines of answers, such as a strong model's.

    Raises:
        DataFileError: a file cannot be read; the line, the field and the reason are named.
    """
    known = {} if references is None else read_answers(references)
    questions: dict[int | str, Question] = {}
    for number, record in read_records(path):
        place = f"{path}, line {number}"
        question_id = _id(record, place)
        if question_id in questions:
            raise DataFileError(f"{place}: question_id {shown(question_id)} stands there twice")
        own = record.get("reference")
        reference = known.get(question_id) or (_texts(record, "reference", place) if own else ())
        questions[question_id] = Question(
            question_id=question_id,
            category=str(record.get("category") or "general"),
            turns=_texts(record, "turns", place),
            reference=reference,
        )
    return list(questions.values())


def read_answers(path: Path) -> Mapping[int | str, tuple[str, ...]]:
    """Return the turns of the first choice of each answer in a file, by question.

    Raises:
        DataFileError: the file cannot be read; the line, the field and the reason are named.
    """
    answers = {}
    for number, record in read_records(path):
        place = f"{path}, line {number}"
        choices = record.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise DataFileError(f"{place}: choices must be a list of objects, got {shown(choices)}")
        answers[_id(record, place)] = _texts(choices[0], "turns", place)
    return answers


def read_judge_prompts(path: Path) -> Mapping[str, JudgePrompt]:
    """Return judge prompts by their names.

    Raises:
        DataFileError: the file cannot be read; the line, the field and the reason are named.
    """
    prompts = {}
    for number, record in read_records(path):
        place = f"{path}, line {number}"
        name = text_field(record, "name", place)
        prompts[name] = JudgePrompt(
            name=name,
            system=text_field(record, "system_prompt", place),
            template=text_field(record, "prompt_template", place),
        )
    return prompts


def _id(record: Record, place: str) -> int | str:
    value = record.get("question_id")
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise DataFileError(f"{place}: question_id must be a number or a text, got {shown(value)}")
    return value


def _texts(record: Record, name: str, place: str) -> tuple[str, ...]:
    value = record.get(name)
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise DataFileError(f"{place}: {name} must be a list of texts, got {shown(value)}")
    return tuple(value)
