"""`proa eval`, `compare`, `analyse` and `experiments` against a server on a socket."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from evaluation.code.sandbox import Limits, Sandbox, SandboxError, Task, Verdict

RunProa = Callable[..., Any]


class Server(ThreadingHTTPServer):
    """Solves task 0 and not task 1, judges, and scores tokens by their length.

    Attributes:
        bodies: requests received, with their path.
        dies_after: answers so many requests and then closes every connection; None: never.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[dict[str, Any]] = []
        self.dies_after: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def answer(self, content: Any, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.answer({"data": [{"id": "tiny"}, {"id": "tiny@adapt"}]})
        elif self.path == "/v1/experiments":
            arms = [{"label": "a", "weight": 1.0}, {"label": "b\x1b", "weight": 3.0}]
            self.answer({"data": [{"id": "trial", "unit": "user", "arms": arms}]})
        elif self.path == "/v1/experiments/trial":
            self.answer(REPORT)
        else:
            self.answer({"error": {"message": "no such thing"}}, 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append({"path": self.path, **body})
        if self.server.dies_after is not None and len(self.server.bodies) > self.server.dies_after:
            self.close_connection = True
            return
        if self.path == "/tokenize":
            self.answer({"tokens": [len(word) for word in body["prompt"].split(" ")]})
        elif body.get("echo"):
            prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
            prompts = [prompts] if isinstance(prompts[0], int) else prompts
            self.answer({"choices": [score(n, prompt) for n, prompt in enumerate(prompts)]})
        elif self.path == "/v1/classify":
            data = [
                {"index": n, "label": str(int("good" in text)), "probs": [0.25, 0.75]}
                for n, text in enumerate(body["input"])
            ]
            self.answer({"labels": ["0", "1"], "data": data[::-1]})
        elif self.path == "/v1/completions":
            text = "    return x + 1\n" if "def add" in body["prompt"] else "    return y\n"
            self.answer({"choices": [{"text": text, "finish_reason": "stop"}], "usage": {}})
        else:
            said = body["messages"][-1]["content"]
            found = re.findall(r"<answer:(x+)>", said)
            if len(found) > 1:
                # The longer answer is the better one, wherever it stands.
                gap = len(found[0]) - len(found[-1])
                said = "[[A]]" if gap > 0 else "[[B]]" if gap < 0 else "[[C]]"
                choice = {"message": {"content": said}, "finish_reason": "stop"}
                self.answer({"choices": [choice], "usage": {}})
                return
            if said.startswith("Chat"):
                length = 3 if body["model"] == "tiny@adapt" else 2
                choice = {"message": {"content": f"<answer:{'x' * length}>"}}
                self.answer({"choices": [choice], "usage": {}})
                return
            content = "The answer is 4." if "2 + 2" in said else "Rating: [[7]]"
            choice = {"message": {"content": content}, "finish_reason": "stop"}
            self.answer({"choices": [choice], "usage": {}})


def score(index: int, prompt: Any) -> dict[str, Any]:
    tokens = ["x" * n for n in prompt] if isinstance(prompt, list) else prompt.split(" ")
    tokens = tokens[:1] + [" " + token for token in tokens[1:]]
    offsets = [sum(map(len, tokens[:n])) for n in range(len(tokens))]
    values = [None, *(-float(len(token)) for token in tokens[1:])]
    tops = [None, *({"x": -0.5} for _ in tokens[1:])]
    return {"index": index, "logprobs": {
        "token_logprobs": values, "text_offset": offsets, "top_logprobs": tops}}  # fmt: skip


REPORT = {
    "name": "trial", "unit": "user", "confidence": 0.95,
    "arms": [{"label": "a", "exposures": 10, "units": 5, "first_token_s": 0.25, "seconds": 2.0,
              "completion_tokens": 30.0, "failures": 0},
             {"label": "b", "exposures": 0, "units": 0, "first_token_s": None, "seconds": None,
              "completion_tokens": None, "failures": 0}],
    "outcomes": {"rating": {
        "arms": {"a": {"count": 9, "units": 5, "mean": 0.5},
                 "b": {"count": 0, "units": 0, "mean": None}},
        "differences": {"b": None}, "series": {"b": []}}},
}  # fmt: skip


@pytest.fixture
def server() -> Iterator[Server]:
    served = Server()
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield served
    served.shutdown()
    served.server_close()
    thread.join()


class FakeSandbox(Sandbox):
    """Passes programs that add one."""

    def __init__(self) -> None:
        self.tool = "fake"

    def run(self, task: Task, limits: Limits) -> Verdict:
        if "x + 1" in task.program:
            return Verdict(kind="passed")
        return Verdict(kind="NameError", stage="test")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluation.server._FIRST_PAUSE_S", 0.01)
    for command in ("eval_code", "compare"):
        monkeypatch.setattr(f"serve.cli.{command}.Sandbox", FakeSandbox)


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl"
    lines = [
        {"task_id": f"HumanEval/{n}", "prompt": f"def {name}(x):\n", "entry_point": name,
         "canonical_solution": "    return x + 1\n",
         "test": f"def check(candidate):\n    assert candidate(1) == 2  # {n}\n"}
        for n, name in enumerate(("add", "other"))
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_programs_are_sampled_judged_and_reported(
    call_proa: RunProa, server: Server, problems: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = [
        "eval", "humaneval", "--data", str(problems), "--url", server.url, "--samples", "2",
        "--model", "tiny,tiny@adapt", "--temperature", "0.5", "--decoding", "edt",
        "--allow-code-execution", "--output", str(out),
    ]  # fmt: skip
    done = call_proa(*words)
    assert done.returncode == 0, done.stderr
    assert "| `tiny` | 2 | 2 | 50.00 [" in done.stdout
    assert "| `tiny@adapt` | +0.00 [" in done.stdout
    assert {b["model"] for b in server.bodies} == {"tiny", "tiny@adapt"}
    assert all(b["temperature"] == 0.5 and b["decoding"] == {"strategy": "edt"}
               for b in server.bodies)  # fmt: skip
    files = {path.name for path in out.iterdir()}
    assert {"run.json", "report.md", "report.json", "pass_at_k.png", "tiny_samples.jsonl"} <= files
    count = len(server.bodies)
    again = call_proa(*words)
    assert again.stdout == done.stdout
    assert len(server.bodies) == count


def test_killed_server_stops_the_run_and_the_same_command_goes_on(
    call_proa: RunProa, server: Server, problems: Path, tmp_path: Path
) -> None:
    server.dies_after = 3
    words = [
        "eval", "humaneval", "--data", str(problems), "--url", server.url, "--samples", "4",
        "--concurrency", "1", "--patience", "0.1", "--allow-code-execution",
        "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    done = call_proa(*words)
    assert done.returncode == 1
    assert "the same command goes on there" in done.stderr
    server.dies_after = None
    asked = len(server.bodies)
    assert call_proa(*words).returncode == 0
    assert len(server.bodies) - asked == 8 - 3


def test_programs_are_kept_and_not_run_unless_it_is_allowed(
    call_proa: RunProa, server: Server, problems: Path, tmp_path: Path
) -> None:
    words = ["eval", "humaneval", "--data", str(problems), "--url", server.url, "--output",
             str(tmp_path / "out")]  # fmt: skip
    done = call_proa(*words)
    assert done.returncode == 0
    assert "--allow-code-execution" in done.stderr
    assert done.stdout == ""
    assert len((tmp_path / "out" / "tiny_samples.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "out" / "tiny_results.jsonl").read_text() == ""


def test_samples_are_scored_without_a_server(
    call_proa: RunProa, problems: Path, tmp_path: Path
) -> None:
    samples = tmp_path / "samples.jsonl"
    samples.write_text(
        '{"task_id": "HumanEval/0", "completion": "    return x + 1"}\n'
        '{"task_id": "HumanEval/1", "completion": "    return x"}\n'
    )
    done = call_proa(
        "eval", "humaneval", "--data", str(problems), "--score", str(samples), "--output",
        str(tmp_path / "out"), "--allow-code-execution",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "| `scored` | 2 | 1 | 50.00 [" in done.stdout


def test_halves_of_the_tasks_are_different_ones(
    call_proa: RunProa, server: Server, problems: Path, tmp_path: Path
) -> None:
    for part, name in (("1/2", "HumanEval/0"), ("2/2", "HumanEval/1")):
        out = tmp_path / part.replace("/", "-")
        words = ["--data", str(problems), "--part", part, "--url", server.url, "--output", str(out)]
        assert call_proa("eval", "humaneval", *words).returncode == 0
        (line,) = (out / "tiny_samples.jsonl").read_text().splitlines()
        assert json.loads(line)["task_id"] == name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samples", "0"], "--samples must be at least 1, got 0"),
        (["--patience", "nan"], "--patience must be at least 0, got nan"),
        (["--tasks", "x"], "--tasks must be FIRST-LAST such as 11-510, got 'x'"),
        (["--tasks", "7-9"], "has no task of 7-9"),
        (["--part", "3/2"], "--part must be K/N with K from 1 to N, got '3/2'"),
        (["--k", "1,x"], "--k must be whole numbers of at least 1, got '1,x'"),
        (["--score", "x.jsonl"], "--score: runs programs; give --allow-code-execution too"),
        (["--model", "tiny,tiny"], "--model: 'tiny,tiny' is no list of different model ids"),
        (["--url", "ftp://x"], "--url: 'ftp://x' is not an address"),
        (["--data", "missing.jsonl"], "missing.jsonl cannot be read: No such file"),
    ],
)
def test_wrong_options_are_named(
    call_proa: RunProa, server: Server, problems: Path, tmp_path: Path, words: list[str],
    message: str,
) -> None:  # fmt: skip
    base = ["--data", str(problems), "--url", server.url, "--output", str(tmp_path / "out")]
    done = call_proa("eval", "humaneval", *base, *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_unknown_model_is_named_with_those_that_are_served(
    call_proa: RunProa, server: Server, problems: Path, tmp_path: Path
) -> None:
    done = call_proa(
        "eval", "humaneval", "--data", str(problems), "--url", server.url, "--model", "huge",
        "--output", str(tmp_path / "out"),
    )  # fmt: skip
    assert done.returncode == 1
    assert "has no model 'huge'; it has tiny, tiny@adapt" in done.stderr


def test_no_sandbox_is_said_in_one_line(
    call_proa: RunProa, server: Server, problems: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fail() -> None:
        raise SandboxError("no sandbox for generated code works here; install bubblewrap")

    monkeypatch.setattr("serve.cli.eval_code.Sandbox", fail)
    done = call_proa(
        "eval", "humaneval", "--data", str(problems), "--url", server.url,
        "--allow-code-execution", "--output", str(tmp_path / "out"),
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == (
        "proa: error: no sandbox for generated code works here; install bubblewrap\n"
    )


def test_chat_is_judged_and_reported(call_proa: RunProa, server: Server, tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text(
        "".join(
            json.dumps({"question_id": n, "category": kind, "turns": ["Write.", "Again."]}) + "\n"
            for n, kind in enumerate(("writing", "writing", "math", "stem"))
        )
    )
    words = [
        "eval", "mt-bench", "--questions", str(questions), "--url", server.url, "--model",
        "tiny,tiny@adapt", "--judge", "tiny", "--judging", "both", "--limit", "1", "--output",
        str(tmp_path / "out"),
    ]  # fmt: skip
    done = call_proa(*words)
    assert done.returncode == 0, done.stderr
    assert "Judged by `tiny`." in done.stdout
    assert "| `tiny` | 7.00 [7.00, 7.00] |" in done.stdout
    # "[[7]]" is no verdict on a pair.
    assert "| `tiny` | `tiny@adapt` | 0 | 0 | 0 | 0 | 6 |" in done.stdout
    assert (tmp_path / "out" / "categories.png").exists()
    count = len(server.bodies)
    assert call_proa(*words).stdout == done.stdout
    assert len(server.bodies) == count
    other = call_proa(*words[:-4], "--limit", "2", "--output", str(tmp_path / "out"))
    assert other.returncode == 2
    assert "holds a run with another ids" in other.stderr


def test_pairs_need_two_models(call_proa: RunProa, server: Server, tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question_id": 1, "turns": ["Write."]}\n')
    words = ["eval", "mt-bench", "--questions", str(questions), "--url", server.url]
    done = call_proa(*words, "--judge", "tiny", "--judging", "pairwise", "--output",
                     str(tmp_path / "a"))  # fmt: skip
    assert done.returncode == 2
    assert "pairs need two models" in done.stderr
    done = call_proa(*words, "--judge-url", "http://x", "--output", str(tmp_path / "b"))
    assert done.returncode == 2
    assert "--judge-url: give --judge too" in done.stderr


def test_perplexity_and_choices_are_reported(
    call_proa: RunProa, server: Server, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten")
    done = call_proa(
        "eval", "perplexity", "--text", str(text), "--length", "5", "--url", server.url,
        "--output", str(tmp_path / "ppl"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "| `tiny` | 2 | 8 |" in done.stdout
    data = tmp_path / "piqa.jsonl"
    data.write_text('{"goal": "Go.", "sol1": "by bicycle", "sol2": "on foot", "label": 1}\n' * 3)
    done = call_proa(
        "eval", "choices", "--task", "piqa", "--data", str(data), "--url", server.url,
        "--output", str(tmp_path / "piqa"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "| `tiny` | 3 | 100.00 [" in done.stdout


def write_arms(folder: Path) -> Path:
    path = folder / "arms.yaml"
    path.write_text(
        "arms:\n  - {label: plain, model: tiny}\n"
        "  - {label: hot, model: tiny@adapt, temperature: 1.5}\n"
    )
    return path


def test_arms_are_compared_on_answers(call_proa: RunProa, server: Server, tmp_path: Path) -> None:
    data = tmp_path / "sums.jsonl"
    lines = [{"question": f"What is {n} + 2?", "answer": f"Count. #### {n + 2}"} for n in range(4)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    done = call_proa(
        "compare", "--arms", str(write_arms(tmp_path)), "--task", "answers", "--data", str(data),
        "--samples", "2", "--calibrate", "--url", server.url, "--output", str(out),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "| `plain` | 25.00 [" in done.stdout
    assert "## Calibration" in done.stdout
    assert "| `hot` | +0.00 [+0.00, +0.00] |" in done.stdout
    assert {path.name for path in out.iterdir()} >= {
        "report.html", "report.md", "outcomes.csv", "effects.png",
    }  # fmt: skip
    # The arms share their seeds, the calibration has others.
    seeds = {b["seed"] for b in server.bodies if "temperature" in b}
    plain = {b["seed"] for b in server.bodies if b["model"] == "tiny"}
    assert len(seeds) == 8
    assert len(plain) == 16
    assert seeds < plain


def test_arms_are_compared_on_programs(
    call_proa: RunProa, server: Server, problems: Path, tmp_path: Path
) -> None:
    words = [
        "compare", "--arms", str(write_arms(tmp_path)), "--task", "humaneval", "--data",
        str(problems), "--prompt", "completion", "--url", server.url, "--output",
        str(tmp_path / "out"),
    ]  # fmt: skip
    done = call_proa(*words)
    assert done.returncode == 2
    assert "give --allow-code-execution too" in done.stderr
    done = call_proa(*words, "--allow-code-execution")
    assert done.returncode == 0, done.stderr
    assert "McNemar" in done.stdout
    assert "| `plain` | 50.00 [" in done.stdout


def test_arms_are_compared_on_chats_by_a_judge(
    call_proa: RunProa, server: Server, tmp_path: Path
) -> None:
    data = tmp_path / "questions.jsonl"
    lines = [{"question_id": n, "turns": [f"Chat {n}", "Chat on"]} for n in range(6)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    words = [
        "compare", "--arms", str(write_arms(tmp_path)), "--task", "chats", "--data", str(data),
        "--url", server.url, "--output", str(out),
    ]  # fmt: skip
    done = call_proa(*words)
    assert done.returncode == 2
    assert "--judge: is for chats, which need one" in done.stderr
    done = call_proa(*words, "--judge", "tiny", "--samples", "2")
    assert done.returncode == 2
    assert "each chat is held once" in done.stderr
    done = call_proa(*words, "--judge", "tiny")
    assert done.returncode == 0, done.stderr
    # Two turns of six questions; the longer answers win in both orders.
    assert "12 tasks, 1 samples" in done.stdout
    assert "| `hot` | 100.00 [" in done.stdout
    assert "| `hot` | +100.00 [" in done.stdout
    assert "## Pairs, judged by `tiny` in both orders" in done.stdout
    asked = len(server.bodies)
    assert call_proa(*words, "--judge", "tiny").returncode == 0
    assert len(server.bodies) == asked
    done = call_proa(*words, "--judge", "tiny@adapt")
    assert done.returncode == 2
    assert "another judge" in done.stderr


def test_classes_are_measured(call_proa: RunProa, server: Server, tmp_path: Path) -> None:
    data = tmp_path / "dev.tsv"
    rows = [("good", 1), ("so good", 1), ("bad", 0), ("not good", 0), ("fine", 1)] * 5
    data.write_text("sentence\tlabel\n" + "".join(f"{a}\t{b}\n" for a, b in rows))
    words = [
        "eval", "glue", "--data", str(data), "--url", server.url, "--output", str(tmp_path / "out")
    ]  # fmt: skip
    assert "--model: name an adapter that classifies" in call_proa(*words).stderr
    done = call_proa(*words, "--model", "tiny")
    assert done.returncode == 0, done.stderr
    # Of each five: two right as 1, one right as 0, one wrong either way.
    assert re.search(r"\| `tiny` \| 25 \| 60.00 \[[^]]*\] \| 66.67 \| 16.67 \|", done.stdout)
    asked = [body for body in server.bodies if body["path"] == "/v1/classify"]
    assert sorted(len(body["input"]) for body in asked) == [9, 16]
    assert call_proa(*words, "--model", "tiny").stdout == done.stdout
    assert len([b for b in server.bodies if b["path"] == "/v1/classify"]) == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("sentence\tlabel\n", "no examples"),
        ("sentence\tlabel\nx\n", "line 2: 1 columns, the header has 2"),
        ("a\tb\nx\ty\n", "line 1: the header must name a label"),
        ("sentence\tlabel\n \t1\n", 'line 2: "text" must be text'),
    ],
)
def test_bad_table_of_classes_is_named(
    call_proa: RunProa, server: Server, tmp_path: Path, content: str, words: str
) -> None:
    data = tmp_path / "dev.tsv"
    data.write_text(content)
    done = call_proa(
        "eval", "glue", "--data", str(data), "--model", "tiny", "--url", server.url, "--output",
        str(tmp_path / "out"),
    )  # fmt: skip
    assert done.returncode == 2
    assert words in done.stderr


def test_server_that_does_not_classify_is_named(
    call_proa: RunProa, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "dev.tsv"
    data.write_text("sentence\tlabel\ngood\t1\n")
    monkeypatch.setattr(Handler, "do_POST", lambda self: self.answer({"data": [{"index": 0}]}))
    done = call_proa(
        "eval", "glue", "--data", str(data), "--model", "tiny", "--url", server.url, "--output",
        str(tmp_path / "out"),
    )  # fmt: skip
    assert done.returncode == 1
    assert "gives no classes" in done.stderr


def test_bad_file_of_arms_is_named(call_proa: RunProa, server: Server, tmp_path: Path) -> None:
    arms = tmp_path / "arms.yaml"
    arms.write_text("arms: [{model: tiny}]")
    done = call_proa(
        "compare", "--arms", str(arms), "--task", "answers", "--data", "x", "--url", server.url,
        "--output", str(tmp_path / "out"),
    )  # fmt: skip
    assert done.returncode == 2
    assert "--arms: " in done.stderr
    assert "arms must be a list of at least two" in done.stderr


def test_difficulty_is_reported(
    call_proa: RunProa, server: Server, problems: Path, tmp_path: Path
) -> None:
    prose = tmp_path / "prose.txt"
    prose.write_text("\n".join("some words " * 20 for _ in range(3)))
    done = call_proa(
        "analyse", "difficulty", "--code", str(problems), "--prose", str(prose), "--url",
        server.url, "--output", str(tmp_path / "out"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "# Prediction difficulty, tiny" in done.stdout
    assert "| prose | 117 |" in done.stdout
    assert (tmp_path / "out" / "difficulty.png").exists()


def test_experiments_are_listed_and_reported(call_proa: RunProa, server: Server) -> None:
    done = call_proa("experiments", "list", "--url", server.url)
    assert done.stdout == "trial  by user: a (1), b? (3)\n"
    done = call_proa("experiments", "report", "trial", "--url", server.url)
    assert "a                              10       5       0.25 s   2.00 s      30" in done.stdout
    assert "b against the first arm: too little feedback" in done.stdout
    done = call_proa("experiments", "report", "trial", "--json", "--url", server.url)
    assert json.loads(done.stdout) == REPORT
    done = call_proa("experiments", "report", "no", "--url", server.url)
    assert done.returncode == 1
    assert "no such thing [status 404]" in done.stderr
