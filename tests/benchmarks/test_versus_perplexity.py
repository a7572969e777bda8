"""Perplexities of both sides, with scripts in place of them."""

import json
from pathlib import Path

import pytest

from benchmarks import versus_perplexity
from benchmarks.llama_cpp import SOURCE_FORMAT
from benchmarks.report import BenchmarkFailed
from benchmarks.versus_perplexity import compare_perplexity
from benchmarks.versus_speed import Peer, Proa
from benchmarks.windows import cut_windows, digest_windows
from serve.model_options import ModelOptions

TOKENS = list(range(40))
THEIRS = {SOURCE_FORMAT: 20.0, "Q4_0": 21.0}
READ = {"windows": 2, "length": 16, "threads": 1}


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Peer:
    models = {name: tmp_path / name for name in THEIRS}

    def perplexity(_: Path, model: Path, text: Path, **read: int) -> float:
        assert read == READ
        assert text.read_bytes() == b"two\nlines"
        return THEIRS[model.name]

    def run(command: list[object], *, is_quiet: bool) -> str:
        words = [str(word) for word in command]
        assert "--second-half" in words
        assert words[-4:] == ["--quantization", "none", "--head", ModelOptions().head]
        digest = digest_windows(cut_windows(TOKENS, 16, 2))
        figures = {"perplexity": 19.9, "tokens_sha256": digest, "length": 16, "windows": 2}
        return "noise\n" + json.dumps(figures)

    monkeypatch.setattr(versus_perplexity, "perplexity", perplexity)
    monkeypatch.setattr(versus_perplexity, "run_command", run)
    return Peer(tools=tmp_path, models=models)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_bytes(b"two\r\nlines")
    return path


PROA = Proa(source=Path("m.gguf"), given={"threads": "2", "quantization": "none"})


def test_perplexity_is_compared_on_the_same_file(
    peer: Peer, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versus_perplexity, "tokenize", lambda *_: TOKENS)
    measured, content = compare_perplexity(PROA, peer, text, **READ)
    assert measured["perplexity"].value == pytest.approx(-0.5)
    assert content["llama.cpp Q4_0"] == 21.0
    assert content["proa"] == 19.9


def test_perplexity_of_other_tokens_is_refused(
    peer: Peer, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versus_perplexity, "tokenize", lambda *_: [*TOKENS[:20], 7, *TOKENS[21:]])
    with pytest.raises(BenchmarkFailed, match="makes other tokens of the text than Proa"):
        compare_perplexity(PROA, peer, text, **READ)
