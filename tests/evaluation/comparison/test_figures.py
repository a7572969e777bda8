"""Effects and verdicts: by hand, and how often they are right in simulations."""

import math
from pathlib import Path

import numpy as np
import pytest

from evaluation.comparison.figures import compare
from evaluation.comparison.plots import plot_effects
from evaluation.comparison.report import to_csv, to_html, to_markdown
from stats.bootstrap import bootstrap_difference
from stats.power import pairs_needed
from stats.proportions import mcnemar_p


def outcomes(*samples: str) -> dict[str, list[float]]:
    """Return outcomes of tasks: one digit a sample."""
    return {str(task): [float(digit) for digit in text] for task, text in enumerate(samples)}


def test_single_samples_are_tested_by_mcnemar() -> None:
    first = outcomes(*["0"] * 12, *["1"] * 2, *["1"] * 6)
    second = outcomes(*["1"] * 12, *["0"] * 2, *["1"] * 6)
    summary = compare({"a": first, "b": second})
    pair = summary["pairs"]["b"]
    assert (pair["test"], pair["only_first"], pair["only_second"]) == ("McNemar", 2, 12)
    assert pair["difference"]["value"] == 0.5
    tail = sum(math.comb(14, k) for k in range(3))
    assert pair["difference"]["p"] == pytest.approx(2 * tail / 2**14)
    assert pair["is_decided"]
    assert pair["more_tasks"] is None


def test_several_samples_are_tested_by_bootstrap_over_tasks() -> None:
    summary = compare(
        {"a": outcomes("10", "00", "11", "01"), "b": outcomes("11", "10", "11", "01")}
    )
    pair = summary["pairs"]["b"]
    assert pair["test"] == "bootstrap"
    assert pair["difference"]["value"] == 0.25
    arm = summary["arms"]["a"]
    assert arm["mean"]["value"] == 0.5
    assert arm["any_of"]["2"]["value"] == 0.75
    assert arm["all_of"]["2"]["value"] == 0.25
    assert arm["any_of"]["1"] == arm["all_of"]["1"] == arm["mean"]


def test_tasks_that_an_arm_lacks_do_not_count() -> None:
    summary = compare({"a": outcomes("1", "0", "1"), "b": {"0": [1.0], "2": [0.0]}})
    assert summary["tasks"] == 2
    assert summary["arms"]["a"]["mean"]["value"] == 1


def test_undecided_pair_says_how_many_more_tasks_it_needs() -> None:
    first = outcomes(*["0"] * 15, *["1"] * 10, *["1"] * 75)
    second = outcomes(*["1"] * 15, *["0"] * 10, *["1"] * 75)
    pair = compare({"a": first, "b": second})["pairs"]["b"]
    assert not pair["is_decided"]
    # (1.96 + 0.84)^2 * variance / effect^2, corrected for the exact test, less what is there.
    variance = (25 - 100 * 0.05**2) / 99
    count = (1.959964 + 0.841621) ** 2 * variance / 0.05**2
    count *= (1 + math.sqrt(1 + 4 / (count * 0.05))) ** 2 / 4
    assert pair["more_tasks"] == pytest.approx(math.ceil(count) - 100, abs=1)


def test_pairing_and_equal_seeds_take_from_the_variance() -> None:
    draws = np.random.default_rng(0)
    first, second = {}, {}
    for task in range(300):
        difficulty = draws.random()
        noise = draws.random(4)
        first[str(task)] = (noise < difficulty).astype(float).tolist()
        second[str(task)] = (noise < min(1, difficulty + 0.05)).astype(float).tolist()
    variance = compare({"a": first, "b": second})["pairs"]["b"]["variance"]
    assert 0.8 < variance["pairing"] < 1
    assert 0.5 < variance["random_numbers"] < 1
    shuffled = {task: draws.permutation(values).tolist() for task, values in second.items()}
    mixed = compare({"a": first, "b": shuffled})["pairs"]["b"]["variance"]
    assert abs(mixed["random_numbers"]) < 0.2


def test_calibration_is_told_apart() -> None:
    arms = {"a": outcomes(*"0101"), "b": outcomes(*"1111"), "a (again)": outcomes(*"0110")}
    summary = compare(arms, calibration="a (again)")
    assert list(summary["pairs"]) == ["b"]
    assert summary["calibration"]["difference"]["value"] == 0


def test_report_is_complete_in_every_form(tmp_path: Path) -> None:
    arms = {
        "a": outcomes("01", "11", "00"), "<b>": outcomes("11", "11", "10"),
        "a (again)": outcomes("10", "11", "00"),
    }  # fmt: skip
    summary = compare(arms, calibration="a (again)")
    plot_effects(summary, tmp_path / "effects.png")
    page = to_markdown(summary, "task", {"Effects": "effects.png"})
    for text in ("# task", "## Against `a`", "## Calibration", "pass^k", "![Effects](effects.png)"):
        assert text in page
    html = to_html(page, tmp_path)
    assert 'src="data:image/png;base64,' in html
    assert "effects.png" not in html
    assert "<code>&lt;b&gt;</code>" in html
    assert "<table>" in html
    rows = to_csv(arms).splitlines()
    assert rows[0] == "arm,task,sample,outcome"
    assert rows[1:3] == ["a,0,0,0", "a,0,1,1"]
    assert len(rows) == 1 + 18


def simulate(count: int, effect: float, draws: np.random.Generator) -> tuple[dict, dict]:
    """Return outcomes of two arms on tasks of all difficulties, with equal random numbers."""
    difficulty, noise = 0.95 * draws.random(count), draws.random(count)
    first = (noise < difficulty).astype(float)
    flip = draws.random(count)
    # Half of the tasks are drawn anew: arms differ in more than their quality.
    other = np.where(flip < 0.5, draws.random(count), noise)
    second = (other < difficulty + effect).astype(float)
    return ({str(i): [v] for i, v in enumerate(first)}, {str(i): [v] for i, v in enumerate(second)})


def test_equal_arms_are_called_different_in_at_most_one_of_twenty_experiments() -> None:
    draws = np.random.default_rng(1)
    called = 0
    for _ in range(1000):
        first, second = simulate(120, 0.0, draws)
        a, b = (sum(x[t][0] for t in x) for x in (first, second))
        only_first = sum(first[t][0] > second[t][0] for t in first)
        only_second = sum(second[t][0] > first[t][0] for t in first)
        assert a - b == only_first - only_second
        called += mcnemar_p(only_first, only_second) < 0.05
    assert called <= 50


def test_bootstrap_calls_equal_arms_different_in_about_one_of_twenty_experiments() -> None:
    draws = np.random.default_rng(2)
    called = 0
    for _ in range(300):
        first, second = simulate(150, 0.0, draws)
        estimate = bootstrap_difference([v[0] for v in first.values()],
                                        [v[0] for v in second.values()])  # fmt: skip
        called += estimate.p < 0.05
    # 5 % of 300 is 15; more than 27 has a probability below 0.002.
    assert called <= 27


def test_difference_of_5_points_is_found_at_the_predicted_number_of_tasks() -> None:
    draws = np.random.default_rng(3)
    pilot = compare(dict(zip("ab", simulate(4000, 0.05, draws), strict=True)))["pairs"]["b"]
    count = pairs_needed(0.05, pilot["deviation"], is_exact=True)
    found = 0
    for _ in range(1000):
        first, second = simulate(count, 0.05, draws)
        only_first = sum(first[t][0] > second[t][0] for t in first)
        only_second = sum(second[t][0] > first[t][0] for t in first)
        found += only_second > only_first and mcnemar_p(only_first, only_second) < 0.05
    # 1,000 experiments: a standard error of 1.3 points.
    assert found / 1000 >= 0.8 - 0.035
