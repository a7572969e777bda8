"""Files of arms."""

from pathlib import Path

import pytest

from evaluation.comparison.arms import read_arms
from evaluation.errors import DataFileError
from evaluation.server import Arm

URL = "http://127.0.0.1:8000"


def read(folder: Path, content: str) -> list[Arm]:
    path = folder / "arms.yaml"
    path.write_text(content)
    return read_arms(path, url=URL, key="own", environ={"QWEN": "secret"})


def test_arms_have_their_fields_and_their_server(tmp_path: Path) -> None:
    arms = read(
        tmp_path,
        """
        arms:
          - {model: base, temperature: 0.5, decoding: {strategy: adapt, a: 0.8}}
          - {label: other, model: qwen, url: "http://127.0.0.1:9/v1", key_env: QWEN}
          - {label: open, model: qwen, url: "http://127.0.0.1:9"}
        """,
    )
    assert arms == [
        Arm(label="base", model="base", url=URL, key="own",
            fields={"temperature": 0.5, "decoding": {"strategy": "adapt", "a": 0.8}}),
        Arm(label="other", model="qwen", url="http://127.0.0.1:9", key="secret"),
        # The key of one server is not told to another.
        Arm(label="open", model="qwen", url="http://127.0.0.1:9", key=""),
    ]  # fmt: skip


ONE = "{model: a}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "arms must be a list of at least two"),
        ("arms: [{model: a}]", "arms must be a list of at least two"),
        ("[1]", "arms must be a list of at least two"),
        ("arms: [", "line 1: no YAML"),
        ("arms: !!python/object:os.system []", "no YAML"),
        (f"arms: [{ONE}, {ONE}]", 'two arms are labelled "a"; give labels'),
        (f"arms: [{ONE}, 5]", r"arms\[1\]: must be an object, got 5"),
        (f"arms: [{ONE}, {{label: b}}]", r"arms\[1\].model is missing"),
        (f"arms: [{ONE}, {{model: 5}}]", r"arms\[1\].model must be a text, got 5"),
        (f"arms: [{ONE}, {{model: b, url: 'ftp://x'}}]", r"arms\[1\].url: 'ftp://x' is not an"),
        (f"arms: [{ONE}, {{model: b, url: 'http://a:b@c'}}]", r"arms\[1\].url: an address holds"),
        (f"arms: [{ONE}, {{model: b, key_env: GONE}}]", r"arms\[1\].key_env: the variable GONE is"),
        (f"arms: [{ONE}, {{model: b, seed: 1}}]", r"arms\[1\].seed: is the same for all arms"),
        (f"arms: [{ONE}, {{model: b}}]\nmore: 1", "more is unknown"),
    ],
)  # fmt: skip
def test_bad_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataFileError, match=message) as caught:
        read(tmp_path, content)
    assert "secret" not in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match="cannot be read: No such file"):
        read_arms(tmp_path / "no.yaml", url=URL, key="", environ={})
