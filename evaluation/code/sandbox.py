"""A sandbox for programs that a model wrote: bubblewrap, else Linux user namespaces.

A program sees the Python that runs this, the system's libraries and 16 MB of memory as a scratch
folder; no other file, no network, no other process. It starts no process of its own.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evaluation
from evaluation.code.sandboxed import jail

PASSED = "passed"
TIMEOUT = "Timeout"
KILLED = "Killed"

_PACKAGE = Path(evaluation.__file__).parent
_ROOT_INSIDE = "/proa"
_START = (
    "import json, sys; sys.path.insert(0, sys.argv[1]); "
    "from evaluation.code.sandboxed.{name} import main; main(json.loads(sys.argv[2]))"
)
_SYSTEM_FOLDERS = ("/usr", "/bin", "/lib", "/lib64", "/etc/alternatives")
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/tmp",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    # A thread each takes address space, and no program is told apart by how many it has.
    "OPENBLAS_NUM_THREADS": "1",
}
_JUDGE_CPU_S = 60
_JUDGE_MEMORY_BYTES = 4 * 2**30
_START_S = 10.0
_MAX_VERDICT_BYTES = 10_000


class SandboxError(RuntimeError):
    """There is no sandbox here, or it does not start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one program may use.

    Attributes:
        cpu_s: whole seconds of processor time, at least 1. Three times as long by the clock.
        memory_bytes: of address space.
    """

    cpu_s: int = 5
    memory_bytes: int = 2**31


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A program and its tests.

    Attributes:
        program: the source.
        setup: source whose names the tests may use; the program does not see it.
        tests: sources, run in turn until one fails.
        names: what the tests use of the program.
    """

    program: str
    setup: str = ""
    tests: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """How a program did.

    Attributes:
        kind: `passed`; the class of the error, AssertionError for a wrong result; `Timeout`;
            `Killed`: the system ended it; `Exit`: it ended itself.
        stage: `load` or `test`, where it failed.
    """

    kind: str
    stage: str | None = None

    @property
    def passed(self) -> bool:
        """Whether all tests passed."""
        return self.kind == PASSED


class Sandbox:
    """Runs programs, each in a sandbox of its own; for any number of threads.

    Args:
        tool: `bubblewrap` or `unshare`; None takes the first that works here.

    Raises:
        SandboxError: none works; the message says why and what to install.
    """

    def __init__(self, tool: str | None = None) -> None:
        reasons = []
        for name in _TOOLS if tool is None else (tool,):
            self.tool = name
            try:
                self._try_out()
                return
            except SandboxError as error:
                reasons.append(f"{name}: {error}")
        raise SandboxError(
            "no sandbox for generated code works here; install bubblewrap (apt-get install "
            f"bubblewrap) or allow user namespaces ({'; '.join(reasons)})"
        )

    def run(self, task: Task, limits: Limits) -> Verdict:
        """Run a program and its tests to the end.

        Raises:
            SandboxError: a sandbox does not start.
        """
        ours, theirs = socket.socketpair()
        with ours, theirs:
            settings = {"cpu_s": limits.cpu_s, "memory_bytes": limits.memory_bytes}
            subject = self._start("subject", theirs.fileno(), settings, stdin=subprocess.DEVNULL)
            settings = {"cpu_s": _JUDGE_CPU_S, "memory_bytes": _JUDGE_MEMORY_BYTES}
            try:
                judge = self._start("judge", ours.fileno(), settings, stdin=subprocess.PIPE)
            except BaseException:
                _end(subject)
                raise
        try:
            verdict = _read_verdict(judge, task, limits)
        finally:
            _end(judge)
            status = _end(subject)
        if verdict is not None and verdict.kind == "Exit":
            if -status in _TIME_SIGNALS or status - 128 in _TIME_SIGNALS:
                return Verdict(kind=TIMEOUT, stage=verdict.stage)
            if status < 0 or status > 128:
                return Verdict(kind=KILLED, stage=verdict.stage)
        return Verdict(kind=TIMEOUT) if verdict is None else verdict

    def _try_out(self) -> None:
        path = shutil.which(_TOOLS[self.tool])
        if path is None:
            raise SandboxError("is not installed")
        self._path = path
        verdict = self.run(Task(program="x = 1", names=("x",), tests=("assert x == 1",)), Limits())
        if not verdict.passed:
            raise SandboxError("does not start")

    def _start(
        self, name: str, fd: int, settings: Mapping[str, int], *, stdin: int
    ) -> "subprocess.Popen[bytes]":
        command = [
            sys.executable, "-E", "-s", "-c", _START.format(name=name), _ROOT_INSIDE,
            json.dumps({"fd": fd, **settings}),
        ]  # fmt: skip
        wrap = _bubblewrap if self.tool == "bubblewrap" else _unshare
        try:
            # A session of its own: a program's signals to its group stay inside.
            return subprocess.Popen(
                [self._path, *wrap(command)], stdin=stdin, stderr=subprocess.DEVNULL,
                env=_ENVIRONMENT,
                stdout=subprocess.DEVNULL if stdin == subprocess.DEVNULL else subprocess.PIPE,
                pass_fds=(fd,), start_new_session=True, cwd="/",
            )  # fmt: skip
        except OSError as error:
            raise SandboxError(f"cannot start: {error.strerror}") from None


_TOOLS = {"bubblewrap": "bwrap", "unshare": "unshare"}
_TIME_SIGNALS = (signal.SIGXCPU,)


def _paths() -> list[tuple[str, str]]:
    """Return the folders that a program sees, and where."""
    system = [folder for folder in _SYSTEM_FOLDERS if os.path.isdir(folder)]
    own = {os.path.realpath(folder) for folder in (sys.base_prefix, sys.prefix)} | {sys.prefix}
    own = {folder for folder in own if not folder.startswith("/usr")}
    shown = [(folder, folder) for folder in (*system, *sorted(own))]
    return [*shown, (str(_PACKAGE), f"{_ROOT_INSIDE}/{_PACKAGE.name}")]


def _bubblewrap(command: Sequence[str]) -> list[str]:
    """Return the arguments of bwrap."""
    words = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    # First, since Python may be installed below it.
    words += ["--size", str(jail.SCRATCH_BYTES), "--tmpfs", "/tmp"]
    for source, target in _paths():
        words += ["--ro-bind", source, target]
    words += ["--dev", "/dev", "--proc", "/proc"]
    words += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"]
    return [*words, *command]


def _unshare(command: Sequence[str]) -> list[str]:
    """Return the arguments of unshare."""
    words = ["--user", "--map-root-user", "--mount", "--pid", "--fork", "--kill-child"]
    words += ["--net", "--ipc", "--uts", "--cgroup"]
    enter = [sys.executable, "-E", "-s", jail.__file__, json.dumps({"paths": _paths()})]
    return [*words, *enter, *command]


def _read_verdict(judge: "subprocess.Popen[bytes]", task: Task, limits: Limits) -> Verdict | None:
    """Return what the judge says; None: it did not say it in time."""
    content = json.dumps(
        {
            "program": task.program,
            "setup": task.setup,
            "tests": list(task.tests),
            "names": task.names,
        }
    ).encode()
    try:
        output, _ = judge.communicate(content, timeout=_START_S + 3 * limits.cpu_s)
    except subprocess.TimeoutExpired:
        return None
    try:
        found: Any = json.loads(output[:_MAX_VERDICT_BYTES])
        return Verdict(kind=str(found["kind"]), stage=found.get("stage"))
    except (ValueError, KeyError, TypeError):
        # The judge itself ran out of its time or memory over what the program gave it.
        return Verdict(kind=KILLED, stage="test")


def _end(process: "subprocess.Popen[bytes]") -> int:
    """End a sandbox with all that is in it, and return its exit status."""
    # A program whose judge is done reads the end of its channel and stops by itself.
    end_s = time.monotonic() + 0.5
    while process.poll() is None and time.monotonic() < end_s:
        time.sleep(0.002)
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    return process.wait()
