"""The program that reads memory, and the sizes it reads."""

import shutil
from pathlib import Path

import pytest

from benchmarks import read_bandwidth
from benchmarks.read_bandwidth import build_reader, last_level_cache_bytes, measure_bandwidth
from benchmarks.report import BenchmarkFailed


@pytest.mark.skipif(shutil.which("cc") is None, reason="takes a C compiler")
def test_bandwidth_is_the_best_of_the_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_bandwidth, "LEAST_BYTES", 2**22)
    monkeypatch.setattr(read_bandwidth, "last_level_cache_bytes", lambda: 0)
    program = build_reader(tmp_path / "made")
    built = program.stat().st_mtime_ns
    assert build_reader(tmp_path / "made").stat().st_mtime_ns == built
    assert measure_bandwidth(program, threads=2) > 0
    program.write_text("#!/bin/sh\necho 7\necho 9\necho 8\n")
    assert measure_bandwidth(program, threads=2) == 9


def test_last_level_cache_is_the_largest(tmp_path: Path) -> None:
    for number, size in enumerate(("48K", "2048K", "32M")):
        (tmp_path / f"index{number}").mkdir()
        (tmp_path / f"index{number}" / "size").write_text(size + "\n")
    assert last_level_cache_bytes(tmp_path) == 32 * 2**20
    assert last_level_cache_bytes(tmp_path / "none") == 0
    (tmp_path / "index0" / "size").write_text("lots")
    with pytest.raises(BenchmarkFailed, match="'lots' is not a size"):
        last_level_cache_bytes(tmp_path)
