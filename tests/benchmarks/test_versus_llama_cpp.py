"""The comparison with llama.cpp, with scripts in place of its tools."""

import json
from pathlib import Path

import pytest

from benchmarks.llama_cpp import TOOLS, Variant, batched_bench, find_tools, make_model
from benchmarks.report import BenchmarkFailed
from benchmarks.versus_llama_cpp import PREFILL, main, make_target, pick_contenders

FAST = Variant(format="Q4_0", flash_attention="on")
SLOW = Variant(format="Q4_1", flash_attention="off")
LOAD = {"streams": (1, 8), "prompt_tokens": 4, "new_tokens": 2, "threads": 1}


def make_tool(path: Path, script: str) -> None:
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)


def test_pick_contenders_keeps_a_variant_that_is_good_at_one_load() -> None:
    peers = {
        FAST: {"1": [100.0], "8": [50.0]},
        SLOW: {"1": [10.0], "8": [60.0]},
        Variant(format="Q4_K_M", flash_attention="on"): {"1": [70.0], "8": [40.0]},
    }
    assert pick_contenders(peers, ["1", "8"]) == [FAST, SLOW]


@pytest.mark.parametrize(
    ("load", "required", "measured"),
    [("1", 1.7, 200 / 90), ("8", 2.5, 200 / 90), (PREFILL, 1.3, 200 / 90), ("4", 0.0, 200 / 90)],
)
def test_make_target_takes_the_best_median(load: str, required: float, measured: float) -> None:
    peers = {FAST: {load: [80.0, 90.0, 100.0]}, SLOW: {load: [500.0, 60.0, 60.0]}}
    target = make_target(load, [100.0, 200.0, 300.0], peers)
    assert target.required == required
    assert target.measured == pytest.approx(measured)
    assert "Q4_0 fa=on" in target.detail


@pytest.mark.parametrize("place", [".", "bin", "build/bin"])
def test_find_tools_looks_where_builds_put_them(place: str, tmp_path: Path) -> None:
    folder = tmp_path / place
    folder.mkdir(parents=True, exist_ok=True)
    assert find_tools(tmp_path) is None
    for tool in TOOLS:
        make_tool(folder / tool, "")
    assert find_tools(tmp_path) == folder


def test_make_model_converts_once_and_takes_the_source_as_it_is(tmp_path: Path) -> None:
    source = tmp_path / "model.Q4_1.gguf"
    source.write_text("weights")
    make_tool(tmp_path / "llama-quantize", 'cp "$2" "$3"; echo "$4" >> "$3"')
    assert make_model(tmp_path, source, "Q4_1", tmp_path / "made") == source
    made = make_model(tmp_path, source, "Q4_0", tmp_path / "made")
    assert made.name == "model.Q4_0.gguf"
    assert made.read_text() == "weightsQ4_0\n"
    made.write_text("kept")
    assert make_model(tmp_path, source, "Q4_0", tmp_path / "made").read_text() == "kept"


def test_batched_bench_leaves_the_warm_up_out(tmp_path: Path) -> None:
    rows = [{"pl": pl, "speed_tg": tg, "speed_pp": 9.0} for pl, tg in ((1, 1), (1, 5), (8, 7))]
    lines = "".join(f"echo '{json.dumps(row)}'\n" for row in rows)
    make_tool(tmp_path / "llama-batched-bench", f"echo noise\n{lines}")
    assert batched_bench(tmp_path, tmp_path / "m", flash_attention="on", **LOAD) == rows[1:]


def test_batched_bench_refuses_a_load_that_is_left_out(tmp_path: Path) -> None:
    make_tool(tmp_path / "llama-batched-bench", """echo '{"pl": 1}'; echo '{"pl": 1}'""")
    with pytest.raises(BenchmarkFailed, match="did not run every load"):
        batched_bench(tmp_path, tmp_path / "m", flash_attention="on", **LOAD)


def test_versus_llama_cpp_refuses_a_folder_without_tools(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--llama-dir", str(tmp_path)]) == 1
    assert "holds no llama-batched-bench" in capsys.readouterr().err
