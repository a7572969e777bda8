"""Processors and memory, as containers limit them."""

import mmap
import os
import threading
from pathlib import Path

import pytest

from serve.config import OPTIONS
from serve.machine import (
    count_processors,
    free_memory_bytes,
    lower_priority,
    release_mapped_pages,
)
from serve.resolve import TOKENS_PER_SEQUENCE


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", None), ("100000 100000", 1), ("5000 100000", 1), ("", None), ("x y", None)],
)
def test_processors_follow_affinity_and_quota(
    quota: str, expected: int | None, tmp_path: Path
) -> None:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert count_processors(write(tmp_path, cpu__max=quota)) == (expected or allowed)


def test_free_memory_is_what_is_available(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable: 5000 kB\n", encoding="utf-8")
    assert free_memory_bytes(meminfo, tmp_path / "none") == 5000 * 1024
    group = write(tmp_path, memory__max="4000000", memory__current="1000000")
    assert free_memory_bytes(meminfo, group) == 3000000
    assert free_memory_bytes(meminfo, write(tmp_path, memory__max="max")) == 5000 * 1024


def test_free_memory_without_proc_is_positive(tmp_path: Path) -> None:
    assert free_memory_bytes(tmp_path / "none", tmp_path / "none") > 0


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="no smaps here")
@pytest.mark.parametrize("is_written", [False, True], ids=["clean", "written"])
def test_released_pages_keep_their_content(tmp_path: Path, is_written: bool) -> None:
    path = tmp_path.resolve() / "weights"
    path.write_bytes(b"abcd" * 4096)
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY) as view:
        assert view[:4] == b"abcd"
        if is_written:
            view[:4] = b"WXYZ"
        assert release_mapped_pages(tmp_path.resolve()) == (0 if is_written else 1)
        assert view[:8] == (b"WXYZabcd" if is_written else b"abcdabcd")


def test_nothing_is_released_without_smaps(tmp_path: Path) -> None:
    assert release_mapped_pages(tmp_path, tmp_path / "none") == 0


def test_help_tells_the_automatic_cache_size() -> None:
    assert f"auto is {TOKENS_PER_SEQUENCE} for each" in OPTIONS["kv_cache_tokens"].help


def test_priority_is_lowered_for_one_thread_only() -> None:
    found: list[int] = []

    def work() -> None:
        lower_priority()
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [19]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before
