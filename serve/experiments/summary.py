"""From exposures and feedback to effects that may be looked at at any time."""

from collections.abc import Sequence
from typing import Any

from serve.experiments.exposures import OUTCOMES, TIE, ExposureStore, Outcome
from serve.experiments.plan import Experiment
from stats.bootstrap import Estimate
from stats.proportions import CONFIDENCE
from stats.sequential import Sample, difference_of_arms, difference_of_pairs

MAX_POINTS = 60
"""Of an effect over time."""


def summarise(experiment: Experiment, store: ExposureStore) -> dict[str, Any]:
    """Return what is known of an experiment.

    Args:
        experiment: as it is configured.
        store: of exposures and feedback.

    Returns:
        Its arms with what they were asked, and for each outcome that clients have told: the means,
        the difference of each arm to the first with an interval that holds at all times together,
        and that over time.
    """
    totals = store.totals(experiment.name)
    arms = []
    for arm in experiment.arms:
        found = totals.get(arm.label)
        arms.append(
            {
                "label": arm.label,
                "model": arm.model,
                "fields": dict(arm.fields),
                "weight": arm.weight,
                "exposures": 0 if found is None else found.exposures,
                "units": 0 if found is None else found.units,
                "first_token_s": None if found is None else found.first_token_s,
                "seconds": None if found is None else found.seconds,
                "completion_tokens": None if found is None else found.completion_tokens,
                "failures": 0 if found is None else found.failures,
            }
        )
    outcomes = {}
    for name in OUTCOMES:
        told = store.outcomes(experiment.name, name)
        if told:
            labels = [arm.label for arm in experiment.arms]
            outcomes[name] = _pairs(told, labels) if name == "preferred" else _outcome(told, labels)
    return {
        "name": experiment.name,
        "unit": experiment.unit,
        "arms": arms,
        "outcomes": outcomes,
        "confidence": CONFIDENCE,
    }


class _Means:
    """The mean outcome of each unit, and the sample of these means, as outcomes come."""

    def __init__(self) -> None:
        self._units: dict[bytes, Sample] = {}
        self.sample = Sample()
        self.count = 0

    def add(self, outcome: Outcome) -> None:
        old = self._units.get(outcome.unit)
        new = (old or Sample()).plus(outcome.value)
        self._units[outcome.unit] = new
        self.count += 1
        mean, before = new.mean, None if old is None else old.mean
        sample = self.sample
        if before is None:
            self.sample = sample.plus(mean)
        else:
            self.sample = Sample(
                count=sample.count, total=sample.total + mean - before,
                squares=sample.squares + mean * mean - before * before,
            )  # fmt: skip


def _outcome(told: Sequence[Outcome], labels: Sequence[str]) -> dict[str, Any]:
    means = {label: _Means() for label in labels}
    others = labels[1:]
    series: dict[str, list[dict[str, Any]]] = {label: [] for label in others}
    marks = _marks(len(told))
    for number, outcome in enumerate(told):
        if outcome.arm in means:
            means[outcome.arm].add(outcome)
        if number in marks:
            for label in others:
                found = difference_of_arms(means[labels[0]].sample, means[label].sample)
                if found is not None:
                    series[label].append({"created": outcome.created, **_describe(found)})
    return {
        "arms": {
            label: {
                "count": of.count,
                "units": of.sample.count,
                "mean": of.sample.mean if of.sample.count else None,
            }
            for label, of in means.items()
        },
        "differences": {
            label: _verdict(difference_of_arms(means[labels[0]].sample, means[label].sample))
            for label in others
        },
        "series": series,
    }


def _pairs(told: Sequence[Outcome], labels: Sequence[str]) -> dict[str, Any]:
    """Return the same of comparisons: of how many each arm was the preferred one."""
    gaps = {label: _Means() for label in labels[1:]}
    wins = dict.fromkeys((*labels, TIE), 0)
    series: dict[str, list[dict[str, Any]]] = {label: [] for label in labels[1:]}
    marks = _marks(len(told))
    for number, outcome in enumerate(told):
        if outcome.arm not in wins:
            continue
        wins[outcome.arm] += 1
        for label, of in gaps.items():
            value = {label: 1.0, labels[0]: 0.0}.get(outcome.arm, 0.5)
            of.add(Outcome(arm=label, unit=outcome.unit, created=outcome.created, value=value))
            if number in marks and (found := difference_of_pairs(of.sample)) is not None:
                series[label].append({"created": outcome.created, **_describe(found)})
    total = sum(wins.values())
    return {
        "arms": {
            label: {"count": count, "units": total, "mean": count / total if total else None}
            for label, count in wins.items()
        },
        "differences": {
            label: _verdict(difference_of_pairs(of.sample)) for label, of in gaps.items()
        },
        "series": series,
    }


def _marks(count: int) -> set[int]:
    """Return which of so many outcomes are points of the plot."""
    points = min(count, MAX_POINTS)
    return {round((index + 1) * count / points) - 1 for index in range(points)}


def _describe(estimate: Estimate) -> dict[str, Any]:
    return {
        "value": estimate.value, "low": estimate.low, "high": estimate.high, "p": estimate.p,
    }  # fmt: skip


def _verdict(estimate: Estimate | None) -> dict[str, Any] | None:
    if estimate is None:
        return None
    verdict = "undecided"
    if estimate.low > 0:
        verdict = "better"
    elif estimate.high < 0:
        verdict = "worse"
    return {**_describe(estimate), "verdict": verdict}
