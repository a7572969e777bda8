"""`proa compress`: its options, its mistakes, and whole runs on a tiny model."""

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from adapters.format import digest, read_config
from adapters.mixed_rank.compress_config import CompressConfig
from serve.cli.compress import MODEL_FLAGS
from serve.cli.main import build_parser

ROOT = Path(__file__).parents[3]
TEXT = "A text of a few words that says the same again and again. " * 40


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny model is quantised once for all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def words(tiny_llama_folder: Path, data: Path, tmp_path: Path, cache: Path) -> list[str]:
    """A short run that works."""
    return [
        "compress", "--model", str(tiny_llama_folder), "--data", str(data), "--output",
        str(tmp_path / "out"), "--sequences", "8", "--length", "32", "--eval-sequences", "2",
        "--rank-step", "4", "--form", "float16", "--steps", "4", "--threads", "1", "--cache-dir",
        str(cache),
    ]  # fmt: skip


def test_help_has_every_option_with_the_default_that_holds() -> None:
    parser = build_parser("compress")
    text = next(a for a in parser._actions if a.dest == "command").choices["compress"].format_help()
    text = re.sub(r"-\s+(?=\w)", "-", " ".join(text.split()))
    for item in fields(CompressConfig):
        assert f"--{item.name.replace('_', '-')}" in text
        shown = {"compensate": "on"}.get(item.name, item.default)
        assert f"[default: {shown}]" in text
    for name in MODEL_FLAGS:
        assert f"--{name.replace('_', '-')}" in text


def test_wrong_arguments_are_refused_before_torch_is_loaded() -> None:
    code = (
        "import sys\nfrom serve.cli.main import main\n"
        "main('compress --data x --output y --remove 2'.split())\nprint('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--remove must be a share between 0 and 1, got 2.0" in done.stderr
    assert done.stdout == "False\n"


def test_variant_is_served_and_tells_what_it_is(
    words: list[str], call_proa, tmp_path: Path, tiny_llama_folder: Path, cache: Path
) -> None:
    done = call_proa(*words, "--remove", "0.3", "--description", "thin")
    assert done.returncode == 0, done.stderr
    found = re.search(
        r"out: (\d+\.\d)% of the linears' parameters removed, (\d+\.\d)% of the whole model; "
        r"held-out loss \d+\.\d+, of the whole model \d+\.\d+",
        done.stderr,
    )
    assert found, done.stderr
    assert float(found[1]) >= 30
    out = tmp_path / "out"
    assert f"serve it with: proa serve --variant out={out}" in done.stderr
    config = read_config(out)
    assert (config.method, config.description) == ("mixed_rank", "thin")
    model = ["--model", str(tiny_llama_folder), "--cache-dir", str(cache)]
    shown = call_proa("adapters", "inspect", str(out))
    assert "mixed_rank: mixed-rank variant" in shown.stdout
    assert call_proa("adapters", "verify", str(out), *model).returncode == 0
    prompt = ["generate", "A text of", *model, "--max-tokens", "8", "--seed", "1"]
    base, thin = call_proa(*prompt), call_proa(*prompt, "--variant", f"thin={out}")
    assert thin.returncode == 0, thin.stderr
    assert thin.stdout != base.stdout

    # A side network is trained on it, and answers with it.
    examples, healed = tmp_path / "train.jsonl", tmp_path / "healed"
    records = [{"question": f"Say {i}", "answer": f"{i}" * 5} for i in range(4)]
    examples.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    trained = call_proa(
        "train", "qst", *model, "--on", str(out), "--data", str(examples), "--output", str(healed),
        "--reduction", "4", "--steps", "2", "--threads", "1",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert read_config(healed).chain == (digest(out),)
    both = call_proa(*prompt, "--variant", f"thin={out}", "--adapter", f"healed={healed}")
    assert both.returncode == 0, both.stderr


def test_pruned_variant_is_compressed_and_nothing_is_pruned_after(
    words: list[str], call_proa, tmp_path: Path, tiny_llama_folder: Path, data: Path, cache: Path
) -> None:
    model = ["--model", str(tiny_llama_folder), "--cache-dir", str(cache)]
    small, out = tmp_path / "small", tmp_path / "out"
    pruned = call_proa(
        "prune", "disp", *model, "--data", str(data), "--output", str(small), "--steps", "2",
        "--length", "16", "--align", "8", "--remove", "0.3",
    )  # fmt: skip
    assert pruned.returncode == 0, pruned.stderr
    done = call_proa(*words, "--on", str(small), "--remove", "0.2")
    assert done.returncode == 0, done.stderr
    assert len(read_config(out).chain) == 1
    verified = call_proa("adapters", "verify", str(out), "--on", str(small), *model)
    assert verified.returncode == 0, verified.stderr
    alone = call_proa("adapters", "verify", str(out), *model)
    assert alone.returncode != 0
    assert "made for the base with" in alone.stderr + alone.stdout


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        (["--remove", "1.5"], 2, r"--remove must be a share between 0 and 1, got 1.5"),
        (["--remove", "0.99"], 2, r"--remove: must be at most 0\.\d+ with ranks in steps of 4"),
        (["--form", "int3"], 2, "--form: invalid choice: 'int3'"),
        (["--rank-step", "0"], 2, "--rank-step must be a whole number of at least 1, got 0"),
        (["--calibration", "none"], 2, "--compensate must be off with calibration 'none'"),
        (["--length", "20000"], 2, "--length: 20000 is more than the model's 16384 tokens"),
        (["--sequences", "1000"], 2, r"text.txt has 2320 tokens; --sequences 1000 .* take 32032"),
        (["--data", "none.txt"], 2, "--data: none.txt is no file and no folder"),
        (["--on", "nowhere"], 2, "--on: nowhere: no adapter"),
        (["--output", "pyproject.toml"], 1, "pyproject.toml is a file; name a folder"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], call_proa, changes: list[str], status: int, message: str
) -> None:
    done = call_proa(*words, *changes)
    assert done.returncode == status, done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
