"""Experiments as they are configured, and who gets which arm."""

import math
from collections import Counter
from typing import Any

import pytest

from serve.experiments.plan import Experiment, ExperimentArm, PlanError, parse_experiments

ENTRY: dict[str, Any] = {
    "name": "trial",
    "unit": "conversation",
    "arms": [
        {"label": "plain", "model": "smollm2", "temperature": 0.5},
        {"model": "smollm2@adapt", "weight": 3},
    ],
}


def test_experiment_is_read() -> None:
    assert parse_experiments([ENTRY]) == (
        Experiment(
            name="trial",
            unit="conversation",
            arms=(
                ExperimentArm(label="plain", model="smollm2", fields={"temperature": 0.5}),
                ExperimentArm(label="smollm2@adapt", model="smollm2@adapt", weight=3.0),
            ),
        ),
    )


def changed(**fields: Any) -> dict[str, Any]:
    return {**ENTRY, **fields}


def with_arm(**fields: Any) -> dict[str, Any]:
    return changed(arms=[ENTRY["arms"][0], {"model": "b", **fields}])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "experiments must be a list of at least one"),
        ([], "experiments must be a list of at least one"),
        ([ENTRY] * 101, "experiments must be at most 100, got 101"),
        ([ENTRY, ENTRY], "experiments: two are named 'trial'"),
        (["x"], r"experiments\[0\] must be an object, got 'x'"),
        ([changed(weight=1)], r"experiments\[0\].weight is unknown; it has name, unit and arms"),
        ([changed(name="a b")], r"experiments\[0\].name must be letters, .* got 'a b'"),
        ([changed(name=None)], r"experiments\[0\].name must be letters, .* got None"),
        ([changed(unit="day")], r"experiments\[0\].unit must be one of user, .* got 'day'"),
        ([changed(arms=[])], r"experiments\[0\].arms must be a list of 2 to 16"),
        ([changed(arms=[{}, {}])], r"experiments\[0\].arms\[0\].model must be a text"),
        ([changed(arms=[1, 2])], r"experiments\[0\].arms\[0\] must be an object, got 1"),
        ([with_arm(label="plain")], r"experiments\[0\].arms: two are labelled 'plain'"),
        ([with_arm(label="")], r"arms\[1\].label must be a text of 1 to 128 characters, got ''"),
        ([with_arm(label="a\nb")], r"arms\[1\].label must be a text of 1 to 128 characters"),
        ([with_arm(label="x" * 129)], r"arms\[1\].label must be a text of 1 to 128 characters"),
        ([with_arm(label="äh")], r"arms\[1\].label must be ASCII, got 'äh'"),
        ([with_arm(weight=-1)], r"arms\[1\].weight must be a number from 0 to 1e6, got -1"),
        ([with_arm(weight=math.nan)], r"arms\[1\].weight must be a number from 0 to 1e6, got nan"),
        ([with_arm(weight=math.inf)], r"arms\[1\].weight must be a number from 0 to 1e6, got inf"),
        ([with_arm(weight=True)], r"arms\[1\].weight must be a number from 0 to 1e6, got True"),
        ([with_arm(weight="1")], r"arms\[1\].weight must be a number from 0 to 1e6, got '1'"),
        (
            [changed(arms=[{"model": "a", "weight": 0}, {"model": "b", "weight": 0}])],
            r"experiments\[0\].arms: their weights sum to 0",
        ),
    ],
)
def test_what_is_wrong_is_named(content: object, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        parse_experiments(content)


def test_units_keep_their_arm_and_arms_get_their_share() -> None:
    (trial,) = parse_experiments([ENTRY])
    arms = [trial.assign(f"user {n}") for n in range(4000)]
    assert arms == [trial.assign(f"user {n}") for n in range(4000)]
    shares = Counter(arm.label for arm in arms)
    # A quarter of 4,000, with a standard deviation of 27.
    assert shares["plain"] == pytest.approx(1000, abs=130)


def test_experiments_divide_users_each_by_itself() -> None:
    arms = tuple(ExperimentArm(label=label, model="m") for label in "ab")
    first, second = (Experiment(name=name, arms=arms) for name in ("one", "two"))
    same = sum(first.assign(str(n)) == second.assign(str(n)) for n in range(2000))
    assert same == pytest.approx(1000, abs=110)


def test_arm_of_weight_0_is_given_to_nobody() -> None:
    arms = (ExperimentArm(label="a", model="m"), ExperimentArm(label="b", model="m", weight=0))
    trial = Experiment(name="t", arms=arms)
    assert {trial.assign(str(n)).label for n in range(500)} == {"a"}
    assert trial.assign("\ud800").label == "a"
