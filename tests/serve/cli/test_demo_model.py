"""The demo model behind the real command, with the README's own examples."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.model


@pytest.fixture
def url(start_server) -> Iterator[str]:
    server = start_server()
    yield server.url
    assert server.stop(signal.SIGTERM) == 0
    assert server.lines[-1] == "proa: stopped\n"


def example(language: str, first: str, url: str) -> str:
    """Return the README's code block that begins so, with the test server's address."""
    found = re.search(rf"^```{language}\n({first}.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert found is not None
    assert "http://127.0.0.1:8000" in found[1]
    return found[1].replace("http://127.0.0.1:8000", url)


def run(*words: str, stdin: str = "") -> str:
    done = subprocess.run(
        words, cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_readme_examples_run(url: str) -> None:
    text = run(sys.executable, "-c", example("python", "from openai", url))
    assert "def " in text
    if shutil.which("curl"):
        answer = run("sh", "-c", example("bash", "curl", url))
        assert '"model":"smollm2@adapt"' in answer
        assert '"finish_reason":"' in answer


def test_readme_comparison_runs_on_the_example_adapter(start_server) -> None:
    server = start_server("--adapter", "roleplay=examples/roleplay/adapter")
    found = re.search(r"^```bash\n(curl \S+/v1/compare.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert found is not None
    if shutil.which("curl"):
        answer = json.loads(run("sh", "-c", found[1].replace("http://127.0.0.1:8000", server.url)))
        texts = [arm["message"]["content"] for arm in answer["arms"]]
        assert len(set(texts)) == 3
        assert all(texts)
    body = {"prompt": "The sea", "max_tokens": 8, "temperature": 0, "logprobs": 0}
    base, off, on = (
        httpx.post(server.url + "/v1/completions", json=body | choice, timeout=300).json()
        for choice in (
            {"model": "smollm2"},
            {"model": "smollm2:roleplay", "adapter_scale": 0},
            {"model": "smollm2:roleplay"},
        )
    )
    scores = [x["choices"][0]["logprobs"]["token_logprobs"] for x in (base, off, on)]
    assert scores[0] == scores[1]
    assert scores[0] != scores[2]
    assert server.stop(signal.SIGTERM) == 0


def test_chat_streams_with_a_strategy(url: str) -> None:
    words = ["chat", "--url", url, "--decoding", "adapt", "--seed", "1", "--max-tokens", "20"]
    outputs = {run(sys.executable, "-m", "serve.cli.main", *words, stdin="Hi\n") for _ in range(2)}
    assert len(outputs) == 1
    assert outputs.pop().strip()


def test_start_message_command_runs(start_server) -> None:
    server = start_server()
    if shutil.which("curl"):
        command = server.wait_for("curl ").removeprefix("proa:").strip()
        assert run("sh", "-c", command).endswith("data: [DONE]\n\n")
    assert server.stop(signal.SIGINT) == 0


def test_trace_of_adapt_is_hot_where_an_indented_line_begins(url: str) -> None:
    body: dict[str, Any] = {
        "prompt": "def fib(n):\n    if n < 2:\n        return n\n    return fib(n - 1)\n\n\n"
        "def mul(a, b):\n    total",
        "decoding": {"strategy": "adapt", "a": 0.9, "b": 0.2},
        "return_decoding_trace": True,
        "max_tokens": 40,
        "seed": 3,
    }
    choice = httpx.post(url + "/v1/completions", json=body, timeout=300).json()["choices"][0]
    trace = choice["decoding_trace"]
    assert "".join(entry["token"] for entry in trace).startswith(choice["text"][:20])
    for before, entry in zip(trace, trace[1:], strict=False):
        is_line_start = before["class"] == "N1"
        assert entry["temperature"] == pytest.approx(0.9 if is_line_start else 0.2) or (
            before["class"] in ("W", "K")
        )
    assert any(entry["temperature"] == pytest.approx(0.9) for entry in trace)
