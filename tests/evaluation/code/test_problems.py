"""HumanEval's and MBPP's layouts, and lines that are neither."""

import json
from pathlib import Path
from typing import Any

import pytest

from evaluation.code.problems import Problem, join_tests, normal_id, read_problems
from evaluation.errors import DataFileError

FUNCTION = {
    "task_id": "HumanEval/0",
    "prompt": "from typing import List\n\ndef add(x: int) -> int:\n    '''Add one.'''\n",
    "entry_point": "add",
    "canonical_solution": "    return x + 1\n",
    "test": "def check(candidate):\n    assert candidate(1) == 2\n",
}
WORDS = {
    "task_id": 2,
    "text": "Write a function to add one.",
    "code": "import math\ndef helper(x): return x\ndef sum(x): return helper(x) + 1",
    "test_setup_code": "",
    "test_list": ["assert sum(1) == 2", "assert sum(2) == 3"],
    "challenge_test_list": [],
}


def write(folder: Path, *records: Any, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_function_is_read(tmp_path: Path) -> None:
    (problem,) = read_problems(write(tmp_path, FUNCTION), "humaneval")
    assert problem == Problem(
        task_id="HumanEval/0",
        kind="humaneval",
        prompt=FUNCTION["prompt"],
        names=("add",),
        setup=FUNCTION["prompt"],
        tests=(FUNCTION["test"] + "\ncheck(add)\n",),
        reference=FUNCTION["prompt"] + FUNCTION["canonical_solution"],
    )


def test_task_in_words_is_read_with_the_function_that_its_examples_call(tmp_path: Path) -> None:
    (problem,) = read_problems(write(tmp_path, WORDS), "mbpp")
    assert problem.task_id == "2"
    assert problem.prompt == "Write a function to add one."
    assert problem.names == ("sum",)  # though there is a built-in function of that name
    assert problem.tests == problem.examples == tuple(WORDS["test_list"])
    assert problem.reference == WORDS["code"]


def test_names_without_a_reference_are_those_that_nothing_else_gives(tmp_path: Path) -> None:
    record = {k: v for k, v in WORDS.items() if k != "code"} | {
        "test_list": ["assert math.isclose(add(helper(1)), len([1]))"],
        "test_imports": ["import math"],
    }
    (problem,) = read_problems(write(tmp_path, record), "mbpp")
    assert problem.names == ("add", "helper")
    assert problem.setup == "import math\n"


def test_function_of_the_program_that_the_tests_hold_a_copy_of(tmp_path: Path) -> None:
    test = "def ref(x):\n    sum = x + 1\n    return sum\nassert sum(1) == ref(1)"
    (problem,) = read_problems(write(tmp_path, {**WORDS, "test": test}), "mbpp")
    assert problem.names == ("sum",)
    assert problem.tests == (test,)
    assert problem.examples == tuple(WORDS["test_list"])


def test_broken_test_of_the_released_file_is_mended(tmp_path: Path) -> None:
    test = "def check(candidate):\n    assert _poly(*candidate(*inp), inp) <= 0.0001\n"
    (problem,) = read_problems(write(tmp_path, {**FUNCTION, "test": test}), "humaneval")
    assert "assert abs(_poly(*inp, candidate(*inp))) <= 0.0001" in problem.tests[0]


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("humaneval", {"task_id": None}, "task_id must be a text or a number, got null"),
        ("humaneval", {"task_id": True}, "task_id must be a text or a number, got true"),
        ("humaneval", {"prompt": 1}, "prompt must be a text, got 1"),
        ("humaneval", {"entry_point": "a b"}, 'entry_point must be a name, got "a b"'),
        ("humaneval", {"test": ["x"]}, "test must be a text"),
        ("humaneval", {"test": "pass"}, r"test must define check\(candidate\)"),
        ("mbpp", {"test_list": []}, r"test_list must be a list of texts, got \[\]"),
        ("mbpp", {"test_list": [1]}, r"test_list must be a list of texts, got \[1\]"),
        ("mbpp", {"text": None}, "text must be a text, got null"),
        ("mbpp", {"test_list": ["assert ("]}, "the tests or the code are no Python"),
        ("mbpp", {"code": "def ("}, "the tests or the code are no Python"),
        ("mbpp", {"test_list": ["assert 1"]}, "the tests call no function of the program"),
    ],
)
def test_line_that_is_no_problem_is_named(
    tmp_path: Path, kind: str, change: dict[str, Any], message: str
) -> None:
    record = FUNCTION if kind == "humaneval" else WORDS
    path = write(tmp_path, {**record, "task_id": "first"}, {**record, **change})
    with pytest.raises(DataFileError, match=f"line 2: {message}"):
        read_problems(path, kind)


def test_task_that_stands_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match=r'line 2: task_id "2" stands in line 1'):
        read_problems(write(tmp_path, WORDS, WORDS), "mbpp")


def test_more_tests_are_found_by_the_number_of_the_task(tmp_path: Path) -> None:
    problems = read_problems(write(tmp_path, WORDS, {**WORDS, "task_id": 3}), "mbpp")
    more = write(tmp_path, {**WORDS, "task_id": "Mbpp/3", "test_list": ["assert sum(9) == 10"]},
                 name="plus.jsonl")  # fmt: skip
    found = join_tests(problems, more, "mbpp")
    assert list(found) == ["3"]
    assert found["3"].tests == ("assert sum(9) == 10",)


def test_more_tests_for_other_tasks_are_refused(tmp_path: Path) -> None:
    problems = read_problems(write(tmp_path, WORDS), "mbpp")
    more = write(tmp_path, {**WORDS, "task_id": 7}, name="plus.jsonl")
    with pytest.raises(DataFileError, match="has tests for none of the problems"):
        join_tests(problems, more, "mbpp")


@pytest.mark.parametrize(
    ("task_id", "expected"), [("HumanEval/12", "12"), ("Mbpp/2", "2"), ("2", "2"), ("ab", "ab")]
)
def test_normal_id(task_id: str, expected: str) -> None:
    assert normal_id(task_id) == expected
