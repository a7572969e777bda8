"""From results to figures: pass@k with intervals, kinds of failures, arms against each other."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.records import Record
from evaluation.tables import describe_estimate, percent, table, tested_points
from stats.bootstrap import bootstrap_difference, bootstrap_mean
from stats.pass_at_k import pass_at_k

BASE, PLUS = "base", "plus"
_FIELDS = {BASE: "passed", PLUS: "plus_passed"}
_KINDS = {BASE: "result", PLUS: "plus_result"}
_MOST_KINDS = 12


def summarise(results: Mapping[str, Sequence[Record]], ks: Sequence[int] | None) -> dict[str, Any]:
    """Return the figures of arms that answered the same tasks.

    Args:
        results: of each arm, by its label.
        ks: for pass@k; None: 1 and what else the number of samples allows of 5, 10, 15, 20, 50
            and 100, and that number.

    Returns:
        For each arm and each set of tests: tasks, samples of each, pass@k with 95 % intervals over
        tasks, the counts of what failed. With several arms also the differences of pass@k to the
        first one, in pairs of tasks.
    """
    arms: dict[str, Any] = {}
    for label, records in results.items():
        arms[label] = {
            name: _figures(records, name, ks)
            for name in _FIELDS
            if any(_FIELDS[name] in record for record in records)
        }
    labels = list(arms)
    summary: dict[str, Any] = {"arms": arms}
    if len(labels) > 1:
        summary["differences"] = {
            label: {
                name: _differences(results[labels[0]], results[label], name, ks)
                for name in arms[label]
                if name in arms[labels[0]]
            }
            for label in labels[1:]
        }
    return summary


def _counts(records: Sequence[Record], name: str) -> dict[str, tuple[int, int]]:
    """Return (samples, passed) of each task."""
    counts: dict[str, tuple[int, int]] = {}
    for record in records:
        if _FIELDS[name] in record:
            task = str(record["task_id"])
            total, passed = counts.get(task, (0, 0))
            counts[task] = total + 1, passed + bool(record[_FIELDS[name]])
    return counts


def _figures(records: Sequence[Record], name: str, ks: Sequence[int] | None) -> dict[str, Any]:
    counts = _counts(records, name)
    fewest = min(total for total, _ in counts.values())
    kinds = Counter(str(record[_KINDS[name]]) for record in records if _KINDS[name] in record)
    return {
        "tasks": len(counts),
        "samples": fewest,
        "pass_at": {
            str(k): describe_estimate(bootstrap_mean([pass_at_k(*of, k) for of in counts.values()]))
            for k in choose_ks(fewest, ks)
        },
        "results": dict(kinds.most_common()),
    }


def _differences(
    first: Sequence[Record], second: Sequence[Record], name: str, ks: Sequence[int] | None
) -> dict[str, Any]:
    ours, theirs = _counts(first, name), _counts(second, name)
    tasks = [task for task in ours if task in theirs]
    fewest = min((min(ours[task][0], theirs[task][0]) for task in tasks), default=0)
    return {
        str(k): describe_estimate(
            bootstrap_difference(
                [pass_at_k(*ours[task], k) for task in tasks],
                [pass_at_k(*theirs[task], k) for task in tasks],
            )
        )
        for k in choose_ks(fewest, ks)
    }


def choose_ks(num_samples: int, ks: Sequence[int] | None) -> list[int]:
    """Return the k that so many samples can tell of."""
    asked = (1, 5, 10, 15, 20, 50, 100, num_samples) if ks is None else ks
    return sorted({k for k in asked if 1 <= k <= num_samples})


def to_markdown(summary: Mapping[str, Any], title: str) -> str:
    """Return the figures as a page."""
    lines = [f"# {title}", ""]
    for name, words in ((BASE, "Tests of the data set"), (PLUS, "With the further tests")):
        arms = {label: of[name] for label, of in summary["arms"].items() if name in of}
        if not arms:
            continue
        lines += [f"## {words}", "", *_pass_table(arms), ""]
        differences = {
            label: of[name] for label, of in summary.get("differences", {}).items() if name in of
        }
        if differences:
            first = next(iter(summary["arms"]))
            lines += [f"Difference to `{first}`, in points, tasks in pairs:", ""]
            lines += [*_difference_table(differences), ""]
        lines += ["Of the samples, in %:", "", *_kind_table(arms), ""]
    lines.append("Brackets: 95 % intervals by bootstrap over tasks.")
    return "\n".join(lines) + "\n"


def _pass_table(arms: Mapping[str, Any]) -> list[str]:
    ks = sorted({int(k) for of in arms.values() for k in of["pass_at"]})
    rows = [
        [f"`{label}`", str(of["tasks"]), str(of["samples"])]
        + [percent(of["pass_at"].get(str(k))) for k in ks]
        for label, of in arms.items()
    ]
    return table(["", "tasks", "samples", *(f"pass@{k}" for k in ks)], rows)


def _difference_table(differences: Mapping[str, Any]) -> list[str]:
    ks = sorted({int(k) for of in differences.values() for k in of})
    rows = [
        [f"`{label}`", *(_difference(of.get(str(k))) for k in ks)]
        for label, of in differences.items()
    ]
    return table(["", *(f"pass@{k}" for k in ks)], rows)


def _difference(estimate: Mapping[str, float] | None) -> str:
    if estimate is None:
        return ""
    return tested_points(estimate)


def _kind_table(arms: Mapping[str, Any]) -> list[str]:
    total: Counter[str] = Counter()
    for of in arms.values():
        total.update(of["results"])
    kinds = [kind for kind, _ in total.most_common(_MOST_KINDS)]
    rows = []
    for label, of in arms.items():
        num = sum(of["results"].values())
        rows.append([f"`{label}`", *(f"{100 * of['results'].get(k, 0) / num:.1f}" for k in kinds)])
    return table(["", *kinds], rows)
