"""Options of a training: limits, lengths, schedules."""

import pytest

from adapters.qst.training_config import TrainingConfig


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("steps", 0, "a whole number of at least 1"),
        ("steps", 1.5, "a whole number of at least 1"),
        ("epochs", 0, "a number above 0"),
        ("batch_size", True, "a whole number of at least 1"),
        ("learning_rate", float("nan"), "a number above 0"),
        ("alpha_learning_rate", "fast", "a number above 0"),
        ("warmup", 1.5, "a share from 0 to 1"),
        ("weight_decay", -1.0, "a number of at least 0"),
        ("seed", 2**63, "a whole number from 0"),
        ("eval_fraction", 1.0, "a share from 0 to below 1"),
        ("schedule", "step", "one of constant, linear, cosine"),
        ("compute_dtype", "float16", "one of auto, float32, bfloat16"),
        ("keep", "first", "one of last, best"),
    ],
)
def test_option_out_of_range_is_named(name: str, value: object, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be {allowed}.*, got {value!r}"):
        TrainingConfig(**{name: value})  # type: ignore[arg-type]


def test_steps_follow_from_epochs() -> None:
    config = TrainingConfig(epochs=1.5, batch_size=4, accumulate=2)
    assert config.num_steps(100) == 19
    assert config.num_steps(1) == 1
    assert TrainingConfig(steps=7).num_steps(100) == 7


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ("cosine", [0.5, 1.0, 1.0, 0.96194, 0.85355, 0.69134, 0.5, 0.30866, 0.14645, 0.03806]),
    ],
)
def test_rates_rise_and_fall(schedule: str, expected: list[float]) -> None:
    config = TrainingConfig(schedule=schedule, warmup=0.2)  # type: ignore[arg-type]
    found = [config.rate_factor(step, 10) for step in range(10)]
    assert found == pytest.approx(expected, abs=1e-5)


def test_options_are_json_values() -> None:
    fields = TrainingConfig(steps=3).as_fields()
    assert fields["steps"] == 3
    assert TrainingConfig(**fields) == TrainingConfig(steps=3)
