"""Make docs/results/adapt.md of the raw figures of `benchmarks.adapt`.

python -m benchmarks.adapt_report
"""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import stdev
from typing import Any

from benchmarks.adapt import (
    GREEDY,
    LARGE,
    LEARNED,
    LOOK_AHEAD,
    PLAIN,
    RESULTS_FILE,
    SMALL,
    TUNED_FOR,
    score,
)
from benchmarks.report import ROOT, say
from evaluation.tables import describe_estimate, p_value, percent, table, tested_points
from stats.bootstrap import bootstrap_difference, bootstrap_mean
from stats.pass_at_k import pass_at_k
from stats.power import pairs_needed
from stats.proportions import mcnemar_p

REPORT = ROOT / "docs" / "results" / "adapt.md"
NOT_MEASURED = "not measured"
KS = (1, 3, 5, 10)
TESTS = {"base": "its own tests", "plus": "EvalPlus's tests too"}
STAGES = {
    "humaneval": f"HumanEval, every second task, {SMALL}",
    "mbpp": f"MBPP, every fourth of EvalPlus's tasks, {SMALL}",
    "larger": f"HumanEval, every second task, {LARGE}",
}


def values(item: Mapping[str, Any], tests: str, k: int) -> dict[str, float]:
    """Return pass@k by task, of what is sampled often enough."""
    return {
        task: pass_at_k(len(digits), digits.count("1"), k)
        for task, digits in item[tests].items()
        if len(digits) >= k
    }


class Report:
    """Figures by stage and arm.

    Args:
        content: of the raw file.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.stages = content["stages"]

    def items(self, stage: str) -> dict[str, Any]:
        """Return what was measured of each arm, greedy ones first, then the plain temperature."""
        found: dict[str, Any] = self.stages.get(stage, {}).get("items", {})
        return dict(sorted(found.items(), key=lambda of: (of[1]["samples"], not is_plain(of[0]))))


def is_plain(label: str) -> bool:
    """Whether an arm draws at one temperature and does nothing else."""
    return label.startswith(f"{PLAIN} ")


def tuning_lines(report: Report) -> list[str]:
    """Lay out what was tried to choose parameters."""
    items = report.items("tune")
    if not items:
        return [NOT_MEASURED]
    rows = []
    for label, item in items.items():
        k = min(TUNED_FOR, item["samples"])
        first = bootstrap_mean(list(values(item, "plus", 1).values()))
        rows.append([
            f"`{label}`", str(item["samples"]), percent(describe_estimate(first)),
            f"{100 * score(item, k):.1f}" if k > 1 else "", f"{item['mean_tokens']:.0f}",
        ])  # fmt: skip
    head = ["", "samples", "pass@1", f"pass@{TUNED_FOR}", "tokens"]
    return table(head, rows)


def stage_lines(report: Report, stage: str) -> list[str]:
    """Lay out a data set: pass@k of each arm, and each against the plain temperature."""
    items = report.items(stage)
    if not items:
        return [f"{NOT_MEASURED}.", ""]
    lines = []
    for tests, words in TESTS.items():
        rows = []
        for label, item in items.items():
            cells = []
            for k in KS:
                of = values(item, tests, k)
                found = describe_estimate(bootstrap_mean(list(of.values()))) if of else None
                cells.append(percent(found))
            counts = [str(len(item[tests])), str(item["samples"])]
            rows.append([f"`{label}`", *counts, *cells, f"{item['mean_tokens']:.0f}"])
        lines += [f"With {words}, in %:", ""]
        head = ["", "tasks", "samples", *(f"pass@{k}" for k in KS), "tokens"]
        lines += [*table(head, rows), ""]
    plain = next((label for label in items if is_plain(label)), None)
    if plain is None:
        return lines
    lines += [f"Against `{plain}`, in points, tasks in pairs, all tests:", ""]
    rows = [
        [f"`{label}`", *(difference(items[plain], item, k) for k in KS)]
        for label, item in items.items()
        if label != plain
    ]
    lines += [*table(["", *(f"pass@{k}" for k in KS)], rows), ""]
    return lines


def paired(
    plain: Mapping[str, Any], other: Mapping[str, Any], k: int
) -> tuple[list[float], list[float]]:
    """Return pass@k of two arms, all tests, on the tasks that both did often enough."""
    ours, theirs = values(plain, "plus", k), values(other, "plus", k)
    tasks = [task for task in ours if task in theirs]
    return [ours[task] for task in tasks], [theirs[task] for task in tasks]


def difference(plain: Mapping[str, Any], other: Mapping[str, Any], k: int) -> str:
    """Return an arm's difference to the plain temperature, and how many tasks would decide it."""
    first, second = paired(plain, other, k)
    if not first:
        return ""
    found = bootstrap_difference(first, second)
    text = tested_points(describe_estimate(found))
    gaps = [b - a for a, b in zip(first, second, strict=True)]
    if found.low <= 0 <= found.high and found.value and len(gaps) > 1:
        needed = pairs_needed(found.value, stdev(gaps), is_exact=False)
        text += f"; {needed} tasks would show it" if needed > len(gaps) else ""
    return text


def greedy_pair(report: Report, stage: str) -> str | None:
    """Say whether looking ahead changes greedy decoding; McNemar's exact test."""
    items = report.items(stage)
    ahead = next((item for label, item in items.items() if label.startswith(LOOK_AHEAD)), None)
    (name,) = GREEDY
    if ahead is None or name not in items:
        return None
    greedy = items[name]["plus"]
    better = sum(ahead["plus"][t] > greedy[t] for t in greedy if t in ahead["plus"])
    worse = sum(ahead["plus"][t] < greedy[t] for t in greedy if t in ahead["plus"])
    return (
        f"Looking ahead against greedy, {stage}: {better} tasks more pass, {worse} fewer "
        f"({p_value(mcnemar_p(worse, better))})."
    )


def chat_lines(report: Report) -> list[str]:
    """Lay out what the judge gave the chats of each model."""
    found = report.stages.get("chat")
    if not found or not found["items"]:
        return [f"{NOT_MEASURED}.", ""]
    graded = {
        model: {name: grade for name, grade in item["grades"].items() if grade >= 1}
        for model, item in found["items"].items()
    }
    first = next(iter(graded))
    rows = []
    for model, grades in graded.items():
        cells = [_grade(bootstrap_mean(list(grades.values())))]
        shared = [name for name in graded[first] if name in grades]
        gap = bootstrap_difference(
            [graded[first][name] for name in shared], [grades[name] for name in shared]
        )
        cells.append("" if model == first else f"{_grade(gap, sign='+')}, {p_value(gap.p or 0.0)}")
        missing = len(found["items"][model]["grades"]) - len(grades)
        rows.append([f"`{model}`", str(len(grades)), str(missing), *cells])
    head = ["", "answers", "without a grade", "grade, 1 to 10", f"against `{first}`"]
    words = (
        f"MT-Bench's questions, {found['settings']['of_each_category']} of each category in two "
        f"turns, answered by the demo model alone, with the example's adapter and as variants; "
        f"graded by {found['settings']['judge']}, which is a small judge."
    )
    lines = [words, "", *table(head, rows), ""]
    if len(set(graded[first].values())) == 1:
        lines += [
            f"The judge gave every answer of `{first}` the same grade, so differences to it are "
            "its own doing: it is too small to tell these models apart.", "",
        ]  # fmt: skip
    return lines


def _grade(estimate: Any, sign: str = "") -> str:
    low, high = (format(value, f"{sign}.2f") for value in (estimate.low, estimate.high))
    return f"{format(estimate.value, f'{sign}.2f')} [{low}, {high}]"


def verdict(report: Report) -> list[str]:
    """Say what the intervals say, and nothing else."""
    lines = []
    for stage in STAGES:
        items = report.items(stage)
        plain = next((label for label in items if is_plain(label)), None)
        if plain is None:
            continue
        for k in (k for k in (1, 10) if items[plain]["samples"] >= k):
            decided = []
            for label, item in items.items():
                first, second = paired(items[plain], item, k)
                if label == plain or not first:
                    continue
                found = bootstrap_difference(first, second)
                if found.low > 0 or found.high < 0:
                    word = "above" if found.low > 0 else "below"
                    decided.append(f"`{label}` {word} ({100 * found.value:+.1f})")
            words = "; ".join(decided) or "no difference is shown"
            lines.append(f"- {STAGES[stage]}, pass@{k} against `{plain}`: {words}.")
    lines += [f"- {line}" for stage in STAGES if (line := greedy_pair(report, stage))]
    if caution := cooler(report):
        lines += ["", caution]
    return lines or [f"{NOT_MEASURED}."]


def cooler(report: Report) -> str | None:
    """Say so if another plain temperature was better for pass@1 than the one that is reported."""
    items = {label: item for label, item in report.items("tune").items() if is_plain(label)}
    if not items:
        return None
    best = max(items, key=lambda label: score(items[label]))
    first = max(items, key=lambda label: score(items[label], 1))
    if best == first:
        return None
    return (
        f"The plain temperature was chosen by pass@{TUNED_FOR}. In tuning `{first}` had "
        f"{100 * score(items[first], 1):.1f} at pass@1, `{best}` "
        f"{100 * score(items[best], 1):.1f}: what is above the latter at "
        "pass@1 need not be above the best temperature for that."
    )


def head_line(report: Report) -> str:
    """Say what the temperature head learned."""
    head = report.stages.get("head", {}).get("items", {}).get("warm")
    if head is None:
        return f"The temperature head of `{LEARNED}`: {NOT_MEASURED}."
    low, middle, high = head["temperatures"]
    return (
        f"The temperature head of `{LEARNED}` was trained on the tuning samples of "
        f"`{report.stages['head']['settings']['arm']}` ({head['programs']} programs, "
        f"{head['telling_tasks']} tasks that some pass and some fail); epoch {head['epoch']} was "
        f"best on held-out tasks (gain {head['held_out_gain']:.4f}); it gives temperatures of "
        f"{low:.2f} to {high:.2f} to 8 of 10 tokens, median {middle:.2f}."
    )


def stage_line(stage: str, found: Mapping[str, Any]) -> str:
    """Tell where and how a stage was measured."""
    run = found.get("run", {})
    return (
        f"- `{stage}`: {run.get('date', '?')[:10]}, {run.get('cpu', '?')}, commit "
        f"`{str(run.get('commit'))[:12]}`, settings `{json.dumps(found['settings'])}`"
    )


def write_report(report: Report) -> str:
    """Return the report in Markdown."""
    lines = [
        "# Decoding strategies on programs", "",
        "Made by `python -m benchmarks.adapt_report` of "
        "[raw figures](../../benchmarks/results/adapt.json), a digit for each sample; "
        "[decoding.md](../decoding.md) says what the strategies do. Parameters were chosen on "
        f"every second task of HumanEval by pass@{TUNED_FOR} with all tests; reported are the "
        "other half of HumanEval and every fourth of EvalPlus's MBPP tasks, which chose nothing. "
        "Prompts are the data sets' own, completed (no chat); all arms draw the same random "
        "numbers. Brackets are 95 % intervals by bootstrap over tasks; each p is of its pair.",
        "", "## Verdict", "", *verdict(report), "",
    ]  # fmt: skip
    for stage, title in STAGES.items():
        lines += [f"## {title}", "", *stage_lines(report, stage)]
    lines += ["## Chats", "", *chat_lines(report)]
    lines += [
        "## How parameters were chosen", "", *tuning_lines(report), "", head_line(report), "",
        "## Settings", "",
        *(stage_line(stage, found) for stage, found in report.stages.items()),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def make(source: Path, target: Path) -> None:
    """Write the report of a file of raw figures."""
    content = json.loads(source.read_text(encoding="utf-8"))
    target.write_text(write_report(Report(content)), encoding="utf-8")
    say(f"{target}")


def main() -> None:
    """Write the report."""
    make(RESULTS_FILE, REPORT)


if __name__ == "__main__":
    main()
