"""What is asked, and what program an answer makes."""

import pytest

from evaluation.code.problems import Problem
from evaluation.code.prompts import build_program, build_request, extract_code, truncate

FUNCTION = Problem(
    task_id="HumanEval/0",
    kind="humaneval",
    prompt="from typing import List\n\ndef helper(x):\n    return x\n\n"
    "def add(x):\n    '''Add.'''\n",
    names=("add",),
    setup="",
    tests=(),
)
WORDS = Problem(
    task_id="2",
    kind="mbpp",
    prompt="Write a function.",
    names=("add",),
    setup="",
    tests=(),
    examples=("assert add(1) == 2", "assert add(2) == 3"),
)


def test_completion_is_asked_for_with_at_most_four_stop_strings() -> None:
    path, body = build_request(FUNCTION, "completion")
    assert path == "/v1/completions"
    assert body == {
        "prompt": FUNCTION.prompt,
        "stop": ["\nclass", "\ndef", "\n#", "\nprint"],
    }
    path, body = build_request(WORDS, "completion")
    assert body["prompt"] == '"""\nWrite a function.\nassert add(1) == 2\n"""\n'
    assert len(body["stop"]) == 4


def test_chat_shows_the_task_in_a_block_and_one_example() -> None:
    path, body = build_request(FUNCTION, "chat")
    assert path == "/v1/chat/completions"
    (message,) = body["messages"]
    assert message["role"] == "user"
    assert message["content"].endswith(f"```python\n{FUNCTION.prompt.strip()}\n```")
    (message,) = build_request(WORDS, "chat")[1]["messages"]
    assert "assert add(1) == 2" in message["content"]
    assert "assert add(2)" not in message["content"]


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        ("    return x + 1\n\ndef other():\n    pass\n", "    return x + 1\n"),
        ("    return x + 1\nprint(add(1))", "    return x + 1"),
        ("    return 1\n    # inside\n\n# outside\n", "    return 1\n    # inside\n"),
        ("    return 1\nif __name__ == '__main__':\n", "    return 1"),
        ("    return 1<|endoftext|>def", "    return 1"),
        ("    return 1\n```\nExplanation", "    return 1"),
        ("", ""),
    ],
)
def test_completion_is_cut_where_the_function_ends(answer: str, body: str) -> None:
    assert build_program(FUNCTION, answer, "completion") == FUNCTION.prompt + body


def test_completion_of_a_task_in_words_is_the_program() -> None:
    answer = "def add(x):\n    return x + 1\n\nassert add(1) == 2\n"
    assert build_program(WORDS, answer, "completion") == "def add(x):\n    return x + 1\n"


PREAMBLE = "from typing import List\n\ndef helper(x):\n    return x\n\n"


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("Sure:\n```python\ndef add(x):\n    return x\n```\nDone.", "def add(x):\n    return x\n"),
        ("```\npip install x\n```\n```py\ndef add(x): ...\n```", "def add(x): ...\n"),
        ("```python\ndef add(x):\n    return x", "def add(x):\n    return x"),
        ("```python\nx = 1\n```\n```python\ny = 2\n```", "x = 1\n"),
        ("def add(x): return x", "def add(x): return x"),
        ("  ```python\n  def add(x): ...\n  ```", "  def add(x): ...\n"),
        ("", ""),
    ],
)
def test_code_of_a_chat_answer_follows_what_the_task_gives(answer: str, code: str) -> None:
    assert build_program(FUNCTION, answer, "chat") == PREAMBLE + code
    assert extract_code(answer, "add") == code


def test_truncate_takes_the_first_stop() -> None:
    assert truncate("a\nb\nc", ["\nc", "\nb"]) == "a"
