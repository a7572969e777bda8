"""Busy processes run while they are wanted, and no longer."""

import os
import subprocess
import time

import pytest

from benchmarks.busy import busy_processes
from benchmarks.report import BenchmarkFailed


class Recorded(subprocess.Popen[bytes]):
    """Keeps what was started."""

    started: list[subprocess.Popen[bytes]] = []

    def __init__(self, command: list[str]) -> None:
        super().__init__(command)
        self.started.append(self)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    monkeypatch.setattr(Recorded, "started", [])
    monkeypatch.setattr(subprocess, "Popen", Recorded)
    return Recorded.started


def run_until_they_end(started: list[subprocess.Popen[bytes]], limit_s: float) -> None:
    with busy_processes(1, limit_s=limit_s):
        while started[0].poll() is None:
            time.sleep(0.01)


def test_busy_processes_end_with_the_block(started: list[subprocess.Popen[bytes]]) -> None:
    with busy_processes(2, limit_s=60):
        assert [process.poll() for process in started] == [None, None]
    assert [process.returncode for process in started] == [-9, -9]


def test_busy_processes_end_with_their_parent(
    started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with pytest.raises(BenchmarkFailed, match="had ended"):
        run_until_they_end(started, 60)


def test_busy_processes_that_ended_early_are_told(
    started: list[subprocess.Popen[bytes]],
) -> None:
    with pytest.raises(BenchmarkFailed, match="had ended; they run for 0 s"):
        run_until_they_end(started, 0)
