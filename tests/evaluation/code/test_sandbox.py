"""Programs run in the sandbox, and every attack on it that we know of."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evaluation.code.sandbox import Limits, Sandbox, SandboxError, Task, Verdict

TOOLS = [
    pytest.param("bubblewrap", marks=pytest.mark.bubblewrap),
    pytest.param("unshare", marks=pytest.mark.unshare),
]
QUICK = Limits(cpu_s=1)


@pytest.fixture(scope="module", params=TOOLS)
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    return Sandbox(request.param)


def run(sandbox: Sandbox, program: str, *tests: str, limits: Limits = QUICK) -> Verdict:
    """Run a program whose function `f` the tests use."""
    return sandbox.run(Task(program=program, tests=tests, names=("f",)), limits)


@pytest.mark.parametrize(
    ("program", "test"),
    [
        ("def f(x): return x + 1", "assert f(1) == 2"),
        ("def f(*a, **k): return a, k", "assert f(1, b={2: 'c'}) == ((1,), {'b': {2: 'c'}})"),
        ("def f(x): return x", "assert f({1, 2}) == {1, 2} and f(b'a') == b'a' and f(1j) == 1j"),
        ("def f(x): return x", "assert f(2**200) == 2**200 and f(True) is True and f(0.1) == 0.1"),
        ("def f(x): return x", "assert str(f(float('nan'))) == 'nan'"),
        ("def f(x): return x", "assert f('\\ud800') == '\\ud800'"),
        ("def f(x): return x", "assert f(frozenset([(1, 'a')])) == {(1, 'a')}"),
        ("def f(x, kind): return isinstance(x, kind)", "assert f(1, int) and not f(1, str)"),
        ("def f():\n yield from (1, 2)", "assert list(f()) == [1, 2]"),
        ("class f:\n def __init__(s, a): s.a = a", "n = f(3); n.a = f(n.a); assert n.a.a == 3"),
        ("from collections import Counter as f", "assert f('aab') == {'a': 2, 'b': 1}"),
        ("import numpy as np\ndef f(): return np.arange(3)", "assert f() == [0, 1, 2]"),
        ("def f(x): return x['a'][0](5)", "assert f({'a': [int]}) == 5"),
        ("def f(): raise KeyError('a')", "try: f()\nexcept KeyError: pass\nelse: assert False"),
        ("print('a' * 10**6)\ndef f(): return 1", "assert f() == 1"),
        ("open('a', 'w').write('b')\ndef f(): return open('/tmp/a').read()", "assert f() == 'b'"),
    ],
)  # fmt: skip
def test_right_program_passes(sandbox: Sandbox, program: str, test: str) -> None:
    assert run(sandbox, program, test) == Verdict(kind="passed")


@pytest.mark.parametrize(
    ("program", "kind", "stage"),
    [
        ("def f(): return 2", "AssertionError", "test"),
        ("def f(): return undefined", "NameError", "test"),
        ("def f(:", "SyntaxError", "load"),
        ("def f():\n\treturn 1\n        return 2", "TabError", "load"),
        ("import nothing", "ModuleNotFoundError", "load"),
        ("class Own(ValueError): pass\ndef f(): raise Own('x')", "Own", "test"),
        ("def g(): return 1", "NameError", "test"),
        ("def f(): return f()", "RecursionError", "test"),
        ("def f(): return None + 1", "TypeError", "test"),
        ("def f(): return [1] < 2", "TypeError", "test"),
        ("def f(): raise UnicodeDecodeError('utf-8', b'', 0, 1, '')", "UnicodeDecodeError", "test"),
        ("", "NameError", "test"),
    ],
)
def test_failure_has_its_kind(sandbox: Sandbox, program: str, kind: str, stage: str) -> None:
    assert run(sandbox, program, "assert f() == 1") == Verdict(kind=kind, stage=stage)


# What a program does, and the verdicts that are right.
ATTACKS = {
    "fork bomb": ("import os\nwhile True: os.fork()", {"PermissionError"}),
    "processes": ("import subprocess\nsubprocess.run(['true'])", {"PermissionError"}),
    "exec": ("import os\nos.execv('/bin/true', ['true'])", {"PermissionError"}),
    "a child left behind": (
        "import os\nif os.fork() == 0:\n os.setsid()\n while True: pass",
        {"PermissionError"},
    ),
    "threads": (
        "import threading, time\n"
        "while True: threading.Thread(target=time.sleep, args=(99,), daemon=True).start()",
        {"RuntimeError", "MemoryError", "Timeout", "Killed"},
    ),
    "10 GB": ("x = bytearray(10 * 2**30)", {"MemoryError"}),
    "10 GB, slowly": ("x = []\nwhile True: x.append(bytearray(2**20))", {"MemoryError", "Timeout"}),
    "10 GB in files": (
        "import os\nfor i in range(10**4): open(f'/tmp/{i}', 'wb').write(bytes(2**20))",
        {"OSError"},
    ),
    "10 GB in one file": ("open('/tmp/a', 'wb').write(bytes(2**28))", {"OSError", "Killed"}),
    "10 GB in anonymous files": ("import os\nos.memfd_create('a')", {"PermissionError"}),
    "10 GB in devices": ("open('/dev/shm/a', 'wb')", {"OSError", "FileNotFoundError"}),
    "endless print": ("while True: print('a' * 10**6)", {"Timeout"}),
    "endless loop": ("while True: pass", {"Timeout"}),
    "endless loop that takes the signal": (
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        {"Timeout", "Killed"},
    ),
    "endless result": ("def f(): return 'a' * 10**8", {"Exit", "MemoryError", "Timeout"}),
    "endless generator": (
        "def f():\n while True: yield 1",
        {"MemoryError", "Timeout", "AssertionError"},
    ),
    "kill of the group": ("import os\nos.kill(0, 9)", {"Killed"}),
    "kill of all": (
        "import os\nos.kill(-1, 9)", {"Killed", "ProcessLookupError", "PermissionError"}
    ),
    "kill of the parent": ("import os\nos.kill(os.getppid(), 9)\nwhile True: pass", {
        "Killed", "Timeout", "Exit", "PermissionError", "ProcessLookupError",
    }),
    "write to /": ("open('/a', 'w')", {"OSError", "PermissionError"}),
    "write to the system": ("open('/usr/a', 'w')", {"OSError", "PermissionError"}),
    "write to the library": (
        "import json\nopen(json.__file__, 'a')",
        {"OSError", "PermissionError"},
    ),
    "read of home": ("import os\nprint(open('/root/.bashrc').read())", {"FileNotFoundError"}),
    "read of /etc": ("open('/etc/passwd').read()", {"FileNotFoundError"}),
    "read of the tests": (
        "import glob\ndef f():\n return [open(p).read() for p in glob.glob('/proc/*/environ')]",
        {"AssertionError", "OSError", "PermissionError"},
    ),
    "network": (
        "import socket\nsocket.create_connection(('127.0.0.1', 22), 3)",
        {"OSError", "ConnectionRefusedError", "TimeoutError"},
    ),
    "names": ("import socket\nsocket.getaddrinfo('example.org', 80)", {"gaierror"}),
    "ptrace": (
        "import ctypes\nif ctypes.CDLL(None).ptrace(0, 0, 0, 0) == -1: raise PermissionError",
        {"PermissionError"},
    ),
    "mount": (
        "import ctypes\n"
        "if ctypes.CDLL(None).mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None): raise PermissionError",
        {"PermissionError"},
    ),
    "namespaces": (
        "import ctypes\nif ctypes.CDLL(None).unshare(0x10000000): raise PermissionError",
        {"PermissionError"},
    ),
    "limits lifted": (
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        {"PermissionError", "ValueError"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_fails(sandbox: Sandbox, name: str) -> None:
    program, kinds = ATTACKS[name]
    started_s = time.monotonic()
    verdict = run(sandbox, program, "assert f() == 1")
    assert verdict.kind in kinds
    assert time.monotonic() - started_s < 60
    assert not left_behind()


def left_behind() -> list[str]:
    """Return the command lines of programs under test that still run after a moment."""
    end_s = time.monotonic() + 5
    while True:
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal():
                try:
                    words = (folder / "cmdline").read_bytes()
                    parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                except OSError:
                    continue
                # Other workers run programs too; orphans are what nobody ends.
                if b"evaluation.code.sandboxed.subject" in words and parent == "1":
                    found.append(words.decode())
        if not found or time.monotonic() > end_s:
            return found
        time.sleep(0.1)


# Programs that would pass if they could fool the tests.
FRAUDS = {
    "exit": "import sys\nsys.exit(0)",
    "hard exit": "import os\nos._exit(0)",
    "exit in the function": "import os\ndef f(): os._exit(0)",
    "exit at the end": "import atexit, os\natexit.register(os._exit, 0)\ndef f(): return 2",
    "equal to all": "class E:\n def __eq__(s, o): return True\ndef f(): return E()",
    "equal to all, as a number": (
        "class E(int):\n def __eq__(s, o): return True\ndef f(): return E(2)"
    ),
    "equal to all, in a list": "class E:\n def __eq__(s, o): return True\ndef f(): return [E()]",
    "never unequal": "class E(float):\n def __ne__(s, o): return False\ndef f(): return E(2)",
    "patched built-ins": (
        "import builtins\nbuiltins.AssertionError = type('A', (Exception,), {})\n"
        "builtins.all = lambda x: True\ndef f(): return 2"
    ),
    "a name of the tests": "def expected(): return 2\ndef f(): return 2",
    "frames": (
        "import sys\ndef f():\n frame = sys._getframe()\n while frame:\n"
        "  frame.f_globals['expected'] = frame.f_locals['expected'] = lambda: 2\n"
        "  frame = frame.f_back\n return 2"
    ),
    "collected objects": (
        "import gc\ndef f():\n for o in gc.get_objects():\n"
        "  if isinstance(o, dict) and 'expected' in o: o['expected'] = lambda: 2\n return 2"
    ),
    "forged verdict": "print('{\"kind\": \"passed\"}', flush=True)\ndef f(): return 2",
    "forged messages": (
        "import os\nfor fd in range(3, 64):\n try: os.write(fd, b'{\"kind\": \"passed\"}\\n' * 9)\n"
        " except OSError: pass\ndef f(): return 2"
    ),
    "messages that are none": (
        "import os\nfor fd in range(3, 64):\n try: os.write(fd, b'\\xff\\x00[[[[\\n' * 9)\n"
        " except OSError: pass\ndef f(): return 2"
    ),
    "closed channel": "import os\nos.closerange(3, 64)\ndef f(): return 2",
    "patched protocol": (
        "from evaluation.code.sandboxed import wire\n"
        "wire.encode = lambda *a: {'kind': 'passed'}\ndef f(): return 2"
    ),
    "patched protocol, with references": (
        "from evaluation.code.sandboxed import wire\n"
        "wire.encode = lambda *a: {'ref': 10**30}\ndef f(): return 2"
    ),
    "an error that the tests expect": "def f(): raise AssertionError('all is well')",
    "an error that ends the tests": "def f(): raise SystemExit(0)",
    "an error like an interrupt": "def f(): raise KeyboardInterrupt",
    "a warning": "def f(): raise GeneratorExit",
}  # fmt: skip


@pytest.mark.parametrize("name", FRAUDS)
def test_fraud_does_not_pass(sandbox: Sandbox, name: str) -> None:
    test = "def expected(): return 1\nassert f() == expected()\nassert all([f() == 1])"
    assert not run(sandbox, FRAUDS[name], test).passed


def test_each_test_runs_until_one_fails(sandbox: Sandbox) -> None:
    program = "def f(x): return x"
    assert run(sandbox, program, "assert f(1) == 1", "assert f(2) == 3").kind == "AssertionError"
    assert run(sandbox, program, "assert f(1) == 1", "assert f(2) == 2").passed


def test_setup_is_known_to_the_tests_and_not_to_the_program(sandbox: Sandbox) -> None:
    task = Task(
        program="def f(x): return helper(x)",
        setup="def helper(x): return x\ndef f(x):\n '''Begin.'''\n",
        tests=("assert helper(1) == 1", "assert f(1) == 1"),
        names=("f",),
    )
    assert sandbox.run(task, QUICK) == Verdict(kind="NameError", stage="test")


def test_sleeper_is_ended_by_the_clock(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluation.code.sandbox._START_S", 1.0)
    started_s = time.monotonic()
    assert run(sandbox, "import time\ntime.sleep(1000)").kind == "Timeout"
    assert time.monotonic() - started_s < 30


def test_program_sees_no_environment_of_ours(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROA_API_KEY", "secret")
    program = "import os\ndef f(): return sorted(os.environ)"
    assert run(sandbox, program, "assert 'PROA_API_KEY' not in f() and 'PATH' in f()").passed


def test_program_sees_no_other_process(sandbox: Sandbox) -> None:
    program = (
        "import os\ndef f():\n"
        " return len([n for n in os.listdir('/proc') if n.isdigit()]) if os.path.isdir('/proc') "
        "else 0"
    )
    assert run(sandbox, program, "assert f() <= 3").passed


def test_no_sandbox_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(SandboxError, match=r"install bubblewrap \(apt-get install bubblewrap\)"):
        Sandbox()


def test_sandbox_that_does_not_start_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(SandboxError, match="bubblewrap: does not start"):
        Sandbox("bubblewrap")


def test_filter_is_refused_on_a_processor_it_does_not_know() -> None:
    code = (
        "import platform; platform.machine = lambda: 'riscv64'\n"
        "from evaluation.code.sandboxed import limits\n"
        "limits.limit(cpu_s=1, memory_bytes=2**30)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "KeyError: 'riscv64'" in done.stderr
