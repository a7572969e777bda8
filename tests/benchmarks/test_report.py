"""What the benchmark scripts share: targets, tables, result files."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.report import (
    BenchmarkFailed,
    Target,
    describe_run,
    finish,
    git_commit,
    run_command,
    target_table,
)


@pytest.mark.parametrize(
    ("is_ceiling", "measured", "is_met"),
    [(False, 2.0, True), (False, 1.9, False), (True, 2.0, True), (True, 2.1, False)],
    ids=["reached", "below", "within", "above"],
)
def test_target_is_met_at_its_bound(is_ceiling: bool, measured: float, is_met: bool) -> None:
    target = Target(name="x", required=2.0, measured=measured, is_ceiling=is_ceiling)
    assert target.is_met is is_met
    assert target.as_json()["is_met"] is is_met


def test_target_table_tells_what_is_missed() -> None:
    slow = Target(name="speed", required=2.0, measured=1.5, detail="3 against 2")
    small = Target(name="memory", required=900.0, measured=800.0, is_ceiling=True, unit="MB")
    lines = target_table([slow, small]).splitlines()
    assert "MISSED" in lines[1]
    assert lines[1].endswith("3 against 2")
    assert "<= 900 MB" in lines[2]
    assert " ok" in lines[2]


def test_run_command_returns_the_output() -> None:
    assert run_command([sys.executable, "-c", "print(1)"]) == "1\n"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["/nowhere/tool"], "cannot run /nowhere/tool: No such file"),
        (
            [sys.executable, "-c", "import sys; sys.exit('because')"],
            r"(?s)status 1 from: .*because",
        ),
    ],
    ids=["missing", "failing"],
)
def test_run_command_says_what_failed(command: list[str], message: str) -> None:
    with pytest.raises(BenchmarkFailed, match=message):
        run_command(command, is_quiet=True)


def test_finish_keeps_the_result_and_prints_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {"date": "2026-01-02T03:04:05+00:00", "cpu": "Some(R) CPU 9 @ 2GHz (2 cores)"}
    path = finish("speed", content, tmp_path)
    assert path.name == "2026-01-02_some-9_speed.json"
    assert json.loads(path.read_text()) == content
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == content


def test_describe_run_has_what_a_result_needs() -> None:
    described = describe_run()
    assert {"date", "commit", "versions", "cpu", "command"} <= set(described)


def test_git_commit_is_none_outside_a_repository(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
