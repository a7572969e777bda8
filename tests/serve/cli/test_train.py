"""`proa train`: its options, its mistakes, and whole runs on a tiny model."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from adapters.format import digest, read_config
from adapters.qst.config import DEFAULT_SIDE_LAYERS, QstConfig
from adapters.qst.training_config import TrainingConfig
from serve.cli.main import build_parser
from serve.cli.train import (
    DOWNSAMPLES,
    MODEL_FLAGS,
    SIDE_ATTENTIONS,
    SIDE_FLAGS,
    read_training_config,
)
from serve.cli.train_run import QST_FIELDS

ROOT = Path(__file__).parents[3]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    records = [{"question": f"Say {i}", "answer": f"{i}" * 5} for i in range(12)]
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


@pytest.fixture
def words(tiny_llama_folder: Path, data: Path, tmp_path: Path) -> list[str]:
    """A short run that works."""
    return [
        "train", "qst", "--model", str(tiny_llama_folder), "--data", str(data), "--output",
        str(tmp_path / "out"), "--reduction", "4", "--steps", "3", "--batch-size", "2",
        "--quantization", "none", "--kernels", "reference", "--threads", "1",
    ]  # fmt: skip


def help_text() -> str:
    parser = build_parser("train")
    train = next(a for a in parser._actions if a.dest == "command").choices["train"]
    text = next(a for a in train._actions if a.dest == "method").choices["qst"].format_help()
    return re.sub(r"-\s+(?=\w)", "-", " ".join(text.split()))


def test_help_has_every_option_with_the_default_that_holds() -> None:
    text = help_text()
    for item in fields(TrainingConfig):
        assert f"--{item.name.replace('_', '-')} " in text
        if item.default is not None:
            assert f"[default: {item.default}]" in text
    for name in MODEL_FLAGS:
        assert re.search(rf"--{name.replace('_', '-')}[ ,]", text)
    assert "--on DIR" in text
    defaults = QstConfig()
    for flag, _, _, description in SIDE_FLAGS:
        default = getattr(defaults, flag[2:].replace("-", "_"))
        expected = "the model's" if default is None else f"[default: {default}]"
        if flag == "--side-layers":
            expected = f"[default: {DEFAULT_SIDE_LAYERS}]"
        assert expected in description
    assert (defaults.downsample, defaults.side_attention) == ("adapter", "own")
    flags = {flag[2:].replace("-", "_") for flag, *_ in SIDE_FLAGS}
    assert flags | {"downsample", "side_attention"} == set(QST_FIELDS)
    for name in DOWNSAMPLES:
        assert QstConfig(downsample=name).downsample == name  # type: ignore[arg-type]
    for name in SIDE_ATTENTIONS:
        assert QstConfig(side_attention=name).side_attention == name  # type: ignore[arg-type]


def test_options_that_are_not_given_keep_their_defaults() -> None:
    words = ["train", "qst", "--data", "x", "--output", "y"]
    assert read_training_config(build_parser("train").parse_args(words)) == TrainingConfig()


def test_run_writes_an_adapter_and_says_what_it_gained(
    words: list[str], call_proa, tmp_path: Path
) -> None:
    done = call_proa(*words, "--description", "says numbers")
    assert done.returncode == 0, done.stderr
    assert "12 examples" in done.stderr
    assert "memory: base weights" in done.stderr
    found = re.search(
        r"held-out loss: base (\d\.\d+), perplexity (\d+\.\d+); with the side network (\d\.\d+)",
        done.stderr,
    )
    assert found
    assert math.exp(float(found[1])) == pytest.approx(float(found[2]), rel=1e-3)
    assert f"serve it with: proa serve --adapter out={tmp_path / 'out'}" in done.stderr
    config = read_config(tmp_path / "out")
    assert config.description == "says numbers"
    assert config.fields["reduction"] == 4
    assert config.training["options"]["batch_size"] == 2


def test_fork_is_what_is_trained_unless_told_otherwise(
    words: list[str], call_proa, tmp_path: Path
) -> None:
    at = words.index("--reduction")
    done = call_proa(*words[:at], *words[at + 2 :], "--side-layers", "2")
    assert done.returncode == 0, done.stderr
    fields = read_config(tmp_path / "out").fields
    assert fields == {
        "side_attention": "base", "side_layers": 2, "rank": 16, "task": "causal_lm",
        "num_labels": 0, "labels": [],
    }  # fmt: skip
    done = call_proa("adapters", "inspect", str(tmp_path / "out"))
    assert "the last 2, differences of rank 16" in done.stdout


@pytest.mark.parametrize("form", ["own", "base"])
def test_side_network_is_trained_on_a_variant(
    form: str, words: list[str], call_proa, write_variant, tmp_path: Path
) -> None:
    variant = write_variant(tmp_path / "small")
    if form == "base":
        at = words.index("--reduction")
        words[at : at + 2] = ["--side-layers", "2"]
    words += ["--on", str(variant), "--cache-dir", str(tmp_path)]
    done = call_proa(*words)
    assert done.returncode == 0, done.stderr
    config = read_config(tmp_path / "out")
    assert config.chain == (digest(variant),)
    found = f"proa serve --variant small={variant} --adapter out={tmp_path / 'out'}"
    assert f"serve it with: {found}" in done.stderr
    model = ["--model", words[words.index("--model") + 1], "--quantization", "none"]
    done = call_proa("adapters", "verify", str(tmp_path / "out"), "--on", str(variant), *model)
    assert done.returncode == 0, done.stderr


def test_table_makes_a_classifier(words: list[str], call_proa, tmp_path: Path) -> None:
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text("sentence\tlabel\nfine\tgood\npoor\tbad\n", encoding="utf-8")
    done = call_proa(
        *words, "--data", str(tmp_path / "train.tsv"), "--eval-data", str(tmp_path / "dev.tsv"),
        "--task", "classification",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"held-out loss: \d\.\d+, accuracy \d+\.\d%", done.stderr)
    assert "proa serve" not in done.stderr
    assert read_config(tmp_path / "out").fields["labels"] == ["bad", "good"]


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        (["--learning-rate", "0"], 2, "--learning-rate must be a number above 0, got 0.0"),
        (["--batch-size", "x"], 2, "--batch-size: invalid int value: 'x'"),
        (["--epochs", "1"], 2, "argument --epochs: not allowed with argument --steps"),
        (["--schedule", "step"], 2, "--schedule: invalid choice: 'step'"),
        (["--data", "none.jsonl"], 2, "--data: none.jsonl is not a file"),
        (["--eval-data", "none.jsonl"], 2, "--eval-data: none.jsonl is not a file"),
        (["--on", "no/such/folder"], 2, "--on: no/such/folder is not a folder"),
        (["--on", "tests"], 2, "--on: tests: no adapter; adapter_config.json is missing"),
        (["--max-length", "1"], 2, "--max-length must be at least 2, got 1"),
        (["--max-length", "99999"], 2, "--max-length: 99999 is more than the model's 16384 tokens"),
        (["--max-length", "9"], 2, "line 1: .* tokens, over --max-length of 9, and 11 more"),
        (["--reduction", "5"], 2, "reduction 5 does not divide the base's hidden_size 32"),
        (["--side-attention", "base"], 2, "--reduction: not with --side-attention base"),
        (["--side-layers", "2"], 2, "side_layers must be null with side_attention own, got 2"),
        (["--kernels", "cuda", "--device", "cpu"], 2, "kernels: 'cuda' needs device"),
        (["--model", "no/such/folder"], 2, "no/such/folder"),
        (["--task", "classification"], 2, 'line 1: "label" must be'),
        (["--output", "pyproject.toml"], 1, "pyproject.toml is a file; name a folder"),
        (["--output", "tests"], 1, "output: tests is not empty; name a new folder, or resume"),
    ],
)
def test_mistake_is_one_line(
    changes: list[str], status: int, message: str, words: list[str], call_proa,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = call_proa(*words, *changes)
    assert done.returncode == status, done.stderr
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert re.search(message, errors[0])
    assert "Traceback" not in done.stderr


def test_unknown_method_is_refused(call_proa) -> None:
    done = call_proa("train", "lora", "--data", "x", "--output", "y")
    assert done.returncode == 2
    assert "invalid choice: 'lora'" in done.stderr


def test_interrupted_run_goes_on_where_it_stopped(
    words: list[str], call_proa, tmp_path: Path
) -> None:
    words[words.index("--steps") + 1] = "5000"
    process = subprocess.Popen(
        [sys.executable, "-m", "serve.cli.main", *words], cwd=ROOT, stderr=subprocess.PIPE,
        text=True, env={n: t for n, t in os.environ.items() if not n.startswith("PROA_")},
    )  # fmt: skip
    assert process.stderr is not None
    with process.stderr:
        seen = []
        for line in process.stderr:
            seen.append(line)
            if "memory:" in line:
                process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130, seen
    found = re.search(r"stopped after step (\d+); .* --resume goes on from there", seen[-1])
    assert found, seen
    done = call_proa(*words, "--seed", "1", "--resume")
    assert done.returncode == 1
    assert "seed: 0 then, 1 now" in done.stderr
    assert (tmp_path / "out" / "checkpoints" / f"step-{int(found[1]):08d}").is_dir()
