"""The rank plan: against brute force, the linear program's bound and uniform ranks."""

import random
import re
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest

from adapters.mixed_rank.ranks import (
    BudgetError,
    Option,
    break_even,
    list_options,
    lower_bound,
    lower_hull,
    plan_groups,
    plan_ranks,
    plan_uniform,
)

SHAPES = ((96, 96), (288, 96), (384, 96), (96, 384))


def spectrum(count: int, rng: random.Random) -> list[float]:
    decay, floor = rng.uniform(0.85, 0.99), rng.uniform(0, 0.02)
    energies = [decay**i + floor * rng.random() for i in range(count)]
    energies.sort(reverse=True)
    total = sum(energies)
    errors = [1.0]
    for energy in energies:
        errors.append(max(0.0, errors[-1] - energy / total))
    return errors


def problem(seed: int, num_layers: int, step: int = 16) -> tuple[list[tuple[Option, ...]], int]:
    rng = random.Random(seed)
    layers = []
    for _ in range(num_layers):
        outputs, inputs = rng.choice(SHAPES)
        errors = spectrum(min(outputs, inputs), rng)
        layers.append(list_options(errors[::step], outputs, inputs, step=step))
    total = sum(options[-1].cost for options in layers)
    return layers, round(total * rng.uniform(0.3, 0.9))


def error_of(plan: Sequence[Option]) -> float:
    return sum(option.error for option in plan)


def cost_of(plan: Sequence[Option]) -> int:
    return sum(option.cost for option in plan)


def naive_greedy(layers: Sequence[Sequence[Option]], budget: int) -> list[Option]:
    """Take the next rank down wherever that costs least, from the whole matrices on."""
    at = [len(options) - 1 for options in layers]
    while sum(options[k].cost for options, k in zip(layers, at, strict=True)) > budget:

        def price(i: int) -> float:
            now, then = layers[i][at[i]], layers[i][at[i] - 1]
            return (then.error - now.error) / (now.cost - then.cost)

        i = min((i for i in range(len(layers)) if at[i]), key=price)
        at[i] -= 1
    return [options[k] for options, k in zip(layers, at, strict=True)]


@pytest.mark.parametrize(
    ("outputs", "inputs", "expected"),
    [(4096, 4096, 2048), (2304, 768, 576), (768, 768, 384), (3072, 768, 615), (1024, 4096, 820)],
)
def test_break_even_is_where_factors_stop_paying(outputs: int, inputs: int, expected: int) -> None:
    assert break_even(outputs, inputs) == expected
    assert (expected - 1) * (outputs + inputs) < outputs * inputs


def test_no_option_is_at_or_above_break_even() -> None:
    options = list_options([1 - i / 96 for i in range(0, 97, 8)], 288, 96, step=8)
    assert options[-1] == Option(cost=288 * 96, error=0.0, rank=None)
    assert all(o.rank is not None and o.cost < 288 * 96 for o in options[:-1])
    assert [o.rank for o in options[:3]] == [8, 16, 24]


def test_hull_is_convex_and_below_all_options() -> None:
    layers, _ = problem(3, 1, step=4)
    hull = lower_hull(layers[0])
    assert hull[0] == layers[0][0]
    assert hull[-1].error == 0
    slopes = [(b.error - a.error) / (b.cost - a.cost) for a, b in zip(hull, hull[1:], strict=False)]
    assert slopes == sorted(slopes)
    for option in layers[0]:
        assert lower_bound([layers[0]], option.cost) <= option.error + 1e-12


@pytest.mark.parametrize("seed", range(50))
def test_plan_is_near_brute_force_on_three_layers(seed: int) -> None:
    layers, budget = problem(seed, 3)
    plan = plan_ranks(layers, budget)
    best = min(error_of(p) for p in product(*layers) if cost_of(p) <= budget)
    assert cost_of(plan) <= budget
    assert error_of(plan) <= 1.25 * best + 1e-12
    assert error_of(plan) <= error_of(naive_greedy(layers, budget)) + 1e-12


@pytest.mark.parametrize("seed", range(10))
def test_plan_of_many_layers_is_near_the_bound_and_never_worse_than_uniform(seed: int) -> None:
    layers, budget = problem(100 + seed, 24)
    plan = plan_ranks(layers, budget)
    assert lower_bound(layers, budget) <= error_of(plan) <= 1.12 * lower_bound(layers, budget)
    uniform = plan_uniform(layers, budget)
    assert uniform is not None
    assert cost_of(uniform) <= budget
    assert error_of(plan) <= error_of(uniform)
    assert error_of(plan) <= error_of(naive_greedy(layers, budget)) + 1e-12
    assert plan_ranks(layers, budget) == plan


def test_less_budget_never_errs_less() -> None:
    layers, _ = problem(7, 24)
    total = sum(options[-1].cost for options in layers)
    errors = [error_of(plan_ranks(layers, round(total * share / 20))) for share in range(20, 4, -1)]
    assert errors[0] == 0
    assert errors == sorted(errors)


def test_plan_uses_the_budget_up_to_a_step() -> None:
    layers, budget = problem(11, 24)
    largest = max(
        b.cost - a.cost for options in layers for a, b in zip(options, options[1:], strict=False)
    )
    assert budget - cost_of(plan_ranks(layers, budget)) < largest


def test_budget_below_the_least_is_refused_with_the_least() -> None:
    layers, _ = problem(1, 3)
    least = sum(options[0].cost for options in layers)
    with pytest.raises(BudgetError, match=re.escape(f"{least} parameters, asked for {least - 1}")):
        plan_ranks(layers, least - 1)
    assert cost_of(plan_ranks(layers, least)) == least


@pytest.mark.parametrize("is_uniform", [True, False])
def test_most_that_can_be_removed_is_told_and_can_be(is_uniform: bool) -> None:
    errors = [1 - i / 12 for i in range(13)]
    groups = {
        name: {"outputs": outputs, "inputs": 96, "errors": errors, "weight": 1.0}
        for name, outputs in (("a", 96), ("b", 288), ("c", 40))
    }

    def plan(remove: float) -> dict[str, dict[str, Any]]:
        return plan_groups(groups, step=8, remove=remove, is_uniform=is_uniform)

    with pytest.raises(BudgetError, match=r"must be at most 0\.\d+ with ranks") as caught:
        plan(0.99)
    most = float(str(caught.value).split()[4])
    assert plan(most)
    with pytest.raises(BudgetError):
        plan(most + 0.001)
