"""The examples that ship with the project work as they are."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from adapters.format import read_config

ROOT = Path(__file__).parents[1]
ADAPTER = ROOT / "examples/roleplay/adapter"


def test_example_adapter_is_small_and_says_what_it_is() -> None:
    config = read_config(ADAPTER)
    assert config.method == "qst"
    assert config.base_id == "smollm2"
    assert config.description
    assert config.training["held_out_loss"] < config.training["base_held_out_loss"]
    assert sum(path.stat().st_size for path in ADAPTER.iterdir()) < 10e6


def test_example_card_has_the_figures_of_the_adapter() -> None:
    card = (ROOT / "examples/roleplay/README.md").read_text(encoding="utf-8")
    training = read_config(ADAPTER).training
    assert f"{training['held_out_loss']:.3f}" in card
    assert f"{training['base_held_out_loss']:.3f}" in card


@pytest.mark.model
def test_example_adapter_fits_the_demo_model() -> None:
    command = [sys.executable, "-m", "serve.cli.main", "adapters", "verify", str(ADAPTER)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_data_recipe_splits_without_overlap(tmp_path: Path) -> None:
    source = tmp_path / "roleplay.json"
    entries = [{"instruction": f"i{i}", "input": "", "response": "r"} for i in range(100)]
    source.write_text(json.dumps(entries), encoding="utf-8")
    script = ROOT / "examples/roleplay/prepare_data.py"
    command = [sys.executable, str(script), str(source), str(tmp_path / "out")]
    subprocess.run(command, check=True, capture_output=True)
    parts = [
        [json.loads(line)["instruction"] for line in path.read_text().splitlines()]
        for path in sorted((tmp_path / "out").iterdir())
    ]
    assert [len(part) for part in parts] == [64, 36]
    assert len({*parts[0], *parts[1]}) == 100
