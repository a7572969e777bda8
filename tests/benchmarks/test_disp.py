"""The driver of the pruning benchmark: what it keeps, and what it does not measure twice."""

import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from adapters.format import AdapterConfig, digest, write_adapter
from benchmarks.disp import Bench, Figures, parse_options


@pytest.fixture
def options(tmp_path: Path) -> Namespace:
    for name in ("search", "test"):
        (tmp_path / f"{name}.txt").write_text(name, encoding="utf-8")
    return parse_options([
        "--search-text", str(tmp_path / "search.txt"), "--test-text", str(tmp_path / "test.txt"),
        "--work", str(tmp_path / "work"), "--results", str(tmp_path / "disp.json"),
    ])  # fmt: skip


def write_variant(folder: Path, description: str = "") -> str:
    config = AdapterConfig(
        method="disp", base_id="tiny", base_fingerprint="0" * 64, base_quantization="nf4",
        fields={}, description=description,
    )  # fmt: skip
    write_adapter(folder, config, {})
    return digest(folder)


class ScriptedBench(Bench):
    """Notes which modules would run, and with what."""

    def __init__(self, options: Namespace) -> None:
        super().__init__(options)
        self.calls: list[tuple[str, tuple[object, ...]]] = []

    def module(self, name: str, *words: object) -> dict[str, Any]:
        self.calls.append((name, words))
        return {"perplexity": float(len(self.calls))}


def test_figures_outlive_the_process(tmp_path: Path) -> None:
    path = tmp_path / "disp.json"
    figures = Figures(path)
    figures.begin("perplexity", {"windows": 2})
    figures.keep("perplexity", "disp-20", "abc", {"perplexity": 3.5})
    again = Figures(path)
    again.begin("perplexity", {"windows": 2})
    assert again.has("perplexity", "disp-20", "abc")
    assert not again.has("perplexity", "disp-20", "other")
    assert not again.has("perplexity", "disp-30", "abc")
    assert again.items("perplexity")["disp-20"]["perplexity"] == 3.5
    assert [path.name for path in tmp_path.iterdir()] == ["disp.json"]


def test_other_settings_need_a_new_beginning(tmp_path: Path) -> None:
    figures = Figures(tmp_path / "disp.json")
    figures.begin("heal", {"steps": 100})
    with pytest.raises(SystemExit, match=r"begun with \{'steps': 100\}, now .*--again heal"):
        figures.begin("heal", {"steps": 200})
    figures.drop("heal")
    figures.begin("heal", {"steps": 200})


def test_perplexity_is_measured_once_for_each_variant(options: Namespace) -> None:
    folder = options.work / "disp" / "remove-20"
    write_variant(folder)
    bench = ScriptedBench(options)
    bench.perplexity()
    assert [name for name, _ in bench.calls] == ["perplexity"] * 3  # base, dense base, variant
    assert bench.calls[-1][1][-2:] == ("--variant", folder)
    again = ScriptedBench(options)
    again.perplexity()
    assert again.calls == []
    found = write_variant(folder, "another one")
    again.perplexity()
    assert len(again.calls) == 1
    assert again.figures.items("perplexity")["disp-20"] == {"variant": found, "perplexity": 1.0}


def test_search_goes_on_in_the_folder_that_is_there(
    options: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[object]) -> str:
        commands.append([str(word) for word in command])
        for ratio in (20, 30):
            write_variant(options.work / "disp" / f"remove-{ratio}", str(ratio))
        return ""

    monkeypatch.setattr("benchmarks.disp.run_command", run)
    options.work.joinpath("disp").mkdir(parents=True)
    bench = Bench(options)
    bench.stages["search"]()
    (command,) = commands
    assert command[command.index("--remove") + 1] == "0.2,0.3"
    assert command[-1] == "--resume"
    assert sorted(bench.figures.items("search")) == ["disp-20", "disp-30"]
    Bench(options).stages["search"]()
    assert len(commands) == 1
    shutil.rmtree(options.work)  # what was found is kept beside the figures
    again = Bench(options)
    again.stages["search"]()
    assert len(commands) == 1
    kept = options.results.with_suffix("") / "disp-30"
    assert ("disp-30", kept, digest(kept)) in list(again.found(["disp"], (20, 30)))


def test_speed_is_measured_of_the_variants_that_there_are(options: Namespace) -> None:
    bench = ScriptedBench(options)
    bench.speed("size", rounds=0)
    assert bench.calls.pop() == ("variant_speed", ("--rounds", 0))
    folder = options.work / "disp" / "remove-20"
    found = write_variant(folder)
    bench.speed("decode", rounds=3)
    words = ("--rounds", 3, "--variant", f"disp-20={folder}")
    assert bench.calls == [("variant_speed", words)]
    assert bench.figures.items("decode")["models"]["variant"] == {"disp-20": found}
