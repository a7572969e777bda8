"""The comparison with llama.cpp, with scripts in place of its tools."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import versus_llama_cpp
from benchmarks.llama_cpp import PLAIN, REPACKED, SOURCE_FORMAT, TOOLS, Load, Variant
from benchmarks.report import BenchmarkFailed
from benchmarks.versus_goals import Figure, bounds_for, make_targets, parse_goal
from benchmarks.versus_llama_cpp import PARTS, main, parse_parts
from benchmarks.versus_speed import (
    OTHERS,
    PREFILL,
    Other,
    Peer,
    Proa,
    against_best,
    pick_contenders,
    qualify,
)

FAST = Variant(format="Q4_0", flash_attention="on")
SLOW = Variant(format=SOURCE_FORMAT, flash_attention="off", layout=PLAIN)
OTHER = Variant(format="IQ4_NL", flash_attention="on")
LOAD = Load(streams=(1, 8), prompt_tokens=4, new_tokens=20, threads=1)
SMALL, LARGE = 135_000_000, 1_500_000_000


def make_tool(path: Path, script: str) -> None:
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)


def test_pick_contenders_keeps_the_best_of_each_load() -> None:
    worst = replace(OTHER, layout=PLAIN)
    peers = {
        FAST: {"1": [100.0], "8": [50.0]},
        worst: {"1": [20.0], "8": [40.0]},
        SLOW: {"1": [10.0], "8": [60.0]},
        OTHER: {"1": [70.0], "8": [45.0]},
    }
    assert pick_contenders(peers, ["1", "8"]) == [FAST, SLOW, OTHER]
    assert pick_contenders(peers, ["1", "8"], per_load=1) == [FAST, SLOW]


def test_against_best_takes_the_best_median() -> None:
    peers = {FAST: {"1": [80.0, 90.0, 100.0]}, SLOW: {"1": [500.0, 60.0, 60.0]}}
    figure = against_best("1", [100.0, 200.0, 300.0], peers)
    assert figure.value == pytest.approx(200 / 90)
    assert "Q4_0 fa=on repacked" in figure.detail


def test_qualify_runs_every_variant_on_few_tokens(tmp_path: Path) -> None:
    rows = [{"pl": pl, "speed_tg": tg, "speed_pp": 9.0} for pl, tg in ((1, 1), (1, 5), (8, 7))]
    lines = "".join(f"echo '{json.dumps(row)}'\n" for row in rows)
    make_tool(tmp_path / "llama-batched-bench", f'echo "$@" >> {tmp_path}/calls\n{lines}')
    peer = Peer(tools=tmp_path, models={"Q4_0": tmp_path / "q", SOURCE_FORMAT: tmp_path / "s"})
    found = qualify(peer, [FAST, SLOW], LOAD)
    assert found[FAST] == found[SLOW] == {"1": [5], "8": [7], PREFILL: [9.0]}
    first, second = (tmp_path / "calls").read_text().splitlines()
    assert "-ntg 16" in first
    assert f"--model {tmp_path}/q" in first
    assert f"--model {tmp_path}/s" in second


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_asked_by_their_own_interpreter(tmp_path: Path, name: str) -> None:
    make_tool(tmp_path / "python", 'test -f "$2"; echo $?; echo "{\\"prefill\\": $4, \\"1\\": $5}"')
    other = Other(name=name, python=tmp_path / "python", model=Path("m.gguf"))
    assert other.rates(LOAD) == {"prefill": 1, "1": 4}


def test_proa_is_told_what_was_asked_for() -> None:
    proa = Proa(source=Path("m.gguf"), given={"quantization": "none", "kv_cache_dtype": "float32"})
    expected = ["m.gguf", "--quantization", "none", "--kv-cache-dtype", "float32"]
    assert proa.arguments == expected


@pytest.mark.parametrize(
    ("parameters", "decode_8", "has_memory"),
    [(SMALL, 3.0, False), (LARGE, 2.0, True)],
    ids=["small", "large"],
)
def test_bounds_are_those_of_the_size(parameters: int, decode_8: float, has_memory: bool) -> None:
    bounds = bounds_for(parameters, {})
    assert bounds["decode_8"] == decode_8
    assert bounds["perplexity"] == 0.1
    assert ("memory" in bounds) is has_memory


def test_targets_are_what_was_measured_and_has_a_bound() -> None:
    measured = {
        name: Figure(value=2.5, detail="") for name in ("memory", "decode_4", "ready", "decode_8")
    }
    targets = make_targets(measured, bounds_for(SMALL, {"decode_8": 2.5, "ready": 2.0}))
    assert [(t.name, t.required, t.is_met) for t in targets] == [
        ("decode, 8 streams", 2.5, True),
        ("ready, first start", 2.0, False),
    ]


@pytest.mark.parametrize("text", ["decode_1", "decode_1=x", "speed=2", "decode_1=-1", "ready=nan"])
def test_parse_goal_refuses(text: str) -> None:
    with pytest.raises(versus_llama_cpp.argparse.ArgumentTypeError, match="is not NAME=NUMBER"):
        parse_goal(text)


def test_parse_goal_and_parts() -> None:
    assert parse_goal("decode_1=1.5") == ("decode_1", 1.5)
    assert parse_parts("perplexity,decode") == ("decode", "perplexity")
    with pytest.raises(versus_llama_cpp.argparse.ArgumentTypeError, match="'speed' is none of"):
        parse_parts("decode,speed")


class Scripted:
    """Stands for `Comparison`: one part measures, one fails."""

    def __init__(self, options: object) -> None:
        self.options = options
        self.source = Path("Some-135M.Q4_1.gguf")
        self.facts = type("Facts", (), {"num_parameters": SMALL})

    def sampler(self) -> object:
        return {"sampler": Figure(value=0.97, detail="97 against 100")}, {"rounds": 1}

    def start(self) -> object:
        raise BenchmarkFailed("no server")


@pytest.mark.parametrize(
    ("parts", "goals", "status"),
    [
        ("sampler", [], 0),
        ("sampler", ["--goal", "sampler=0.98"], 1),
        ("sampler,start", [], 1),
    ],
    ids=["reached", "missed", "failed"],
)
def test_main_keeps_what_was_measured(
    parts: str,
    goals: list[str],
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(versus_llama_cpp, "Comparison", Scripted)
    monkeypatch.setattr(versus_llama_cpp, "PARTS", {**PARTS, "sampler": Scripted.sampler,
                                                    "start": Scripted.start})  # fmt: skip
    assert main(["--parts", parts, *goals, "--output-dir", str(tmp_path)]) == status
    (path,) = tmp_path.iterdir()
    wanted = f"versus_llama_cpp_some-135m-q4-1_{parts.replace(',', '_')}.json"
    assert path.name.endswith(wanted)
    content = json.loads(path.read_text())
    assert content["sampler"] == {"rounds": 1}
    assert content["targets"][0]["measured"] == 0.97
    assert content["failed"] == (["start"] if "start" in parts else [])
    assert "97 against 100" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--text: the part perplexity reads one"),
        (["--parts", "start", "--repeats", "0"], "--repeats: 0 is less than 1"),
        (["--parts", "start", "--new-tokens", "1"], "--new-tokens: 1 is less than 2"),
        (["--parts", "start", "--gguf", "/none.gguf"], "--gguf: /none.gguf is no file"),
        (["--text", "/none.txt"], "--text: /none.txt is no file"),
    ],
    ids=["no text", "repeats", "new tokens", "gguf", "text"],
)
def test_main_refuses(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_main_refuses_a_folder_without_tools(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--llama-dir", str(tmp_path), "--parts", "start"]) == 1
    assert f"lacks one of {TOOLS}" in capsys.readouterr().err


def test_layouts_are_told_apart() -> None:
    assert str(FAST) == f"Q4_0 fa=on {REPACKED}"
    assert str(replace(SLOW, waits_actively=False)) == "the file fa=off plain passive"
