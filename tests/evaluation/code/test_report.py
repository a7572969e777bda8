"""Figures of code evaluations, by hand."""

from pathlib import Path

import pytest

from evaluation.code.plots import plot_pass_at_k
from evaluation.code.report import choose_ks, summarise, to_markdown


def results(*passed: str, plus: bool = False) -> list[dict[str, object]]:
    """Return results of tasks: one letter a sample, `p` passed, `b` passed the base tests only."""
    return [
        {
            "task_id": str(task),
            "sample": sample,
            "passed": letter in "pb",
            "result": "passed" if letter in "pb" else "NameError",
            **({"plus_passed": letter == "p", "plus_result": "x" if letter != "p" else "passed"}
               if plus else {}),
        }
        for task, letters in enumerate(passed)
        for sample, letter in enumerate(letters)
    ]  # fmt: skip


def test_pass_at_k_is_the_mean_over_tasks() -> None:
    summary = summarise({"a": results("pfff", "ffff", "pppp")}, None)
    figures = summary["arms"]["a"]["base"]
    assert (figures["tasks"], figures["samples"]) == (3, 4)
    assert figures["pass_at"]["1"]["value"] == pytest.approx((0.25 + 0 + 1) / 3)
    assert figures["pass_at"]["4"]["value"] == pytest.approx(2 / 3)
    assert figures["results"] == {"NameError": 7, "passed": 5}
    assert "differences" not in summary
    assert figures["pass_at"]["1"]["low"] < figures["pass_at"]["1"]["value"]


def test_further_tests_have_figures_of_their_own() -> None:
    arm = summarise({"a": results("pb", "bf", plus=True)}, [1])["arms"]["a"]
    assert arm["base"]["pass_at"]["1"]["value"] == 0.75
    assert arm["plus"]["pass_at"]["1"]["value"] == 0.25


def test_differences_are_to_the_first_arm_in_pairs_of_tasks() -> None:
    many = ["pf"] * 30 + ["ff"] * 10
    summary = summarise({"a": results(*many), "b": results(*(["pp"] * 30 + ["ff"] * 10))}, None)
    difference = summary["differences"]["b"]["base"]
    assert difference["1"]["value"] == pytest.approx(0.375)
    assert 0.25 < difference["1"]["low"] < 0.375 < difference["1"]["high"] < 0.5
    assert difference["1"]["p"] < 0.001
    assert difference["2"] == {"value": 0, "low": 0, "high": 0, "p": 1}


def test_ks_are_those_that_the_samples_tell_of() -> None:
    assert choose_ks(1, None) == [1]
    assert choose_ks(15, None) == [1, 5, 10, 15]
    assert choose_ks(7, None) == [1, 5, 7]
    assert choose_ks(10, [3, 30]) == [3]


def test_page_shows_arms_intervals_and_kinds(tmp_path: Path) -> None:
    summary = summarise({"a": results("pf", plus=True), "b": results("pp", plus=True)}, None)
    page = to_markdown(summary, "HumanEval")
    assert page.startswith("# HumanEval\n\n## Tests of the data set\n")
    assert "| `a` | 1 | 2 | 50.00 [50.0, 50.0] | 100.00 [100.0, 100.0] |" in page
    assert "| `b` | +50.00 [+50.00, +50.00], p < 0.001 |" in page
    assert "| `a` | 75.0 |" not in page
    assert "| `a` | 50.0 | 50.0 |" in page
    plot_pass_at_k(summary, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000
