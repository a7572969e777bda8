"""`proa prune`: its options, its mistakes, and whole runs on a tiny model."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from adapters.disp.search_config import SearchConfig
from adapters.format import read_config
from models.weights import dense
from serve.cli.main import build_parser
from serve.cli.prune import MODEL_FLAGS, read_search_config
from serve.cli.prune_run import as_served, load_originals
from serve.model_options import ModelOptions

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
        "prune", "disp", "--model", str(tiny_llama_folder), "--data", str(data), "--output",
        str(tmp_path / "out"), "--steps", "3", "--batch-size", "2", "--length", "16", "--align",
        "8", "--threads", "1", "--cache-dir", str(cache),
    ]  # fmt: skip


def test_help_has_every_option_with_the_default_that_holds() -> None:
    parser = build_parser("prune")
    text = next(a for a in parser._actions if a.dest == "command").choices["prune"].format_help()
    text = re.sub(r"-\s+(?=\w)", "-", " ".join(text.split()))
    for item in fields(SearchConfig):
        assert f"--{item.name.replace('_', '-')}" in text
        others = {
            "remove": "0.3", "gradient_checkpointing": "off",
            "further_steps": "two thirds of --steps",
        }  # fmt: skip
        shown = others.get(item.name, item.default)
        assert f"[default: {shown}]" in text
    for name in MODEL_FLAGS:
        assert f"--{name.replace('_', '-')}" in text


def test_options_that_are_not_given_keep_their_defaults() -> None:
    words = ["prune", "disp", "--data", "x", "--output", "y"]
    assert read_search_config(build_parser("prune").parse_args(words)) == SearchConfig()


def test_wrong_arguments_are_refused_before_torch_is_loaded() -> None:
    code = (
        "import sys\nfrom serve.cli.main import main\n"
        "main('prune disp --data x --output y --steps 0'.split())\nprint('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--steps must be a whole number of at least 1, got 0" in done.stderr
    assert done.stdout == "False\n"


def test_run_writes_a_variant_and_says_what_it_removed(
    words: list[str], call_proa, tmp_path: Path
) -> None:
    done = call_proa(*words, "--remove", "0.5", "--description", "half")
    assert done.returncode == 0, done.stderr
    found = re.search(
        r"out: (\d+\.\d)% of the linears' parameters removed, (\d+\.\d)% of the whole model; "
        r"held-out loss \d+\.\d+, of the whole model \d+\.\d+",
        done.stderr,
    )
    assert found, done.stderr
    assert float(found[1]) == pytest.approx(50, abs=0.5)
    assert float(found[2]) < float(found[1])
    assert f"serve it with: proa serve --variant out={tmp_path / 'out'}" in done.stderr
    assert f"proa train qst --on {tmp_path / 'out'}" in done.stderr
    config = read_config(tmp_path / "out")
    assert config.method == "disp"
    assert config.description == "half"
    assert config.base_quantization == "nf4"
    assert config.fields["remove_linears"] == pytest.approx(0.5, abs=0.005)
    assert config.fields["align"] == 8


def test_several_shares_have_a_folder_each(words: list[str], call_proa, tmp_path: Path) -> None:
    done = call_proa(*words, "--remove", "0.5,0.25")
    assert done.returncode == 0, done.stderr
    for share in (25, 50):
        config = read_config(tmp_path / "out" / f"remove-{share}")
        assert config.fields["remove_linears"] == pytest.approx(share / 100, abs=0.005)


def test_share_of_the_whole_model_is_turned_into_one_of_linears(
    words: list[str], call_proa, tmp_path: Path
) -> None:
    done = call_proa(*words, "--remove-total", "0.3")
    assert done.returncode == 0, done.stderr
    fields = read_config(tmp_path / "out").fields
    assert fields["remove_total"] == pytest.approx(0.3, abs=0.005)
    assert fields["remove_linears"] > fields["remove_total"]


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        (["--remove", "1.5"], 2, r"--remove must be different shares between 0 and 1.*\(1.5,\)"),
        (["--remove", "0.2,0.2"], 2, "--remove must be different shares"),
        (["--remove", "a"], 2, "--remove: must be a share such as 0.3, or several .*'a'"),
        (["--remove", "0.1", "--remove-total", "0.1"], 2, "not allowed with argument --remove"),
        (["--remove-total", "0"], 2, "--remove-total must be different shares between 0 and 1"),
        (["--remove-total", "0.8"], 2, r"--remove-total must be above 0 and at most 0\.\d+ for"),
        (["--remove", "0.99"], 2, r"--remove must be at most 0\.\d+ for this model, got 0.99"),
        (["--steps", "x"], 2, "--steps: invalid int value: 'x'"),
        (["--learning-rate", "-1"], 2, "--learning-rate must be a number above 0, got -1.0"),
        (["--estimator", "gumble"], 2, "--estimator: invalid choice: 'gumble'"),
        (["--length", "20000"], 2, "--length: 20000 is more than the model's 16384 tokens"),
        (["--length", "10000"], 2, r"text.txt has 2320 tokens; a window of .* takes 10001"),
        (["--data", "none.txt"], 2, "--data: none.txt is not a file"),
        (["--model", "no/such/folder"], 2, "no/such/folder"),
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
    assert re.search(message, errors[0]), errors[0]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "text.txt: the file is empty"),
        (b" \n\n", "text.txt: the file is empty"),
        (b"fine\n\xff\xfe\n", "text.txt: line 2: not UTF-8 text"),
        (b"short", r"text.txt has 5 tokens; a window of --length 16 takes 17"),
    ],
    ids=["empty", "blank", "not UTF-8", "short"],
)
def test_bad_text_is_refused(
    content: bytes, message: str, words: list[str], data: Path, call_proa
) -> None:
    data.write_bytes(content)
    done = call_proa(*words)
    assert done.returncode == 2, done.stderr
    assert re.search(message, done.stderr)


def test_four_bit_source_is_refused_unless_told_otherwise(
    words: list[str], call_proa, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "four-bit"
    assert call_proa("quantize", str(tiny_llama_folder), str(folder)).returncode == 0
    words[words.index("--model") + 1] = str(folder)
    done = call_proa(*words)
    assert done.returncode == 2
    assert re.search(r"are in 4 bits \(nf4\); a search, .* or give --dequantize", done.stderr)
    done = call_proa(*words, "--dequantize")
    assert done.returncode == 0, done.stderr
    assert "rounded to 4 bits a second time, which costs quality" in done.stderr


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
            if "held-out loss of the base" in line:
                process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130, seen
    found = re.search(r"stopped after step (\d+); .* --resume goes on from there", seen[-1])
    assert found, seen
    done = call_proa(*words, "--seed", "1", "--resume")
    assert done.returncode == 1
    assert "seed: 0 then, 1 now" in done.stderr
    assert (tmp_path / "out" / "checkpoints" / f"step-{int(found[1]):08d}").is_dir()


def test_search_computes_with_the_weights_that_are_served(
    tiny_llama_folder: Path, cache: Path
) -> None:
    options = ModelOptions(model=str(tiny_llama_folder), cache_dir=str(cache))
    original, served = load_originals(options)
    found = as_served(original, served)
    name = "layers.0.down.weight"
    assert torch.equal(found.weights[name], dense(served.weights[name]))
    assert not torch.equal(found.weights[name], dense(original.weights[name]))
    assert (found.fingerprint, found.quantization) == (original.fingerprint, "none")
    assert found.weights.keys() == original.weights.keys()
