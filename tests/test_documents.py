"""What the documents say is what the code does."""

import argparse
import json
import re
import shlex
from pathlib import Path

import pytest

from decoding import STRATEGIES, TOKEN_CLASSES
from decoding.options import options_of as decoding_options_of
from models.families import FAMILIES
from serve.api.app import create_app
from serve.api.schema import (
    UNSUPPORTED_FIELDS,
    ChatBody,
    CompareBody,
    ComparisonArm,
    CompletionBody,
    GenerationBody,
    VoteBody,
)
from serve.cli.main import COMMANDS, build_parser
from serve.config import OPTIONS, build_config, read_file
from serve.environment import environment_name
from serve.version import VERSION

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(p for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")] if p.is_file())
README = (ROOT / "README.md").read_text(encoding="utf-8")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def shell_lines(text: str) -> list[list[str]]:
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").split("\n")
    return [shlex.split(line, comments=True) for line in lines if re.match(r"(proa|make) ", line)]


COMMAND_LINES = {
    " ".join(words): words
    for path in DOCUMENTS
    for words in shell_lines(path.read_text(encoding="utf-8"))
}


def test_readme_is_short() -> None:
    assert len(README.splitlines()) < 200


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_are_ascii(path: Path) -> None:
    assert path.read_text(encoding="utf-8").isascii()


@pytest.mark.parametrize("line", [line for line in COMMAND_LINES if line.startswith("proa ")])
def test_documented_commands_parse(line: str) -> None:
    words = COMMAND_LINES[line][1:]
    arguments = build_parser(words[0]).parse_args(words)
    assert arguments.command == words[0]
    given = {n: v for n, v in vars(arguments).items() if n in OPTIONS}
    if words[0] == "serve":
        build_config(given, environ={})


@pytest.mark.parametrize("line", [line for line in COMMAND_LINES if line.startswith("make ")])
def test_documented_make_targets_exist(line: str) -> None:
    makefile = read("Makefile")
    for word in COMMAND_LINES[line][1:]:
        name = re.escape(word.split("=")[0])
        pattern = rf"\$\((if )?{name}\b" if "=" in word else rf"^{name}:"
        assert re.search(pattern, makefile, re.MULTILINE), word


def test_every_command_is_in_the_readme() -> None:
    for command in COMMANDS:
        assert f"proa {command}" in README


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_in_help_parse(command: str) -> None:
    parser = build_parser(command)
    action = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    text = action.choices[command].format_help()
    num_examples = 0
    for line in text.replace("\\\n", " ").splitlines():
        found = re.search(r"^  (?:.*\| |PROA_\w+=\S+ )?(proa .*)$", line)
        if found:
            words = shlex.split(re.split(" {3,}", found[1])[0])[1:]
            assert build_parser(words[0]).parse_args(words).command == words[0]
            num_examples += 1
    assert num_examples


def test_configuration_lists_every_option_with_its_default() -> None:
    text = read("docs/configuration.md")
    rows = {}
    for cells in re.findall(r"^\| (`.*) \|$", text, re.MULTILINE):
        flag, variable, default, words = cells.split(" | ", 3)
        rows[flag.strip("`")] = (variable.strip("`"), default, words)
    assert len(rows) == len(OPTIONS)
    for name, option in OPTIONS.items():
        row = rows[name.upper() if option.is_positional else option.flag]
        assert row[:2] == (environment_name(name), option.default_text())
        assert row[2].startswith(option.help)


def test_configuration_example_is_a_valid_file(tmp_path: Path) -> None:
    path = tmp_path / "proa.yaml"
    path.write_text(blocks(read("docs/configuration.md"), "yaml")[0], encoding="utf-8")
    assert len(read_file(path)) == 5


@pytest.mark.parametrize("name", STRATEGIES)
def test_decoding_lists_every_parameter_with_its_default(name: str) -> None:
    text = read("docs/decoding.md")
    section = re.search(rf"^## {name}\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    assert section is not None
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", section[1], re.MULTILINE))
    options = decoding_options_of(STRATEGIES[name])
    defaults = {}
    for field, (_, default) in options.items():
        plain = list(default) if isinstance(default, tuple) else default
        defaults[field] = plain if isinstance(plain, str) else json.dumps(plain)
    assert rows == defaults


def test_decoding_lists_every_token_class() -> None:
    for name in TOKEN_CLASSES:
        assert f"| `{name}` |" in read("docs/decoding.md")


def test_api_names_every_field() -> None:
    text = read("docs/api.md")
    bodies = (ChatBody, CompletionBody, CompareBody, ComparisonArm, VoteBody)
    fields = {field for body in bodies for field in body.model_fields}
    assert [name for name in sorted(fields) if f"`{name}`" not in text] == []
    section = text.split("## Fields without effect")[1].split("## ")[0]
    schema = GenerationBody.model_json_schema()["properties"]
    harmless = [name for name in schema if "Accepted" in schema[name].get("description", "")]
    assert len(harmless) > 4
    assert [name for name in harmless if f"`{name}`" not in section] == []
    section = text.split("## Refused fields")[1].split("## ")[0]
    named = set(re.findall(r"`(\w+)`", section))
    assert set(UNSUPPORTED_FIELDS) - set(CompletionBody.model_fields) == named


@pytest.mark.parametrize("document", ["README.md", "docs/api.md"])
def test_every_endpoint_is_named(document: str) -> None:
    from types import SimpleNamespace

    from serve.api.settings import ApiSettings

    stats = SimpleNamespace()
    backend = SimpleNamespace(stats=lambda: stats, vocab_size=1, max_context_tokens=1)
    app = create_app(backend, None, settings=ApiSettings(model_id="m"))  # type: ignore[arg-type]
    text = read(document)
    for path in app.openapi()["paths"]:
        assert path.replace("{model_id}", "{id}").removesuffix("/{id}") in text


def test_every_family_is_in_the_readme() -> None:
    names = {"Llama": "Llama", "Mistral": "Mistral", "Qwen2": "Qwen2", "Qwen3": "Qwen3",
             "OPT": "OPT", "Phi": "Phi-2", "GPTNeoX": "GPT-NeoX"}  # fmt: skip
    row = next(line for line in README.splitlines() if line.startswith("| architectures"))
    assert {f"{name}ForCausalLM" for name in names} == set(FAMILIES)
    assert [name for name in names.values() if name not in row] == []


def test_changelog_begins_with_the_version() -> None:
    found = re.search(r"^## (\S+)", read("CHANGELOG.md"), re.MULTILINE)
    assert found is not None
    assert found[1] == VERSION


def test_ci_runs_all_tests() -> None:
    assert "\nmake test\n" in read(".ci/run")
    assert '-m ""' in read("Makefile")
    assert (ROOT / ".ci/run").stat().st_mode & 0o111
