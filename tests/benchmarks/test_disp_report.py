"""The report on pruning: it says what the figures say, and nothing where there are none."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.disp import KINDS, RATIOS
from benchmarks.disp_report import MissingFigures, make_report
from benchmarks.disp_tables import Report, goals, winners

RUN = {"date": "2026-01-02T03:04:05+00:00", "cpu": "a processor", "commit": "f" * 40}
BASE = 20.0
# Perplexity at 20 and 30 %: before and after healing.
BEFORE = {"disp": (30.0, 91.0), "shared": (35.0, 82.0), "magnitude": (4e3, 6e3),
          "random": (7e3, float("inf"))}  # fmt: skip
AFTER = {"disp": (23.0, 63.0), "shared": (24.0, 64.0), "magnitude": (97.0, 99.0),
         "random": (47.0, 49.0)}  # fmt: skip


def figures() -> dict[str, Any]:
    def perplexities(values: dict[str, tuple[float, ...]]) -> dict[str, Any]:
        return {
            f"{kind}-{ratio}": {"perplexity": value}
            for kind in KINDS
            for ratio, value in zip(RATIOS, values[kind], strict=True)
        }

    def searched(kind: str, ratios: tuple[int, ...]) -> dict[str, Any]:
        return {
            f"{kind}-{r}": {
                "fields": {"remove_linears": r / 100 + 0.001, "remove_total": r / 125},
                "training": {"ratio_error": -r / 1e4, "seconds": 60.0 * r,
                             "options": {"steps": 300}},
            }
            for r in ratios
        }  # fmt: skip

    models: dict[str, Any] = {
        "base": {"weight_bytes": 90_000_000, "layer_bytes": 60_000_000,
                 "decode": {"tokens_per_s": 100.0, "ratio": 1.0},
                 "prefill": {"tokens_per_s": 900.0, "ratio": 1.0}}
    }  # fmt: skip
    for ratio in RATIOS:
        models[f"disp-{ratio}"] = {
            "own_bytes": 600_000 * (100 - ratio), "folder_bytes": 320_000,
            "decode": {"tokens_per_s": 100.0 + ratio, "ratio": 1 + ratio / 200},
            "prefill": {"tokens_per_s": 900.0 + ratio, "ratio": 1.05},
        }  # fmt: skip
    items = {
        "search": searched("disp", RATIOS),
        "search-shared": searched("shared", RATIOS),
        "one": {"one-30": {}},
        "perplexity": {
            "base": {"perplexity": BASE, "windows": 16, "quantization": "gguf"},
            "base-dense": {"perplexity": 18.5},
            **perplexities(BEFORE),
        },
        "heal": {"base": {"perplexity": 18.0}, **perplexities(AFTER)},
        "heal-long": {"disp-20": {"perplexity": 24.0}},
        "size": {"models": {"models": models}},
        "decode": {"models": {"models": models, "kernels": "native-avx2"}},
    }  # fmt: skip
    return {
        "model": "a model",
        "stages": {
            stage: {
                "settings": {"length": 2048, "training": {"steps": 600}},
                "run": RUN,
                "run_seconds": 1530.0,
                "items": found,
            }
            for stage, found in items.items()
        },
    }


def test_report_states_the_winner_of_each_share() -> None:
    report = Report(figures())
    before, after = winners(report, "perplexity"), winners(report, "heal")
    assert before[0].startswith(
        "at 20 % DISP-LLM has the least perplexity (30.00), then one shared"
    )
    assert before[1].startswith("at 30 % one shared set of residual channels has the least")
    assert after[1] == ("at 30 % random has the least perplexity (49.00), then DISP-LLM (63.00)")
    assert report.missing == []


def test_goals_are_judged_by_the_figures() -> None:
    rows = [line.split(" | ") for line in goals(Report(figures()))[2:]]
    verdicts = {
        cells[0].removeprefix("| "): (cells[1], cells[3].removesuffix(" |")) for cells in rows
    }
    at = "perplexity at {} %, DISP against the best of the others"
    assert verdicts[at.format(20)] == ("30.00 / 35.00", "yes")
    assert verdicts[at.format(30)] == ("91.00 / 82.00", "no")
    assert verdicts["kept parameters off target before rounding, the worst"] == ("0.30 %", "yes")
    assert verdicts["decode, 1 stream, at 20 % against the base"] == ("1.10", "yes")
    what = "perplexity lost at 20 % that healing of 600 steps gives back"
    assert verdicts[what] == ("60 %", "yes")
    assert verdicts["search for one share, minutes (30 %, the whole command)"] == ("25.5", "no")


def test_report_has_text_and_picture(tmp_path: Path) -> None:
    make_report(figures(), tmp_path)
    text = (tmp_path / "disp.md").read_text(encoding="utf-8")
    assert "| DISP-LLM | **30.00** | 91.00 |" in text
    assert "| random | 7,000 | infinite |" in text
    assert "| ours | 30.1 % | 24.0 % | 20.00 | 91.00 | 4.55 |" in text
    assert "| paper, LLaMA-2-7B, windows of 4,096 |  | 30 % | 5.12 | 6.85 | 1.34 |" in text
    assert "16 windows of 2048 tokens" in text
    assert "| DISP-LLM | 70 % | " in text
    assert "600 steps take DISP-LLM at 20 % from 30.00 to 24.00, which gives back 60 %" in text
    assert "not measured" not in text
    assert text.isascii()
    assert (tmp_path / "disp.png").read_bytes().startswith(b"\x89PNG")


def test_missing_figures_are_named(tmp_path: Path) -> None:
    content = figures()
    del content["stages"]["heal"]["items"]["random-30"]
    del content["stages"]["decode"]
    with pytest.raises(MissingFigures, match=r"decode: base; .*decode: models; heal: random-30"):
        make_report(content, tmp_path)
    assert not list(tmp_path.iterdir())
    make_report(content, tmp_path, is_partial=True)
    text = (tmp_path / "disp.md").read_text(encoding="utf-8")
    assert (
        "| decode, 1 stream, at 20 % against the base | not measured | >= 1.1 | not measured |"
        in text
    )
    assert "at 30 % not measured" in text
