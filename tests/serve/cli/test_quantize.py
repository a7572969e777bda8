"""`proa quantize --search`: what it writes, and its mistakes."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.checkpoints import load_checkpoint
from models.weights import dense
from serve.cli.arguments import UserError
from serve.cli.quantize_run import MIN_TOKENS, cut_windows

TEXT = "A text of a few words that says the same again and again. " * 40


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def loss(folder: Path, source: Path) -> float:
    """Return the squared error of all 4-bit weights."""
    exact = load_checkpoint(source, quantization="none").weights
    return sum(
        float((dense(weight) - dense(exact[name])).square().sum())
        for name, weight in load_checkpoint(folder).weights.items()
    )


@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
def test_search_loses_less_and_a_text_changes_what_is_found(
    double_quant: bool, tiny_llama_folder: Path, text: Path, tmp_path: Path, call_proa
) -> None:
    more = ["--double-quant"] if double_quant else []
    runs = {"plain": [], "searched": ["--search"], "weighed": ["--search", "--text", str(text)]}
    for name, flags in runs.items():
        words = ["quantize", str(tiny_llama_folder), str(tmp_path / name), *more, *flags]
        done = call_proa(*words, "--cache-dir", str(tmp_path / "cache"))
        assert done.returncode == 0, done.stderr
    lost = {name: loss(tmp_path / name, tiny_llama_folder) for name in runs}
    assert lost["searched"] < 0.9 * lost["plain"]
    assert lost["searched"] < lost["weighed"]
    names = {name: set(load_file(tmp_path / name / "model.safetensors")) for name in runs}
    assert names["plain"] == names["searched"] == names["weighed"]


def test_weighed_scales_lose_less_of_what_linears_compute(
    tiny_llama_folder: Path, text: Path, tmp_path: Path, call_proa
) -> None:
    """Inputs of the first layer are embeddings, of which the text has few: they differ in size."""
    for name, flags in {"searched": [], "weighed": ["--text", str(text)]}.items():
        words = ["quantize", str(tiny_llama_folder), str(tmp_path / name), "--search", *flags]
        assert call_proa(*words).returncode == 0
    weights = load_checkpoint(tiny_llama_folder, quantization="none").weights
    ids = torch.tensor(list(TEXT.encode())).clamp(max=259)
    rows = dense(weights["embed.weight"])[ids]
    rows = rows * (rows.square().mean(1, keepdim=True) + 1e-6).rsqrt()
    rows = rows * dense(weights["layers.0.attn_norm.weight"])
    errors = {}
    for name in ("searched", "weighed"):
        found = load_checkpoint(tmp_path / name).weights
        parts = [f"layers.0.{part}.weight" for part in "qkv"]
        lost = [(rows.square().mean(0) * (dense(found[p]) - dense(weights[p])) ** 2) for p in parts]
        errors[name] = sum(float(part.sum()) for part in lost)
    assert errors["weighed"] < errors["searched"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", f"--text: has 0 tokens; at least {MIN_TOKENS}"),
        (b"short", r"--text: has \d+ tokens; at least"),
        (b"\xff\xfe", "text.txt: line 1: not UTF-8 text"),
        (None, "cannot read .*text.txt: No such file"),
    ],
    ids=["empty", "short", "not UTF-8", "missing"],
)
def test_bad_text_is_one_line_and_nothing_is_written(
    content: bytes | None, message: str, tiny_llama_folder: Path, text: Path, call_proa
) -> None:
    text.unlink() if content is None else text.write_bytes(content)
    out = text.parent / "out"
    words = ["quantize", str(tiny_llama_folder), str(out), "--search", "--text", str(text)]
    done = call_proa(*words)
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(rf"proa: error: .*{message}.*", done.stderr.strip())
    assert sorted(path.name for path in text.parent.iterdir()) == ["text.txt"] * text.exists()


def test_text_without_search_is_refused(tiny_llama_folder: Path, text: Path, call_proa) -> None:
    done = call_proa("quantize", str(tiny_llama_folder), str(text.parent / "out"), "--text", "x")
    assert done.returncode == 2
    assert "--text: weighs what --search looks for; give --search too" in done.stderr


def test_quantised_model_is_refused_before_the_text_is_computed(
    tiny_llama_folder: Path, text: Path, call_proa
) -> None:
    once = text.parent / "once"
    assert call_proa("quantize", str(tiny_llama_folder), str(once), "--search").returncode == 0
    words = ["quantize", str(once), str(text.parent / "twice"), "--search", "--text", str(text)]
    done = call_proa(*words)
    assert done.returncode == 2
    assert "is quantised to 4 bits already" in done.stderr
    assert not (text.parent / "twice").exists()


@pytest.mark.parametrize("with_text", [False, True], ids=["alone", "text"])
def test_model_that_is_not_finite_is_refused(
    with_text: bool, tiny_llama_folder: Path, text: Path, call_proa
) -> None:
    broken, out = text.parent / "broken", text.parent / "out"
    shutil.copytree(tiny_llama_folder, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = float("inf")
    save_file(tensors, broken / "model.safetensors")
    words = ["quantize", str(broken), str(out), "--search"]
    done = call_proa(*words, *(["--text", str(text)] if with_text else []))
    assert done.returncode == 2
    assert "down_proj.weight: NaN or infinity among the values" in done.stderr
    assert sorted(path.name for path in text.parent.iterdir()) == ["broken", "text.txt"]


def test_windows_lie_all_over_the_text() -> None:
    windows = cut_windows(list(range(100_000)), 2048)
    assert {len(window) for window in windows} == {512}
    assert sum(map(len, windows)) == 8192
    assert windows[0][0] == 0
    assert windows[-1][-1] == 99_999
    assert [len(window) for window in cut_windows(list(range(300)), 2048)] == [300]
    assert {len(window) for window in cut_windows(list(range(300)), 64)} == {64}
    with pytest.raises(UserError, match=f"has 255 tokens; at least {MIN_TOKENS}"):
        cut_windows(list(range(255)), 2048)
