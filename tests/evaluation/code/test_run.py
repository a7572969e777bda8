"""Runs of code evaluations: what is kept, what is done again, what is never done twice."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evaluation.code.problems import Problem
from evaluation.code.run import CodeTest, Judge, read_samples, run_code_test, score_samples
from evaluation.code.sandbox import Limits, Sandbox, SandboxError, Task, Verdict
from evaluation.errors import DataFileError, RunError
from evaluation.folder import seed_of
from evaluation.server import Arm
from tests.evaluation.conftest import FakeServer

Make = Callable[..., FakeServer]


def problem(number: int) -> Problem:
    prompt = f"def f{number}(x):\n"
    return Problem(
        task_id=f"HumanEval/{number}", kind="humaneval", prompt=prompt, names=(f"f{number}",),
        setup=prompt, tests=("base",),
    )  # fmt: skip


PROBLEMS = [problem(0), problem(1)]
ARMS = [Arm(label="a", model="base"), Arm(label="b", model="base", fields={"temperature": 1})]


class FakeSandbox(Sandbox):
    """Passes programs with "pass" in them; `plus` tests want "plus" too."""

    def __init__(self) -> None:
        self.tool = "fake"
        self.ran: list[Task] = []
        self.fails = False

    def run(self, task: Task, limits: Limits) -> Verdict:
        if self.fails:
            raise SandboxError("cannot start")
        self.ran.append(task)
        good = "pass" in task.program and (task.tests != ("plus",) or "plus" in task.program)
        return Verdict(kind="passed") if good else Verdict(kind="NameError", stage="test")


def complete(body: dict[str, Any]) -> dict[str, Any]:
    text = "  pass\n\nclass X" if body["prompt"] == "def f0(x):\n" else "  return y\n"
    return {
        "choices": [{"text": text, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 3},
    }


def run(
    folder: Path, server: FakeServer, sandbox: FakeSandbox | None = None, **settings: Any
) -> dict[str, int]:
    """Run with all arms and return how much progress was told of each kind."""
    test = CodeTest(problems=PROBLEMS, **({"more_tests": {}, "num_samples": 2} | settings))
    judge = None if sandbox is None else Judge(sandbox, test, jobs=2)
    told = {"sample": 0, "result": 0}

    def progress(name: str, count: int) -> None:
        told[name] += count

    folder.mkdir(exist_ok=True)
    try:
        asyncio.run(
            run_code_test(
                test, ARMS, folder, server.servers(patience_s=0.02), judge=judge, concurrency=3,
                progress=progress,
            )
        )  # fmt: skip
    finally:
        if judge is not None:
            judge.close()
    return told


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_arm_answers_each_task_with_seeds_that_arms_share(
    tmp_path: Path, make_server: Make
) -> None:
    server, sandbox = make_server(complete), FakeSandbox()
    assert run(tmp_path, server, sandbox) == {"sample": 8, "result": 8}
    seeds = {(arm, b["prompt"], b["seed"]) for b in server.bodies for arm in [b.get("temperature")]}
    assert len(seeds) == 8
    assert {b["seed"] for b in server.bodies if "temperature" in b} == {
        seed_of(0, task, sample) for task in ("HumanEval/0", "HumanEval/1") for sample in (0, 1)
    }
    samples = lines(tmp_path / "a_samples.jsonl")
    assert {(s["task_id"], s["sample"]) for s in samples} == {
        (f"HumanEval/{task}", sample) for task in (0, 1) for sample in (0, 1)
    }
    first = next(s for s in samples if s["task_id"] == "HumanEval/0")
    assert first["completion"] == "  pass\n"
    assert first["solution"] == "def f0(x):\n  pass\n"
    assert first["completion_tokens"] == 3
    results = lines(tmp_path / "b_results.jsonl")
    assert {(r["task_id"], r["passed"], r["result"], r["stage"]) for r in results} == {
        ("HumanEval/0", True, "passed", None),
        ("HumanEval/1", False, "NameError", "test"),
    }
    # Equal programs of a task are run once.
    assert len(sandbox.ran) == 2


def test_finished_run_asks_and_runs_nothing_again(tmp_path: Path, make_server: Make) -> None:
    run(tmp_path, make_server(complete), FakeSandbox())
    server, sandbox = make_server(complete), FakeSandbox()
    assert run(tmp_path, server, sandbox) == {"sample": 8, "result": 8}
    assert server.bodies == []
    assert sandbox.ran == []


def test_killed_run_goes_on_where_it_was(tmp_path: Path, make_server: Make) -> None:
    run(tmp_path, make_server(complete), FakeSandbox())
    whole = lines(tmp_path / "a_samples.jsonl")
    (tmp_path / "a_samples.jsonl").write_text(
        "".join(json.dumps(s) + "\n" for s in whole[:2]) + '{"task_id": "Huma'
    )
    (tmp_path / "a_results.jsonl").write_text("")
    server, sandbox = make_server(complete), FakeSandbox()
    run(tmp_path, server, sandbox)
    assert len(server.bodies) == 2
    assert sorted(map(str, lines(tmp_path / "a_samples.jsonl"))) == sorted(map(str, whole))
    results = lines(tmp_path / "a_results.jsonl")
    assert len({(r["task_id"], r["sample"]) for r in results}) == len(results) == 4


def test_samples_are_kept_without_a_judge_and_judged_later(
    tmp_path: Path, make_server: Make
) -> None:
    assert run(tmp_path, make_server(complete)) == {"sample": 8, "result": 0}
    server = make_server(complete)
    assert run(tmp_path, server, FakeSandbox()) == {"sample": 8, "result": 8}
    assert server.bodies == []


def test_further_tests_run_on_what_passed(tmp_path: Path, make_server: Make) -> None:
    more = {p.task_id: Problem(**{n: getattr(p, n) for n in ("task_id", "kind", "prompt", "names",
            "setup")}, tests=("plus",)) for p in PROBLEMS}  # fmt: skip
    sandbox = FakeSandbox()
    run(tmp_path, make_server(complete), sandbox, more_tests=more)
    found = {
        r["task_id"]: (r["passed"], r["plus_passed"], r["plus_result"])
        for r in lines(tmp_path / "a_results.jsonl")
    }
    assert found == {
        "HumanEval/0": (True, False, "NameError"),
        "HumanEval/1": (False, False, "NameError"),
    }
    assert [task.tests for task in sandbox.ran].count(("plus",)) == 1


def test_chat_answers_are_kept_beside_their_code(tmp_path: Path, make_server: Make) -> None:
    def chat(body: dict[str, Any]) -> dict[str, Any]:
        content = "Here:\n```python\ndef f0(x): pass\n```"
        return {"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}

    run(tmp_path, make_server(chat), FakeSandbox(), form="chat", num_samples=1)
    sample = lines(tmp_path / "a_samples.jsonl")[0]
    assert sample["answer"].startswith("Here:")
    assert sample["solution"] == "def f0(x): pass\n"
    assert "completion" not in sample


def test_server_that_dies_leaves_what_was_done(tmp_path: Path, make_server: Make) -> None:
    count = 0

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        nonlocal count
        count += 1
        if count == 4:
            server.failures = [(0, "")] * 10_000
        return complete(body)

    server = make_server(answer)
    with pytest.raises(RunError, match="gave up after .* the same command goes on there"):
        run(tmp_path, server, FakeSandbox())
    done = len(lines(tmp_path / "a_samples.jsonl")) + len(lines(tmp_path / "b_samples.jsonl"))
    assert 1 <= done <= 4
    server = make_server(complete)
    run(tmp_path, server, FakeSandbox())
    assert len(server.bodies) == 8 - done


@pytest.mark.parametrize(
    "answer", [{}, {"choices": []}, {"choices": [{"message": None}]}, {"choices": "x"}]
)
def test_answer_without_choices_is_an_error(
    tmp_path: Path, make_server: Make, answer: dict[str, Any]
) -> None:
    with pytest.raises(RunError, match="gives no choices"):
        run(tmp_path, make_server(lambda _: answer), FakeSandbox())


def test_refusal_names_arm_and_task(tmp_path: Path, make_server: Make) -> None:
    server = make_server(complete)
    server.failures = [(400, "prompt is too long")]
    with pytest.raises(RunError, match="arm 'a', 'b', task HumanEval/0: prompt is too"):
        run(tmp_path, server, FakeSandbox())


def test_sandbox_that_fails_ends_the_run(tmp_path: Path, make_server: Make) -> None:
    sandbox = FakeSandbox()
    sandbox.fails = True
    with pytest.raises(SandboxError, match="cannot start"):
        run(tmp_path, make_server(complete), sandbox)


def score(folder: Path, samples: list[dict[str, Any]]) -> FakeSandbox:
    sandbox = FakeSandbox()
    test = CodeTest(problems=PROBLEMS, more_tests={})
    judge = Judge(sandbox, test, jobs=1)
    asyncio.run(score_samples(test, samples, folder, judge, lambda *_: None))
    judge.close()
    return sandbox


def test_samples_from_elsewhere_are_scored_once(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(
        '{"task_id": "HumanEval/0", "completion": "  pass"}\n'
        '  {"task_id": "HumanEval/0", "completion": "  return"}\n'
        '{"task_id": "HumanEval/1", "solution": "pass"}\n'
    )
    samples = read_samples(path, PROBLEMS)
    assert [(s["task_id"], s["sample"], s["solution"]) for s in samples] == [
        ("HumanEval/0", 0, "def f0(x):\n  pass"),
        ("HumanEval/0", 1, "def f0(x):\n  return"),
        ("HumanEval/1", 0, "pass"),
    ]
    score(tmp_path, samples)
    passed = [r["passed"] for r in lines(tmp_path / "scored_results.jsonl")]
    assert sorted(passed) == [False, True, True]
    assert score(tmp_path, samples).ran == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"task_id": "HumanEval/9", "completion": ""}', 'line 1: the data has no task "Human'),
        ('{"completion": ""}', "line 1: the data has no task null"),
        ('{"task_id": "HumanEval/0"}', "line 1: completion must be a text, got null"),
        ('{"task_id": "HumanEval/0", "solution": 1}', "line 1: solution must be a text, got 1"),
    ],
)
def test_sample_that_cannot_be_scored_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataFileError, match=message):
        read_samples(path, PROBLEMS)
