"""What the benchmark scripts share: running `proa`, tables against targets, result files."""

import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from serve.machine import describe_processor
from serve.version import VERSION

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
BUSY_LOAD = 0.5
PROA = (sys.executable, "-m", "serve.cli.main")


class BenchmarkFailed(RuntimeError):
    """A command that a benchmark needs failed; the message says which and how."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One measured figure and what it must reach.

    Attributes:
        name: what was measured.
        required: the bound.
        measured: the figure, in the bound's unit.
        is_ceiling: the figure must not exceed the bound; else it must reach it.
        unit: of both, such as "x" for a ratio.
        detail: the figures it comes from.
    """

    name: str
    required: float
    measured: float
    is_ceiling: bool = False
    unit: str = "x"
    detail: str = ""

    @property
    def is_met(self) -> bool:
        """Whether the figure reaches the bound."""
        if self.is_ceiling:
            return self.measured <= self.required
        return self.measured >= self.required

    def as_json(self) -> dict[str, Any]:
        """Give the target as a JSON object."""
        return {
            "name": self.name,
            "required": self.required,
            "measured": round(self.measured, 3),
            "unit": self.unit,
            "is_met": self.is_met,
        }


def target_table(targets: Sequence[Target]) -> str:
    """Lay targets out for reading, one a line."""
    width = max(len(target.name) for target in targets)
    lines = [f"{'':<{width}}  {'required':>12}  {'measured':>12}        from"]
    for target in targets:
        sign = "<=" if target.is_ceiling else ">="
        required = f"{sign} {target.required:g} {target.unit}"
        measured = f"{target.measured:.2f} {target.unit}"
        verdict = "ok" if target.is_met else "MISSED"
        lines.append(
            f"{target.name:<{width}}  {required:>12}  {measured:>12}  {verdict:<6}  {target.detail}"
        )
    return "\n".join(lines)


def run_command(
    command: Sequence[object],
    *,
    cwd: Path = ROOT,
    is_quiet: bool = False,
    with_messages: bool = False,
    environ: Mapping[str, str] | None = None,
) -> str:
    """Run a command and return its standard output.

    Args:
        command: program and arguments; paths are fine.
        cwd: where to run it.
        is_quiet: show its messages only if it fails.
        with_messages: return its messages after its output.
        environ: its environment; None: this process's.

    Raises:
        BenchmarkFailed: it does not exist or ends with an error.
    """
    words = [str(word) for word in command]
    messages = subprocess.PIPE if is_quiet or with_messages else None
    try:
        done = subprocess.run(
            words, cwd=cwd, env=environ, stdout=subprocess.PIPE, stderr=messages, text=True,
            check=False,
        )  # fmt: skip
    except OSError as error:
        raise BenchmarkFailed(f"cannot run {words[0]}: {error.strerror}") from error
    if done.returncode:
        tail = "".join(f"\n  {line}" for line in (done.stderr or "").splitlines()[-10:])
        raise BenchmarkFailed(f"status {done.returncode} from: {shlex.join(words)}{tail}")
    return done.stdout + done.stderr if with_messages else done.stdout


def say(message: str) -> None:
    """Print a line about progress on the standard error output."""
    print(f"benchmark: {message}", file=sys.stderr, flush=True)


def warn_if_busy() -> None:
    """Say so if something else seems to be running."""
    load = os.getloadavg()[0]
    if load > BUSY_LOAD:
        say(
            f"warning: the load average is {load:.1f}; wait until the machine is idle, a second "
            "busy process can halve any of these figures"
        )


def run_proa_bench(arguments: Sequence[str]) -> dict[str, Any]:
    """Run `proa bench --json` in a process of its own and return its figures."""
    output = run_command([*PROA, "bench", *arguments, "--json"])
    figures: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return figures


def describe_run() -> dict[str, Any]:
    """Describe what was run and where: commit, versions, processor, command."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git_commit(ROOT),
        "versions": {
            "proa": VERSION,
            "python": platform.python_version(),
            "torch": version("torch"),
        },
        "cpu": describe_processor(),
        "kernel": platform.release(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        # Paths say where something lay on one machine; their last part is what counts.
        "command": shlex.join(Path(argument).name for argument in sys.argv),
    }


def git_commit(root: Path) -> str | None:
    """Give the commit checked out in a folder, with "-dirty" if files differ; None outside git."""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def finish(what: str, content: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Keep a result as `<date>_<processor>_<what>.json`, and end the output with it on one line.

    Returns:
        The file.
    """
    date = content["date"][:10]
    name = re.sub(r"\(.*?\)|processor|cpu|@.*", " ", str(content["cpu"]).lower())
    processor = "-".join(re.findall(r"[a-z0-9]+", name))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{date}_{processor}_{what}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    say(f"kept as {path}")
    print(json.dumps(content))
    return path
