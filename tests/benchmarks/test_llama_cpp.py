"""Fetching, building and running llama.cpp, with scripts in place of its tools."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.llama_cpp import (
    AMX,
    PATCHES,
    PLAIN,
    REPACKED,
    SOURCE_FORMAT,
    TOOLS,
    WITHOUT_AMX,
    Load,
    Variant,
    batched_bench,
    find_tools,
    has_amx,
    list_variants,
    make_models,
    patch_sources,
    perplexity,
    tokenize,
)
from benchmarks.report import BenchmarkFailed

LOAD = Load(streams=(1, 8), prompt_tokens=4, new_tokens=2, threads=1)
VARIANT = Variant(format="Q4_0", flash_attention="on", layout=PLAIN, waits_actively=False)


def make_tool(path: Path, script: str) -> None:
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)


@pytest.mark.parametrize("place", [".", "bin", "build/bin"])
def test_find_tools_looks_where_builds_put_them(place: str, tmp_path: Path) -> None:
    folder = tmp_path / place
    folder.mkdir(parents=True, exist_ok=True)
    assert find_tools(tmp_path) is None
    for tool in TOOLS:
        make_tool(folder / tool, "")
    assert find_tools(tmp_path) == folder


def test_make_models_converts_once_and_takes_the_source_as_it_is(tmp_path: Path) -> None:
    source = tmp_path / "model-1.5b.Q4_1.gguf"
    source.write_text("weights")
    make_tool(tmp_path / "llama-quantize", 'cp "$2" "$3"; echo "$4" >> "$3"')
    models = make_models(tmp_path, source, ["Q4_0", "Q4_1"], tmp_path / "made")
    assert list(models) == [SOURCE_FORMAT, "Q4_0"]
    assert models[SOURCE_FORMAT] == source
    made = models["Q4_0"]
    assert made.name == "model-1.5b.Q4_1-as-Q4_0.gguf"
    assert made.read_text() == "weightsQ4_0\n"
    made.write_text("kept")
    again = make_models(tmp_path, source, ["Q4_0"], tmp_path / "made")
    assert again["Q4_0"].read_text() == "kept"


def test_batched_bench_leaves_the_warm_up_out(tmp_path: Path) -> None:
    rows = [{"pl": pl, "speed_tg": tg, "speed_pp": 9.0} for pl, tg in ((1, 1), (1, 5), (8, 7))]
    lines = "".join(f"echo '{json.dumps(row)}'\n" for row in rows)
    make_tool(tmp_path / "llama-batched-bench", f"echo noise\n{lines}")
    assert batched_bench(tmp_path, tmp_path / "m", VARIANT, LOAD) == rows[1:]


def test_batched_bench_runs_the_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    row = """'{"pl": %s}'"""
    rows = "".join(f"echo {row % pl}\n" for pl in (1, 1, 8))
    make_tool(
        tmp_path / "llama-batched-bench",
        f'echo "$@" $OMP_WAIT_POLICY ${WITHOUT_AMX} > {tmp_path}/call\n{rows}',
    )
    batched_bench(tmp_path, tmp_path / "m", VARIANT, LOAD)
    call = (tmp_path / "call").read_text()
    assert "--flash-attn on --no-repack" in call
    assert call.endswith("PASSIVE 1\n")
    as_it_comes = Variant(format="Q4_0", flash_attention="off", layout=AMX)
    batched_bench(tmp_path, tmp_path / "m", as_it_comes, LOAD)
    assert (tmp_path / "call").read_text().endswith("jsonl\n")


def test_batched_bench_refuses_a_load_that_is_left_out(tmp_path: Path) -> None:
    make_tool(tmp_path / "llama-batched-bench", """echo '{"pl": 1}'; echo '{"pl": 1}'""")
    with pytest.raises(BenchmarkFailed, match="did not run every load"):
        batched_bench(tmp_path, tmp_path / "m", VARIANT, LOAD)


def test_list_variants_has_amx_where_the_processor_does() -> None:
    layouts = [variant.layout for variant in list_variants(["Q4_0"], with_amx=False)]
    assert layouts == [REPACKED, REPACKED, PLAIN, PLAIN]
    assert len(list_variants(["Q4_0", "Q4_1"], with_amx=True)) == 12


@pytest.mark.parametrize(("flag", "found"), [("amx_int8", True), ("amx_int8x", False)])
def test_has_amx_reads_the_flags(flag: str, found: bool, tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"model name: amx_int8\nflags\t\t: fpu {flag} avx2\n")
    assert has_amx(cpuinfo) is found


def test_patches_are_made_once(tmp_path: Path) -> None:
    for name, old, _ in PATCHES:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"before\n{old}\nafter\n")
    patch_sources(tmp_path)
    first = [(tmp_path / name).read_text() for name, _, _ in PATCHES]
    patch_sources(tmp_path)
    assert [(tmp_path / name).read_text() for name, _, _ in PATCHES] == first
    assert [text.count("before") for text in first] == [1, 1]
    assert all(new in text for text, (_, _, new) in zip(first, PATCHES, strict=True))


def test_patches_want_the_line(tmp_path: Path) -> None:
    for name, _, _ in PATCHES:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("something else")
    with pytest.raises(BenchmarkFailed, match="no line '_tile_loadconfig"):
        patch_sources(tmp_path)


def test_perplexity_reads_the_estimate_of_all_windows(tmp_path: Path) -> None:
    lines = [
        "perplexity: calculating perplexity over 2 chunks, n_ctx=8",
        "Final estimate: PPL = 19.3041 +/- 0.52",
    ]
    make_tool(tmp_path / "llama-perplexity", "".join(f"echo '{line}' >&2\n" for line in lines))
    text = tmp_path / "t"
    read = {"length": 8, "threads": 1}
    assert perplexity(tmp_path, tmp_path / "m", text, windows=2, **read) == 19.3041
    with pytest.raises(BenchmarkFailed, match=f"did not read 3 windows of {re.escape(str(text))}"):
        perplexity(tmp_path, tmp_path / "m", text, windows=3, **read)


def test_tokenize_reads_the_list(tmp_path: Path) -> None:
    make_tool(tmp_path / "llama-tokenize", "echo '[1, 22, 3]'")
    assert tokenize(tmp_path, tmp_path / "m", tmp_path / "t") == [1, 22, 3]
