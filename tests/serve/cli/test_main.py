"""The command line as a user meets it: help, version, and one line for every mistake."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from serve.cli.main import COMMANDS, build_parser, main
from serve.config import OPTIONS
from serve.environment import environment_name
from serve.version import VERSION

ROOT = Path(__file__).parents[3]
LOADED = "import sys; print(sorted({m.split('.')[0] for m in sys.modules}))"


@pytest.mark.parametrize("words", [["--help"], ["serve", "--help"], ["chat", "--help"]])
def test_help_loads_neither_torch_nor_a_web_framework(words: list[str]) -> None:
    code = f"import atexit, sys\natexit.register(lambda: exec({LOADED!r}))\n"
    code += f"from serve.cli.main import main\nmain({words!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    loaded = done.stdout.splitlines()[-1]
    assert "'serve'" in loaded
    for heavy in ("torch", "transformers", "fastapi", "uvicorn", "numpy"):
        assert f"'{heavy}'" not in loaded


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_description_and_examples(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert f"proa {command}" in text
    assert "examples:" in text


def test_serve_help_lists_every_option_with_default_and_variable() -> None:
    parser = build_parser("serve")
    text = next(a for a in parser._actions if a.dest == "command").choices["serve"].format_help()
    text = re.sub(r"-\s+(?=[A-Z])", "-", " ".join(text.split()))
    for name, option in OPTIONS.items():
        assert option.help.replace("- ", "-") in text
        assert f"[default: {option.default_text()}; env: {environment_name(name)}]" in text


def test_version_is_the_package_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"proa {VERSION}\n"


def test_no_command_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["srve"], "invalid choice: 'srve'"),
        (
            ["serve", "--prot", "1"],
            "no option --prot; did you mean --port? (see proa serve --help)",
        ),
        (["serve", "--por=1"], "no option --por; did you mean --port?"),
        (["serve", "a", "b"], "unexpected argument 'b'"),
        (["--prot"], "no option --prot (see proa --help)"),
        (["serve", "--insecure"], "no option --insecure"),
        (["serve", "--port", "many"], "--port: 'many' is not a whole number from 0 to 65535"),
        (["serve", "--port"], "expected one argument"),
        (["serve", ""], "MODEL: '' is not a path"),
        (["serve", "--head", "int4"], "--head: 'int4' is not one of int8, nf4, dense"),
        (["serve", "--config", "none.yaml"], "cannot read none.yaml"),
        (["generate", "x", "--temperature", "warm"], "invalid float value: 'warm'"),
        (["generate", "x", "--temperature", "nan"], "--temperature: nan is not a finite number"),
        (["generate", "x", "--system", "y"], "add --chat"),
        (["generate", ""], "the prompt is empty"),
        (["generate", "x", "--decoding", "{"], "--decoding: not a JSON object"),
        (["generate", "x", "--decoding", "{}"], 'needs a "strategy"'),
        (["quantize", "x"], "the following arguments are required: OUT"),
        (["quantize", "x", "tests"], "tests exists already"),
    ],
)
def test_mistake_is_one_line_and_status_2(
    words: list[str], match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(words)
    except SystemExit as stop:
        status = int(stop.code or 0)
    errors = capsys.readouterr().err
    assert status == 2
    assert errors.startswith("proa: error: ")
    assert errors.count("\n") == 1
    assert match in errors


@pytest.mark.parametrize(
    ("variables", "words", "match"),
    [
        ({"PROA_PORT": "x"}, [], "proa: error: PROA_PORT: 'x' is not a whole number"),
        ({}, ["--host", "0.0.0.0"], "proa: error: host: 0.0.0.0 can be reached"),
        ({"PROA_PROT": "1", "PROA_HEAD": "x"}, [], "proa: warning: environment variable PROA_PROT"),
        ({}, ["no/such/folder"], "no/such/folder"),
    ],
    ids=["bad variable", "open address", "unknown variable", "missing model"],
)
def test_server_that_cannot_start_says_why(
    variables: dict, words: list, match: str, run_proa
) -> None:
    done = run_proa("serve", "--port", "0", *words, variables={"HF_HUB_OFFLINE": "1"} | variables)
    assert done.returncode == 2
    assert match in done.stderr
    assert "Traceback" not in done.stderr


def test_unsupported_architecture_is_named_with_the_supported_ones(
    run_proa, tmp_path: Path
) -> None:
    config = {"model_type": "mystery", "architectures": ["MysteryForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    done = run_proa("serve", str(tmp_path), "--port", "0")
    assert done.returncode == 2
    assert "mystery" in done.stderr.lower()
    assert "llama" in done.stderr.lower()
    assert "Traceback" not in done.stderr


def test_port_in_use_is_status_1(run_proa, server) -> None:
    done = run_proa("serve", "--port", str(server.server_port))
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{server.server_port}" in done.stderr


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "out of memory; does the process get enough (ulimit -v)?"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory; does the"),
        (ImportError("x.so: failed to map segment"), "a library cannot be loaded: x.so: failed to"),
        (
            ImportError("\nREAD\nit was: x.so: failed\n\n"),
            "a library cannot be loaded: it was: x.so",
        ),
    ],
    ids=["python", "torch", "library", "talkative-library"],
)
def test_lack_of_memory_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, line: str
) -> None:
    def run(arguments: object) -> int:
        raise error

    monkeypatch.setattr("serve.cli.chat.run", run)
    assert main(["chat"]) == 1
    written = capsys.readouterr().err
    assert written.startswith(f"proa: error: {line}")
    assert written.count("\n") == 1


def test_fault_of_our_own_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: object) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr("serve.cli.chat.run", run)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["chat"])
