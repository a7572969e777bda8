"""`proa train temperature`: its options, its mistakes, and a whole run on a tiny model."""

import json
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from adapters.format import read_config
from adapters.temperature_head.head import HeadConfig
from adapters.temperature_head.training import HeadTraining
from evaluation.folder import digest_of
from serve.cli.train_temperature import HEAD_FLAGS

RunProa = Callable[..., Any]


def test_options_have_the_defaults_that_hold() -> None:
    defaults = {
        field.name: field.default for cls in (HeadConfig, HeadTraining) for field in fields(cls)
    }
    for name, kind, _, text in HEAD_FLAGS:
        assert text.endswith(f"[default: {defaults[name]}]")
        assert isinstance(defaults[name], kind)
    missing = defaults.keys() - {name for name, *_ in HEAD_FLAGS}
    assert missing == {"drawn_at", "batch_rows"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl"
    lines = [
        {
            "task_id": f"T/{n}", "prompt": f"def f{n}(x):\n", "entry_point": f"f{n}",
            "test": "def check(candidate):\n    assert candidate(1) == 2\n",
        }
        for n in range(4)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_run(folder: Path, data: Path, **changed: Any) -> Path:
    """Write what `proa eval humaneval` leaves: of each task two programs right and two wrong."""
    folder.mkdir()
    arms = changed.pop("arms", [{"label": "tiny", "model": "tiny", "fields": {"temperature": 0.8}}])
    settings = {"arms": arms, "form": "completion", "data": digest_of(data), **changed}
    (folder / "run.json").write_text(json.dumps(settings))
    samples, results = [], []
    for n in range(4):
        for i in range(4):
            key = {"task_id": f"T/{n}", "sample": i}
            samples.append({**key, "completion": f"    return x + {i}\n", "solution": ""})
            results.append({**key, "passed": i < 3, "plus_passed": i < 2})
    for arm in arms:
        for name, lines in (("samples", samples), ("results", results)):
            path = folder / f"{arm['label']}_{name}.jsonl"
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def words(tiny_llama_folder: Path, data: Path, tmp_path: Path) -> list[str]:
    """A short run that works."""
    run = write_run(tmp_path / "run", data)
    return [
        "train", "temperature", "--model", str(tiny_llama_folder), "--quantization", "none",
        "--threads", "1", "--evaluation", str(run), "--data", str(data), "--output",
        str(tmp_path / "out"), "--epochs", "5", "--width", "4",
    ]  # fmt: skip


def test_head_is_trained_and_says_how_it_is_served(
    call_proa: RunProa, words: list[str], tmp_path: Path, tiny_llama_folder: Path
) -> None:
    done = call_proa(*words, "--description", "warm", "--learning-rate", "0.05")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    assert "16 programs, 8 passed, drawn at 0.8" in done.stderr
    assert f"proa serve --adapter out={out}" in done.stderr
    about = read_config(out)
    assert (about.method, about.description) == ("temperature", "warm")
    assert about.training["telling_tasks"] == 4
    report = json.loads((out / "report.json").read_text())
    assert (report["programs"], report["settings"]["k"]) == (16, 10)
    assert 0.1 <= report["temperatures"][0] <= report["temperatures"][2] <= 1.5
    found = call_proa("adapters", "inspect", str(out))
    assert "temperature: temperature head" in found.stdout
    verified = call_proa(
        "adapters", "verify", str(out), "--model", str(tiny_llama_folder), "--quantization", "none"
    )
    assert verified.returncode == 0, verified.stderr
    # The same command computes the same numbers.
    tensors = (out / "adapter_model.safetensors").read_bytes()
    assert call_proa(*words, "--description", "warm", "--learning-rate", "0.05").returncode == 0
    assert (out / "adapter_model.safetensors").read_bytes() == tensors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 0.8, "top_p": 0.9}, "drawn at a plain temperature above 0"),
        ({"temperature": 0}, "drawn at a plain temperature above 0"),
        ({}, "drawn at a plain temperature above 0"),
        ({"temperature": 1.9}, "1.9, which must be between the least and the largest"),
    ],
)
def test_samples_that_were_drawn_otherwise_are_refused(
    call_proa: RunProa, words: list[str], data: Path, tmp_path: Path, fields: Any, message: str
) -> None:
    arms = [{"label": "tiny", "model": "tiny", "fields": fields}]
    words[words.index("--evaluation") + 1] = str(write_run(tmp_path / "other", data, arms=arms))
    done = call_proa(*words)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--k", "0"], "k must be from 1 to 100"),
        (["--least", "2", "--most", "1"], "0 <= least < most <= 2"),
        (["--arm", "other"], "--arm: .* has tiny; got 'other'"),
        (["--evaluation", "none"], "--evaluation: none is not a folder"),
        (["--evaluation", "."], "holds no evaluation of programs"),
        (["--data", "none"], "--data: none is not a file"),
        (["--epochs", "x"], "invalid int value"),
    ],
)
def test_mistakes_are_named(
    call_proa: RunProa, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    given: list[str], message: str,
) -> None:  # fmt: skip
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    done = call_proa(*words, *given)
    assert done.returncode == 2
    assert re.search(message, done.stderr), done.stderr


def test_other_data_and_unnamed_arms_are_refused(
    call_proa: RunProa, words: list[str], data: Path, tmp_path: Path
) -> None:
    arms = [{"label": n, "model": "m", "fields": {"temperature": 0.8}} for n in ("a", "b")]
    words[words.index("--evaluation") + 1] = str(write_run(tmp_path / "two", data, arms=arms))
    assert "--arm: name one of a, b" in call_proa(*words).stderr
    assert call_proa(*words, "--arm", "b").returncode == 0
    data.write_text(data.read_text() + "\n")
    assert "is not the file that" in call_proa(*words, "--arm", "b").stderr
