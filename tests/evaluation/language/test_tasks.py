"""Multiple choice: what is asked, by lm-evaluation-harness's definitions, and what comes of it."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evaluation.errors import DataFileError
from evaluation.language.choices import ask_choices, summarise, to_markdown
from evaluation.language.tasks import Question, read_task
from evaluation.server import Arm
from tests.evaluation.conftest import Body, FakeServer

Make = Callable[..., FakeServer]
HELLASWAG = {
    "activity_label": "Roof shingle removal", "ctx_a": "A man is sitting on a roof.", "ctx_b": "he",
    "endings": ["is using wrap. [step] It", "is ripping tiles off.", "is here [title] Now", "x"],
    "label": "3",
}  # fmt: skip
ARC = {
    "question": "Which is hot?", "answerKey": "B",
    "choices": {"text": ["ice", "fire"], "label": ["A", "B"]},
}  # fmt: skip
PIQA = {"goal": "Boil water.", "sol1": "Use a pot.", "sol2": "Use a hat.", "label": 0}
QUERIED = {"query": "Question: Which?", "choices": ["this", "that"], "gold": 1}
WINOGRANDE = {
    "sentence": "Ann paid Bob because _ was rich.", "option1": "Ann", "option2": "Bob",
    "answer": "2",
}  # fmt: skip
OPTIONS = {"context_options": ["So Ann", "So Bob"], "continuation": "left.", "gold": 0}
MMLU = {"question": "2+2? ", "choices": ["1", "2", "3", "4"], "answer": 3, "subject": "high_math"}


def write(folder: Path, *records: Any, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize(
    ("task", "record", "pairs", "answer"),
    [
        (
            "hellaswag",
            HELLASWAG,
            [
                ("Roof shingle removal: A man is sitting on a roof. He", " " + ending)
                for ending in ("is using wrap. It", "is ripping tiles off.", "is here. Now", "x")
            ],
            3,
        ),
        ("arc", ARC, [("Question: Which is hot?\nAnswer:", c) for c in (" ice", " fire")], 1),
        (
            "piqa",
            PIQA,
            [("Question: Boil water.\nAnswer:", c) for c in (" Use a pot.", " Use a hat.")],
            0,
        ),
        ("piqa", QUERIED, [("Question: Which?\nAnswer:", c) for c in (" this", " that")], 1),
        ("arc", QUERIED, [("Question: Which?\nAnswer:", c) for c in (" this", " that")], 1),
        (
            "winogrande",
            WINOGRANDE,
            [(f"Ann paid Bob because {name}", " was rich.") for name in ("Ann", "Bob")],
            1,
        ),
        ("winogrande", OPTIONS, [("So Ann", " left."), ("So Bob", " left.")], 0),
        (
            "mmlu",
            MMLU,
            [
                (
                    "The following are multiple choice questions (with answers) about high math."
                    "\n\n2+2?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:",
                    " " + letter,
                )
                for letter in "ABCD"
            ],
            3,
        ),
    ],
)
def test_question_is_asked_as_the_harness_asks_it(
    tmp_path: Path, task: str, record: dict[str, Any], pairs: list, answer: int
) -> None:
    (question,) = read_task(task, write(tmp_path, record))
    assert list(question.pairs) == pairs
    assert question.answer == answer
    assert question.lengths == tuple(len(continuation) - 1 for _, continuation in pairs)


def test_mmlu_is_a_folder_of_files_for_subjects(tmp_path: Path) -> None:
    row = '"What, now?",a,b,c,d,{}\n'
    (tmp_path / "law_test.csv").write_text("question,A,B,C,D,answer\n" + row.format(2))
    (tmp_path / "art_test.csv").write_text(row.format("A") + row.format("D"))
    questions = read_task("mmlu", tmp_path)
    assert [(q.name, q.subject, q.answer) for q in questions] == [
        ("art/1", "art", 0), ("art/2", "art", 3), ("law/2", "law", 2),
    ]  # fmt: skip
    assert "What, now?\nA. a\n" in questions[0].pairs[0][0]


@pytest.mark.parametrize(
    ("task", "record", "message"),
    [
        ("hellaswag", {**HELLASWAG, "label": 4}, "label must be 0 to 3, got 4"),
        ("hellaswag", {**HELLASWAG, "label": ""}, 'label must be 0 to 3, got ""'),
        ("hellaswag", {**HELLASWAG, "endings": ["x"]}, "endings must be a list of texts"),
        ("hellaswag", {**HELLASWAG, "ctx_a": None}, "ctx_a must be a text, got null"),
        ("arc", {**ARC, "answerKey": "E"}, "answerKey must be one of"),
        ("arc", {**ARC, "choices": "x"}, 'choices must be an object, got "x"'),
        ("piqa", {**PIQA, "label": True}, "label must be 0 to 1, got true"),
        ("winogrande", {**WINOGRANDE, "sentence": "No gap."}, "sentence has no _ to be filled"),
        ("winogrande", {**WINOGRANDE, "answer": "0"}, 'answer must be 1 to 2, got "0"'),
        ("mmlu", {**MMLU, "choices": ["1", "2"]}, "choices must be four, got 2"),
        ("mmlu", {**MMLU, "answer": "E"}, 'answer must be 0 to 3, got "E"'),
    ],
)
def test_bad_record_is_named(
    tmp_path: Path, task: str, record: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataFileError, match=f"line 1: {message}"):
        read_task(task, write(tmp_path, record))


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "holds no questions"), ("a,b\n", "row 1: has 2 columns, not 6"),
     ("question,A,B,C,D,answer\n", "holds no questions")],
)  # fmt: skip
def test_bad_csv_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DataFileError, match=message):
        read_task("mmlu", tmp_path / "a.csv")
    with pytest.raises(DataFileError, match="holds no CSV files"):
        read_task("mmlu", tmp_path / ("x" if (tmp_path / "x").mkdir() else "x"))


def question(number: int, choices: tuple[str, ...], answer: int) -> Question:
    return Question(
        name=str(number), subject="s" if number % 2 else "t",
        pairs=tuple(("Q:", " " + choice) for choice in choices), answer=answer,
        lengths=tuple(map(len, choices)),
    )  # fmt: skip


# The server below finds short words likely, so the longest choice is the least likely as a whole.
QUESTIONS = [question(n, ("a b c d e f", "mmmmmmm"), n % 2) for n in range(8)]


def echo(body: Body) -> Body:
    """Score a choice by its words: one costs 1, seven letters in one word 2."""
    choices = []
    for index, prompt in enumerate(body["prompt"]):
        tokens = ["Q:", *(" " + word for word in prompt.split()[1:])]
        offsets = [sum(map(len, tokens[:n])) for n in range(len(tokens))]
        values = [None, *(-2.0 if len(t) > 3 else -1.0 for t in tokens[1:])]
        tops = [None, *({"x": -0.1} for _ in tokens[1:])]
        choices.append({"index": index, "logprobs": {
            "token_logprobs": values, "text_offset": offsets, "top_logprobs": tops}})  # fmt: skip
    return {"choices": choices}


def ask(folder: Path, server: FakeServer) -> dict[str, list[dict[str, Any]]]:
    arms = [Arm(label="a", model="base"), Arm(label="b", model="base")]
    return asyncio.run(
        ask_choices(
            QUESTIONS, arms, folder, server.servers(patience_s=0.02), concurrency=3,
            progress=lambda *_: None,
        )
    )  # fmt: skip


def test_likeliest_choice_is_the_answer_as_a_whole_or_a_character(
    tmp_path: Path, make_server: Make
) -> None:
    results = ask(tmp_path, make_server(echo))
    record = next(r for r in results["a"] if r["question"] == "0")
    assert record["logprobs"] == [-6.0, -2.0]
    # -6 over 11 characters is less a character than -2 over 7.
    assert (record["acc"], record["acc_norm"]) == (False, False)
    summary = summarise(results)
    assert summary["arms"]["a"]["acc"]["value"] == 0.5
    assert summary["arms"]["a"]["subjects"] == {
        "t": {"questions": 4, "acc": 0.0}, "s": {"questions": 4, "acc": 1.0},
    }  # fmt: skip
    assert summary["differences"]["b"]["acc"] == {"value": 0, "low": 0, "high": 0, "p": 1}
    page = to_markdown(summary, "task")
    assert "| `a` | 8 | 50.00 [" in page
    assert "| s | 4 | 100.0 | 100.0 |" in page


def test_asked_questions_are_not_asked_again(tmp_path: Path, make_server: Make) -> None:
    first = ask(tmp_path, make_server(echo))
    path = tmp_path / "a_choices.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]) + '{"ques')
    server = make_server(echo)
    again = ask(tmp_path, server)
    assert len(server.bodies) == 2
    assert sorted(map(str, again["a"])) == sorted(map(str, first["a"]))
