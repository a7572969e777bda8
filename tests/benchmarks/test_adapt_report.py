"""The report of decoding strategies, of figures that are made up."""

import json
from pathlib import Path
from typing import Any

from benchmarks.adapt import FAMILIES, PLAIN, describe, read_outcomes, score
from benchmarks.adapt_report import Report, make, verdict

TASKS = [f"T/{n}" for n in range(40)]


def item(pattern: str, samples: int = 10) -> dict[str, Any]:
    digits = {task: (pattern[n % len(pattern)]) * samples for n, task in enumerate(TASKS)}
    return {
        "variant": None, "samples": samples, "base": digits, "plus": digits, "mean_tokens": 60.0,
        "fields": {},
    }  # fmt: skip


def make_content() -> dict[str, Any]:
    items = {
        "AdapT, line_initial a=0.8 b=0.3": item("1110"),
        "temperature temperature=0.8": item("1100"),
        "EDT temperature=1 theta=0.1": item("0101"),
        "greedy": item("1100", 1),
        "look-ahead temperature=0 threshold=1": item("1101", 1),
    }
    stage = {"settings": {"task": "humaneval"}, "items": items, "run": {}}
    names = [f"{n}/{turn}" for n in range(12) for turn in (1, 2)]
    grades = {"smollm2": 3, "smollm2:small": 2}
    chat = {
        "settings": {"of_each_category": 3, "judge": "j"}, "run": {},
        "items": {
            model: {"grades": {name: grade + int(name[0]) % 2 for name in names} | {"x/1": -1}}
            for model, grade in grades.items()
        },
    }  # fmt: skip
    return {"model": "m", "stages": {"humaneval": stage, "chat": chat}}


def test_report_says_what_the_intervals_say(tmp_path: Path) -> None:
    report = Report(make_content())
    lines = verdict(report)
    assert "pass@1 against `temperature temperature=0.8`: `look-ahead" in lines[0]
    assert "`AdapT, line_initial a=0.8 b=0.3` above (+25.0)" in lines[0]
    assert "EDT" not in lines[0]
    assert (
        "Looking ahead against greedy, humaneval: 10 tasks more pass, 0 fewer (p = 0.002)"
        in (lines[-1])
    )
    (tmp_path / "adapt.json").write_text(json.dumps(make_content()))
    make(tmp_path / "adapt.json", tmp_path / "adapt.md")
    page = (tmp_path / "adapt.md").read_text()
    assert "| `greedy` | 40 | 1 | 50.00 [" in page
    # Greedy first, then the plain temperature.
    order = [page.index(f"| `{name}") for name in ("greedy", "temperature", "EDT")]
    assert order == sorted(order)
    # 0101 against 1100 differs in half of the tasks, either way: nothing is shown.
    row = next(line for line in page.splitlines() if line.startswith("| `EDT") and "p = " in line)
    assert "| +0.00 [" in row
    assert "| `smollm2:small` | 24 | 1 | 2." in page
    assert "| -1.00 [-1.00, -1.00], p " in page
    assert "not measured" in page  # of the other stages


def test_report_says_that_another_temperature_was_better_for_one_sample() -> None:
    content = make_content()
    tasks = TASKS[:4]
    digits = {"temperature temperature=0.2": "1111100000", "temperature temperature=0.8": "10000"}
    content["stages"]["tune"] = {
        "settings": {}, "run": {},
        "items": {
            label: {**item("1", 5), "plus": dict.fromkeys(tasks, of[:5]) | {"T/9": of[-5:]}}
            for label, of in digits.items()
        },
    }  # fmt: skip
    assert (
        "In tuning `temperature temperature=0.2` had 80.0 at pass@1, `temperature "
        in (verdict(Report(content))[-1])
    )
    del content["stages"]["tune"]["items"]["temperature temperature=0.2"]
    assert "In tuning" not in verdict(Report(content))[-1]


def test_settings_have_different_labels() -> None:
    labels = [describe(family, fields) for family, all_ in FAMILIES.items() for fields in all_]
    assert len(set(labels)) == len(labels)
    assert labels[0] == f"{PLAIN} temperature=0.2"


def test_outcomes_are_digits_in_the_order_of_the_samples(tmp_path: Path) -> None:
    results = [
        {"task_id": "b", "sample": 1, "passed": True, "plus_passed": False},
        {"task_id": "b", "sample": 0, "passed": False},
        {"task_id": "a", "sample": 0, "passed": True, "plus_passed": True},
    ]
    samples = [{"completion_tokens": 10}, {"completion_tokens": 20}, {"completion_tokens": None}]
    for name, lines in (("results", results), ("samples", samples)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"x_{name}.jsonl").write_text(text)
    found = read_outcomes(tmp_path, "x")
    assert found["base"] == {"a": "1", "b": "01"}
    assert found["plus"] == {"a": "1", "b": "0"}
    assert found["mean_tokens"] == 15
    assert score(found) == 0.5
