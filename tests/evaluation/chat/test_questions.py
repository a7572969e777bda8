"""Files in FastChat's layouts."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from evaluation.chat.questions import (
    JUDGE_PROMPTS,
    Question,
    read_answers,
    read_judge_prompts,
    read_questions,
)
from evaluation.errors import DataFileError

QUESTION = {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]}
ANSWER = {"question_id": 81, "model_id": "gpt", "choices": [{"index": 0, "turns": ["A", "B"]}]}


def write(folder: Path, *records: Any, name: str = "a.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_questions_are_read_with_references(tmp_path: Path) -> None:
    path = write(tmp_path, QUESTION, {"question_id": "x", "turns": ["Hi"], "reference": ["Ho"]})
    references = write(tmp_path, ANSWER, name="b.jsonl")
    assert read_questions(path, references) == [
        Question(question_id=81, category="writing", turns=("Write.", "Again."),
                 reference=("A", "B")),
        Question(question_id="x", category="general", turns=("Hi",), reference=("Ho",)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("category", "temperature", "is_referenced"),
    [("writing", 0.7, False), ("math", 0.0, True), ("stem", 0.1, False), ("other", 0.7, False)],
)
def test_category_decides_temperature_and_whether_the_reference_counts(
    category: str, temperature: float, is_referenced: bool
) -> None:
    question = Question(question_id=1, category=category, turns=("a",), reference=("b",))
    assert question.temperature == temperature
    assert question.is_referenced == is_referenced
    bare = Question(question_id=1, category=category, turns=("a",))
    assert not bare.is_referenced


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question_id": None}, "question_id must be a number or a text, got null"),
        ({"question_id": True}, "question_id must be a number or a text, got true"),
        ({"turns": []}, r"turns must be a list of texts, got \[\]"),
        ({"turns": "Hi"}, 'turns must be a list of texts, got "Hi"'),
        ({"turns": [1]}, r"turns must be a list of texts, got \[1\]"),
        ({"reference": [1]}, r"reference must be a list of texts, got \[1\]"),
        ({"question_id": 80}, "question_id 80 stands there twice"),
    ],
)
def test_bad_question_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path, {**QUESTION, "question_id": 80}, {**QUESTION, **change})
    with pytest.raises(DataFileError, match=f"line 2: {message}"):
        read_questions(path)


@pytest.mark.parametrize("choices", [None, [], ["x"], [{"turns": []}]])
def test_bad_answer_is_named(tmp_path: Path, choices: Any) -> None:
    with pytest.raises(DataFileError, match=r"line 1: (choices|turns) must be a list"):
        read_answers(write(tmp_path, {**ANSWER, "choices": choices}))


def test_our_judge_prompts_are_all_that_a_judge_may_need() -> None:
    prompts = read_judge_prompts(JUDGE_PROMPTS)
    assert set(prompts) == {
        f"{kind}{turn}"
        for kind in ("single-v1", "single-math-v1", "pair-v2", "pair-math-v1")
        for turn in ("", "-multi-turn")
    }
    for name, prompt in prompts.items():
        fields = set(re.findall(r"\{(\w+)\}", prompt.template))
        assert ("ref_answer_1" in fields) == ("math" in name)
        assert ("question_2" in fields) == ("multi-turn" in name)
        assert ("[[A]]" in prompt.system) == ("pair" in name)


def test_judge_prompt_without_a_template_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, {"name": "x", "system_prompt": "y"})
    with pytest.raises(DataFileError, match="line 1: prompt_template must be a text, got null"):
        read_judge_prompts(path)
