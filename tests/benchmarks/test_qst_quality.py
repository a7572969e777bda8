"""Side networks against QLoRA: which runs are missing, what is kept, what is reported."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.qst_quality import (
    CONTENDERS,
    QLORA,
    SEEDS,
    draw,
    keep_run,
    next_run,
    read_runs,
    tables,
    tuned,
)
from benchmarks.qst_quality_worker import Settings, read_parts

COMMON = {"data": "chats", "quantization": "none", "steps": 4, "num_evaluated": 8}
FORK = "fork of 4 layers"


def make_run(
    contender: str = QLORA, *, seed: int = 0, rate: float = 0.1, loss: float = 2.0, **parts: Any
) -> dict[str, Any]:
    point = {
        "examples": 32,
        "seconds": 9.0,
        "validation": {"loss": loss},
        "held_out": {"loss": loss},
    }
    start = {**point, "examples": 0, "held_out": {"loss": 3.0}}
    return {
        **COMMON, "contender": contender, "seed": seed, "learning_rate": rate,
        "curve": [start, {**point, **parts}], "memory_above_start_bytes": 5e6,
        "trainable_parameters": 1000, "median_step_s": 1.0,
    }  # fmt: skip


def test_rates_come_first_and_the_best_gets_the_other_seeds() -> None:
    runs: list[dict[str, Any]] = []
    losses = {0.1: 2.0, 0.2: 1.5, 0.3: 1.8}
    common = {**COMMON, "contender": QLORA}
    seen = []
    while missing := next_run(runs, common, tuple(losses)):
        seed, rate = missing
        seen.append(missing)
        runs.append(make_run(seed=seed, rate=rate, loss=losses[rate]))
    assert seen == [(0, 0.1), (0, 0.2), (0, 0.3), (1, 0.2), (2, 0.2)]
    assert [run["seed"] for run in tuned(runs, data="chats", contender=QLORA)] == list(SEEDS)


def test_runs_are_kept_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "results" / "kept.json"
    assert read_runs(path) == []
    for seed in SEEDS:
        keep_run(make_run(seed=seed), path)
    assert [run["seed"] for run in read_runs(path)] == list(SEEDS)
    assert [child.name for child in path.parent.iterdir()] == ["kept.json"]


def test_tables_say_median_range_and_distance(tmp_path: Path) -> None:
    runs = [make_run(seed=s, loss=loss) for s, loss in enumerate((2.0, 2.2, 2.1))]
    runs += [make_run(FORK, seed=s, loss=loss) for s, loss in enumerate((2.0, 2.31, 2.31))]
    text = tables(runs)
    assert "| QLoRA | 3 | 0.1 | 2.100 (2.000 .. 2.200) | +0.0 % | 1,000 | 5 MB |" in text
    assert "| fork of 4 layers | 3 | 0.1 | 2.310 (2.000 .. 2.310) | +10.0 % |" in text
    assert "Before training: 3.000." in text
    draw(runs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_accuracy_is_told_where_there_is_one() -> None:
    runs = [make_run(held_out={"loss": 0.5, "accuracy": 0.875})]
    assert "| 0.500 (0.500 .. 0.500) | +0.0 % | 87.5 % |" in tables(runs)


def test_contenders_are_forms_of_a_side_network() -> None:
    from adapters.qst.config import from_fields

    forms = [from_fields(fields) for fields in CONTENDERS.values() if fields is not None]
    assert [(form.side_attention, form.side_layers) for form in forms] == [
        ("own", None), ("base", 4), ("base", 8), ("base", 15),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "tsv"])
def test_parts_do_not_overlap_and_do_not_depend_on_the_seed(
    kind: str, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / f"data.{kind}"
    if kind == "tsv":
        rows = [f"sentence {i}\t{i % 2}" for i in range(30)]
        path.write_text("sentence\tlabel\n" + "\n".join(rows) + "\n", encoding="utf-8")
    else:
        lines = [f'{{"prompt": "number {i}", "completion": "is {i}"}}' for i in range(30)]
        path.write_text("\n".join(lines), encoding="utf-8")
    found = []
    for seed in (0, 1):
        settings = Settings(
            data=str(path), qst=None, learning_rate=1e-3, seed=seed, steps=1, num_evaluated=6
        )
        found.append(read_parts(settings, tiny_llama_folder))
    train, parts, labels = found[0]
    assert found[0] == found[1]
    assert len(labels) == (2 if kind == "tsv" else 0)
    everything = [tuple(e.token_ids) for part in (train, *parts.values()) for e in part]
    assert len(set(everything)) == len(everything) == 30
    assert [len(part) for part in parts.values()] == [6, 6]
