"""From outcomes of arms on the same tasks to effects and verdicts."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, pvariance
from typing import Any

from evaluation.tables import describe_estimate
from stats.bootstrap import bootstrap_difference, bootstrap_mean
from stats.pass_at_k import pass_at_k
from stats.power import POWER, pairs_needed
from stats.proportions import mcnemar_p

Outcomes = Mapping[str, Sequence[float]]
"""Of one arm: for each task its samples, in the order of their seeds; 1 is right, 0 wrong."""

SIGNIFICANT = 0.05


def compare(arms: Mapping[str, Outcomes], *, calibration: str | None = None) -> dict[str, Any]:
    """Return the figures of arms, and of each against the first.

    Args:
        arms: outcomes by label; only tasks that all have count.
        calibration: label of an arm that is the first one again, with other seeds.
    """
    shared = set.intersection(*(set(of) for of in arms.values()))
    tasks = [task for task in next(iter(arms.values())) if task in shared]
    kept = {label: {task: of[task] for task in tasks} for label, of in arms.items()}
    labels = list(kept)
    summary: dict[str, Any] = {
        "tasks": len(tasks),
        "samples": min((len(of[task]) for of in kept.values() for task in tasks), default=0),
        "arms": {label: _describe_arm(of) for label, of in kept.items()},
        "pairs": {},
        "calibration": None,
    }
    for label in labels[1:]:
        pair = _compare_pair(kept[labels[0]], kept[label])
        if label == calibration:
            summary["calibration"] = pair
        else:
            summary["pairs"][label] = pair
    return summary


def _describe_arm(outcomes: Outcomes) -> dict[str, Any]:
    """Return mean, and the shares of tasks with any and with all of k samples right."""
    most = min(len(samples) for samples in outcomes.values())
    is_binary = all(value in (0, 1) for samples in outcomes.values() for value in samples)
    found: dict[str, Any] = {
        "mean": describe_estimate(bootstrap_mean([fmean(s) for s in outcomes.values()]))
    }
    if is_binary:
        counts = [(len(samples), int(sum(samples))) for samples in outcomes.values()]
        ks = [k for k in (1, 2, 4, 5, 8, 10, 16, 20, 32, 64) if k <= most]
        found["any_of"] = {
            str(k): describe_estimate(bootstrap_mean([pass_at_k(*of, k) for of in counts]))
            for k in ks
        }
        found["all_of"] = {
            str(k): describe_estimate(bootstrap_mean([_pass_all(*of, k) for of in counts]))
            for k in ks
        }
    return found


def _pass_all(num_samples: int, num_passed: int, k: int) -> float:
    """Return how likely all of k samples of a task pass.

    Source: Yao et al., tau-bench (2024), pass^k.
    """
    return math.comb(num_passed, k) / math.comb(num_samples, k)


def _compare_pair(first: Outcomes, second: Outcomes) -> dict[str, Any]:
    ours = [fmean(first[task]) for task in first]
    theirs = [fmean(second[task]) for task in first]
    difference = bootstrap_difference(ours, theirs)
    entry: dict[str, Any] = {"difference": describe_estimate(difference), "test": "bootstrap"}
    singles = all(len(first[t]) == len(second[t]) == 1 for t in first)
    if singles and all(value in (0, 1) for value in ours + theirs):
        only_first = sum(a > b for a, b in zip(ours, theirs, strict=True))
        only_second = sum(b > a for a, b in zip(ours, theirs, strict=True))
        entry["difference"]["p"] = mcnemar_p(only_first, only_second)
        entry |= {"test": "McNemar", "only_first": only_first, "only_second": only_second}
    gaps = [b - a for a, b in zip(ours, theirs, strict=True)]
    deviation = math.sqrt(pvariance(gaps) * len(gaps) / max(1, len(gaps) - 1))
    entry["deviation"] = deviation
    entry["is_decided"] = entry["difference"]["p"] < SIGNIFICANT
    entry["more_tasks"] = None
    if not entry["is_decided"] and difference.value and deviation:
        is_exact = entry["test"] == "McNemar"
        needed = pairs_needed(difference.value, deviation, is_exact=is_exact)
        entry["more_tasks"] = max(0, needed - len(gaps))
        entry["power"] = POWER
    entry["variance"] = _variances(first, second)
    return entry


def _variances(first: Outcomes, second: Outcomes) -> dict[str, float | None]:
    """Return what pairing takes from the variance of the difference, as shares of it.

    `pairing`: of the variance that two independent sets of tasks would give. `random_numbers`: of
    the squared difference of two samples of a task with different seeds, what equal seeds take;
    None with a single sample.
    """
    ours = [fmean(first[task]) for task in first]
    theirs = [fmean(second[task]) for task in first]
    apart = pvariance(ours) + pvariance(theirs)
    paired = pvariance([b - a for a, b in zip(ours, theirs, strict=True)])
    equal, different, num_different = 0.0, 0.0, 0
    num_equal = 0
    for task in first:
        for i, a in enumerate(first[task]):
            for j, b in enumerate(second[task]):
                if i == j:
                    equal, num_equal = equal + (a - b) ** 2, num_equal + 1
                else:
                    different, num_different = different + (a - b) ** 2, num_different + 1
    seeds = None
    if num_different and different:
        seeds = 1 - (equal / num_equal) / (different / num_different)
    return {"pairing": 1 - paired / apart if apart else None, "random_numbers": seeds}
