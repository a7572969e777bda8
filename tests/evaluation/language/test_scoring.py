"""Log-likelihoods read from echoed prompts, against a server that tokenizes by words."""

import asyncio
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from evaluation.errors import DataFileError, RunError
from evaluation.language.perplexity import (
    cut_pieces,
    measure_perplexity,
    read_windows_text,
    to_markdown,
)
from evaluation.language.scoring import Likelihood, score_continuations, score_tokens
from evaluation.server import Arm
from tests.evaluation.conftest import Body, FakeServer

Make = Callable[..., FakeServer]
ARM = Arm(label="a", model="base")
_WORD = re.compile(r" ?\w+|\W")


def words(text: str) -> list[str]:
    return _WORD.findall(text)


def logprob(token: str) -> float:
    return -float(len(token))


def echo(body: Body) -> Body:
    """Score each token by its length; the likeliest alternative has half of that."""
    if body["path"] == "/tokenize":
        return {"tokens": [len(word) for word in words(body["prompt"])]}
    prompts = body["prompt"] if isinstance(body["prompt"][0], str) else [body["prompt"]]
    choices = []
    for index, prompt in enumerate(prompts):
        tokens = words(prompt) if isinstance(prompt, str) else ["x" * n for n in prompt]
        offsets = [sum(map(len, tokens[:n])) for n in range(len(tokens))]
        values = [None, *map(logprob, tokens[1:])]
        tops = [None, *({"best": logprob(t) if t == " sure" else -0.5} for t in tokens[1:])]
        # One token is made beyond the prompt.
        choices.append({"index": index, "logprobs": {
            "tokens": [*tokens, "new"], "token_logprobs": [*values, -9.0],
            "text_offset": [*offsets, sum(map(len, tokens))], "top_logprobs": [*tops, {"n": -9.0}],
        }})  # fmt: skip
    return {"choices": choices[::-1]}


def score(server: FakeServer, pairs: list[tuple[str, str]]) -> list[Likelihood]:
    return asyncio.run(score_continuations(ARM, pairs, server.servers(patience_s=0.02)))


def test_tokens_beyond_the_context_count(make_server: Make) -> None:
    server = make_server(echo)
    found = score(server, [("A cat", " sat down"), ("A cat", " sure"), ("ab", "cd ef")])
    assert [(f.logprob, f.num_tokens, f.is_greedy) for f in found] == [
        (-4.0 - 5.0, 2, False),
        (-5.0, 1, True),
        # "abcd" reaches beyond the context, and it is the text's first: nothing is before it.
        (-3.0, 1, False),
    ]
    (body,) = server.bodies
    assert body["prompt"] == ["A cat sat down", "A cat sure", "abcd ef"]
    assert (body["echo"], body["max_tokens"], body["temperature"]) == (True, 1, 0.0)


@pytest.mark.parametrize(
    "answer",
    [
        {}, {"choices": [{"index": 0, "logprobs": None}]}, {"choices": []}, {"choices": None},
        {"choices": [{"index": 0, "logprobs": {"text_offset": [0], "token_logprobs": [None],
                                               "top_logprobs": [None]}}]},
    ],
)  # fmt: skip
def test_server_that_does_not_echo_is_named(make_server: Make, answer: Body) -> None:
    with pytest.raises(RunError, match="arm 'a': the server at .* echoes no log probabilities"):
        score(make_server(lambda _: answer), [("a", " b")])
    servers = make_server(lambda _: answer).servers(patience_s=0.02)
    with pytest.raises(RunError, match="echoes no log probabilities"):
        asyncio.run(score_tokens(ARM, [1, 2], servers))


TEXT = "one three five seven\n" * 40


def measure(folder: Path, server: FakeServer, **settings: int) -> dict:
    arms = [ARM, Arm(label="b", model="base")]
    given = {"length": 10, "windows": None, "concurrency": 2} | settings
    return asyncio.run(
        measure_perplexity(
            arms, TEXT, folder, server.servers(patience_s=0.02), progress=lambda *_: None, **given
        )
    )  # fmt: skip


def test_perplexity_is_that_of_all_windows(tmp_path: Path, make_server: Make) -> None:
    summary = measure(tmp_path, make_server(echo))
    tokens = [len(word) for word in words(TEXT)]
    windows = [tokens[i : i + 10] for i in range(0, len(tokens) // 10 * 10, 10)]
    loss = sum(sum(window[1:]) for window in windows) / (9 * len(windows))
    for label in "ab":
        figures = summary["arms"][label]
        assert (figures["windows"], figures["tokens"]) == (len(windows), 9 * len(windows))
        assert figures["loss"] == pytest.approx(loss)
        assert figures["perplexity"] == pytest.approx(math.exp(loss))
        assert figures["low"] <= figures["perplexity"] * (1 + 1e-9)
        assert figures["perplexity"] <= figures["high"] * (1 + 1e-9)
    assert f"| `a` | {len(windows)} |" in to_markdown(summary, "Perplexity")


def test_measured_windows_are_not_measured_again(tmp_path: Path, make_server: Make) -> None:
    first = measure(tmp_path, make_server(echo), windows=3)
    path = tmp_path / "a_windows.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    server = make_server(echo)
    assert measure(tmp_path, server, windows=3) == first
    assert sum(body["path"] == "/v1/completions" for body in server.bodies) == 1


def test_text_shorter_than_a_window_is_refused(tmp_path: Path, make_server: Make) -> None:
    with pytest.raises(DataFileError, match="the text has 200 tokens, a window 5000"):
        measure(tmp_path, make_server(echo), length=5000)


def test_pieces_are_the_text_and_have_its_tokens() -> None:
    text = "".join(f" word{i} Another, (line)\n \n = Head =\n  5 x" for i in range(1500))
    pieces = list(cut_pieces(text))
    assert len(pieces) > 5
    assert "".join(pieces) == text
    assert [word for piece in pieces for word in words(piece)] == words(text)
    assert list(cut_pieces("x" * 10_000)) == ["x" * 10_000]


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), (b"  \n", "is empty"), (b"\xff", "is not in UTF-8")]
)
def test_text_that_is_none_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataFileError, match=message):
        read_windows_text(tmp_path / "a.txt")
    with pytest.raises(DataFileError, match="cannot be read"):
        read_windows_text(tmp_path / "b.txt")
