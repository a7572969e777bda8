"""Answers and judgments: what is asked, what is read, what is kept, what is not done twice."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evaluation.chat.answers import answer_questions
from evaluation.chat.judging import judge_answers
from evaluation.chat.questions import (
    JUDGE_PROMPTS,
    JudgePrompt,
    Question,
    read_judge_prompts,
)
from evaluation.errors import DataFileError, RunError
from evaluation.server import Arm
from tests.evaluation.conftest import Body, FakeServer

Make = Callable[..., FakeServer]
QUESTIONS = [
    Question(question_id=1, category="writing", turns=("Write.", "Again.")),
    Question(question_id=2, category="math", turns=("1+1?", "And {answer}?"), reference=("2", "3")),
]
ARMS = [Arm(label="a", model="base"), Arm(label="b", model="base", fields={"temperature": 0.2})]
JUDGE = Arm(label="judge", model="base")
ANSWERS = {"a": {1: ("A11", "A12"), 2: ("A21", "A22")}, "b": {1: ("B11", "B12"), 2: ("x", "y")}}


def chat(text: str) -> Body:
    return {"choices": [{"message": {"content": text}}], "usage": {"completion_tokens": 3}}


def nothing(*_: object) -> None:
    """Take no note of progress."""


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answer(folder: Path, server: FakeServer) -> Any:
    return asyncio.run(
        answer_questions(
            QUESTIONS, ARMS, folder, server.servers(patience_s=0.02), max_tokens=9, seed=0,
            concurrency=4, progress=nothing,
        )
    )  # fmt: skip


def test_turns_are_asked_one_after_the_other(tmp_path: Path, make_server: Make) -> None:
    server = make_server(lambda body: chat(f"answer {len(body['messages'])}"))
    answers = answer(tmp_path, server)
    assert answers["a"] == {1: ("answer 1", "answer 3"), 2: ("answer 1", "answer 3")}
    later = [b for b in server.bodies if len(b["messages"]) == 3]
    second = next(b for b in later if b["messages"][0]["content"] == "1+1?")
    assert [m["role"] for m in second["messages"]] == ["user", "assistant", "user"]
    assert second["messages"][1]["content"] == "answer 1"
    by_arm = {
        (b["messages"][0]["content"], b["temperature"]): b["seed"]
        for b in server.bodies
        if len(b["messages"]) == 1
    }
    assert set(by_arm) == {("Write.", 0.7), ("Write.", 0.2), ("1+1?", 0.0), ("1+1?", 0.2)}
    assert by_arm["Write.", 0.7] == by_arm["Write.", 0.2]
    line = lines(tmp_path / "model_answer" / "b.jsonl")[0]
    assert line["model_id"] == "b"
    assert line["choices"] == [{"index": 0, "turns": ["answer 1", "answer 3"]}]


def test_answered_questions_are_not_asked_again(tmp_path: Path, make_server: Make) -> None:
    first = answer(tmp_path, make_server(lambda _: chat("x")))
    path = tmp_path / "model_answer" / "a.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0] + '{"quest')
    server = make_server(lambda _: chat("x"))
    assert answer(tmp_path, server) == first
    assert len(server.bodies) == 2  # the turns of the one that was lost


def judge(
    folder: Path, server: FakeServer, kind: str = "single", prompts: Any = None
) -> list[dict[str, Any]]:
    return asyncio.run(
        judge_answers(
            QUESTIONS, ANSWERS, JUDGE, prompts or read_judge_prompts(JUDGE_PROMPTS), folder,
            server.servers(patience_s=0.02), kind=kind, concurrency=3, progress=nothing,
        )
    )  # fmt: skip


def test_each_turn_of_each_model_gets_a_grade(tmp_path: Path, make_server: Make) -> None:
    server = make_server(lambda _: chat("Good [1]. Rating: [[7.5]]"))
    found = judge(tmp_path, server)
    assert {(line["question_id"], line["model"], line["turn"]) for line in found} == {
        (question, model, turn) for question in (1, 2) for model in "ab" for turn in (1, 2)
    }
    assert {line["score"] for line in found} == {7.5}
    names = {(line["question_id"], line["turn"]): line["judge"][1] for line in found}
    assert names == {
        (1, 1): "single-v1", (1, 2): "single-v1-multi-turn",
        (2, 1): "single-math-v1", (2, 2): "single-math-v1-multi-turn",
    }  # fmt: skip
    last = next(f for f in found if (f["question_id"], f["model"], f["turn"]) == (2, "a", 2))
    for text in ("1+1?", "And {answer}?", "A21", "A22", "First question: 2"):
        assert text in last["user_prompt"]
    first = next(f for f in found if (f["question_id"], f["model"], f["turn"]) == (1, "a", 1))
    assert "A12" not in first["user_prompt"]
    assert lines(tmp_path / "model_judgment" / "single.jsonl") == found


def test_judged_answers_are_not_judged_again(tmp_path: Path, make_server: Make) -> None:
    first = judge(tmp_path, make_server(lambda _: chat("[[5]]")))
    path = tmp_path / "model_judgment" / "single.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]) + '{"quest')
    server = make_server(lambda _: chat("[[5]]"))
    again = judge(tmp_path, server)
    assert len(server.bodies) == 2
    assert len(again) == len(first) == 8


@pytest.mark.parametrize(
    ("said", "score"),
    [("[[10]]", 10), ("Rating: [3]", 3), ("[[ 4 ]] then [[9]]", 4), ("[2] but [[8]]", 8)],
)
def test_grade_is_read(tmp_path: Path, make_server: Make, said: str, score: float) -> None:
    assert judge(tmp_path, make_server(lambda _: chat(said)))[0]["score"] == score


@pytest.mark.parametrize("said", ["", "I would say seven.", "[[0]]", "[[11]]", "[[-3]]", "[[A]]"])
def test_nonsense_is_asked_again_twice_and_then_no_grade(
    tmp_path: Path, make_server: Make, said: str
) -> None:
    server = make_server(lambda _: chat(said))
    found = judge(tmp_path, server)
    assert {line["score"] for line in found} == {-1}
    assert len(server.bodies) == 3 * 8
    assert sorted({body["temperature"] for body in server.bodies}) == [0.0, 0.7]
    # Recorded as it was said, and not judged anew in the next run.
    assert found[0]["judgment"] == said
    assert judge(tmp_path, make_server(lambda _: chat("[[5]]"))) == found


@pytest.mark.parametrize(
    ("likes", "winners"),
    [
        ("A12", ("model_1", "model_1")),
        ("B12", ("model_2", "model_2")),
        ("first", ("model_1", "model_2")),
        ("both", ("tie", "tie")),
        ("many", ("error", "error")),
    ],
)
def test_pairs_are_compared_in_both_orders(
    tmp_path: Path, make_server: Make, likes: str, winners: tuple[str, str]
) -> None:
    def compare(body: Body) -> Body:
        text = body["messages"][1]["content"]
        if likes in ("A12", "B12"):
            other = "B12" if likes == "A12" else "A12"
            return chat(f"[[{'A' if text.find(likes) < text.find(other) else 'B'}]]")
        return chat({"first": "[[A]]", "both": "[[C]]", "many": "[[A]] or [[B]]"}[likes])

    found = judge(tmp_path, make_server(compare), kind="pairwise")
    assert len(found) == 4
    line = next(f for f in found if (f["question_id"], f["turn"]) == (1, 2))
    assert (line["model_1"], line["model_2"]) == ("a", "b")
    assert (line["g1_winner"], line["g2_winner"]) == winners
    assert line["judge"] == ["base", "pair-v2-multi-turn"]
    first, second = line["g1_user_prompt"], line["g2_user_prompt"]
    assert first.find("A12") < first.find("B12")
    assert second.find("B12") < second.find("A12")
    assert (tmp_path / "model_judgment" / "pair.jsonl").exists()


def test_judge_that_is_gone_stops_the_run_and_loses_nothing(
    tmp_path: Path, make_server: Make
) -> None:
    count = 0

    def grade(body: Body) -> Body:
        nonlocal count
        count += 1
        if count == 3:
            server.failures = [(0, "")] * 10_000
        return chat("[[5]]")

    server = make_server(grade)
    with pytest.raises(RunError, match="the judge, question .: .*gave up"):
        judge(tmp_path, server)
    server = make_server(lambda _: chat("[[5]]"))
    kept = len(lines(tmp_path / "model_judgment" / "single.jsonl"))
    assert kept >= 1
    assert len(judge(tmp_path, server)) == 8
    assert len(server.bodies) == 8 - kept


def test_judge_that_times_out_is_given_up_after_some_tries(
    tmp_path: Path, make_server: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluation.server._LONGEST_PAUSE_S", 0.0)
    server = make_server(lambda _: chat("[[5]]"))
    server.failures = [(504, "timed out")] * 10_000
    with pytest.raises(RunError, match="timed out; gave up"):
        judge(tmp_path, server)
    assert len(server.bodies) <= 3 * 4


@pytest.mark.parametrize("content", [{}, {"choices": []}, {"choices": [{"message": 3}]}])
def test_answer_without_choices_is_an_error(
    tmp_path: Path, make_server: Make, content: Body
) -> None:
    with pytest.raises(RunError, match="gives no choices"):
        judge(tmp_path, make_server(lambda _: content))
    with pytest.raises(RunError, match="arm 'a': the server at .* gives no choices"):
        answer(tmp_path, make_server(lambda _: content))


def test_missing_prompt_and_unknown_field_are_named(tmp_path: Path, make_server: Make) -> None:
    server = make_server(lambda _: chat("[[5]]"))
    prompts = dict(read_judge_prompts(JUDGE_PROMPTS))
    prompts["single-v1"] = JudgePrompt(name="single-v1", system="", template="{question} {rubric}")
    with pytest.raises(DataFileError, match="'single-v1' has no field 'rubric'"):
        judge(tmp_path, server, prompts=prompts)
    with pytest.raises(DataFileError, match="the judge prompts lack 'single-"):
        judge(tmp_path, server, prompts={"x": prompts["single-v1"]})
