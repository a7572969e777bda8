"""Options of a search: limits, the way to the target, rates."""

import pytest

from adapters.disp.search_config import SearchConfig


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("steps", 0, "a whole number of at least 1"),
        ("batch_size", 1.5, "a whole number of at least 1"),
        ("length", True, "a whole number of at least 1"),
        ("draws", 0, "a whole number of at least 1"),
        ("learning_rate", float("nan"), "a number above 0"),
        ("decay", 1.5, "a share from 0 to 1"),
        ("weight_decay", -1.0, "a number of at least 0"),
        ("penalty", 0, "a number above 0"),
        ("ramp", -0.1, "a share from 0 to 1"),
        ("settle", 1.1, "a share from 0 to 1"),
        ("further_steps", 0, "a whole number of at least 1"),
        ("align", 0, "a whole number of at least 1"),
        ("seed", 2**63, "a whole number from 0"),
        ("eval_windows", -1, "a whole number of at least 0"),
        ("estimator", "exact", "one of reinmax, ste, gumbel"),
        ("residual", "tied", "one of independent, shared"),
        ("compute_dtype", "float16", "one of auto, float32, bfloat16"),
    ],
)
def test_option_out_of_range_is_named(name: str, value: object, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be {allowed}.*, got {value!r}"):
        SearchConfig(**{name: value})  # type: ignore[arg-type]


def test_draws_divide_the_length() -> None:
    with pytest.raises(ValueError, match="draws must divide length, 1024, got 3"):
        SearchConfig(draws=3)


@pytest.mark.parametrize("shares", [(), (0.0,), (1.0,), (0.3, 0.3), (0.2, float("nan")), 0.3, "x"])
def test_shares_out_of_range_are_refused(shares: object) -> None:
    if shares == 0.3:
        assert SearchConfig(remove=shares).remove == (0.3,)  # type: ignore[arg-type]
        return
    with pytest.raises(ValueError, match="remove must be different shares between 0 and 1"):
        SearchConfig(remove=shares)  # type: ignore[arg-type]


def test_target_goes_down_as_a_line_and_stays() -> None:
    config = SearchConfig(steps=10, ramp=0.5)
    found = [config.target(step, 10, before=0.9, wanted=0.7) for step in range(10)]
    assert found == pytest.approx([0.86, 0.82, 0.78, 0.74, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7])
    assert SearchConfig(ramp=0.0).target(0, 10, before=1.0, wanted=0.7) == 0.7


def test_rate_falls_at_the_end_of_a_share() -> None:
    config = SearchConfig(steps=10, decay=0.4)
    found = [config.rate_factor(step, 10) for step in range(10)]
    assert found == pytest.approx([1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert SearchConfig(decay=0.0).rate_factor(9, 10) == 1.0


def test_options_are_json_values() -> None:
    config = SearchConfig(remove=(0.2, 0.5), steps=7)
    assert config.as_fields()["remove"] == [0.2, 0.5]
    assert SearchConfig(**config.as_fields()) == config


@pytest.mark.parametrize(("further", "wanted"), [(None, (7, 4, 4)), (9, (7, 9, 9))], ids=str)
def test_further_shares_take_two_thirds_of_the_steps_unless_told(
    further: int | None, wanted: tuple[int, ...]
) -> None:
    config = SearchConfig(remove=(0.2, 0.3, 0.5), steps=7, further_steps=further)
    assert config.share_steps == wanted
    assert config.num_steps == sum(wanted)


@pytest.mark.parametrize(("settle", "free"), [(0.0, 10), (0.3, 7), (1.0, 1)])
def test_widths_settle_at_the_end_of_a_share(settle: float, free: int) -> None:
    assert SearchConfig(settle=settle).settles_after(10) == free
