"""A rank for each matrix under one budget of parameters for all of them.

The paper searches greedily for ranks that minimise the summed error; its steps and its start are
not known. Here the problem is taken for what it is, a knapsack with one choice of several for each
matrix: steps along lower convex hulls, which are optimal at every budget that they pass, then
exchanges between matrices as long as one lowers the sum.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


class BudgetError(ValueError):
    """No ranks meet the budget."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One way to keep a matrix.

    Attributes:
        cost: parameters.
        error: what is lost by it, such as a share of its outputs' squares.
        rank: of its factors; None: it stays whole.
    """

    cost: int
    error: float
    rank: int | None


def break_even(outputs: int, inputs: int) -> int:
    """Return the least rank at which factors have no fewer parameters than the matrix."""
    return -(-outputs * inputs // (outputs + inputs))


def list_options(
    errors: Sequence[float], outputs: int, inputs: int, *, step: int
) -> tuple[Option, ...]:
    """List the ways to keep a matrix, cheapest first.

    Args:
        errors: at ranks 0, step, 2 * step, ..., never rising.
        outputs, inputs: its shape.
        step: ranks are multiples of it.
    """
    ranks = range(step, break_even(outputs, inputs), step)
    return (
        *(
            Option(cost=rank * (outputs + inputs), error=float(errors[rank // step]), rank=rank)
            for rank in ranks
        ),
        Option(cost=outputs * inputs, error=0.0, rank=None),
    )


def lower_hull(options: Sequence[Option]) -> list[Option]:
    """Return the options on the lower convex hull of error over cost, cheapest first."""
    hull: list[Option] = []
    for option in options:
        if hull and option.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2], option) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _slope(cheap: Option, dear: Option) -> float:
    return (dear.error - cheap.error) / (dear.cost - cheap.cost)


def plan_ranks(layers: Sequence[Sequence[Option]], budget: int) -> list[Option]:
    """Choose an option for each matrix so that the summed error is low and the budget is met.

    Args:
        layers: the options of each matrix, cheapest first.
        budget: most parameters that all of them may have.

    Returns:
        One option for each; the same for the same arguments, and never a greater sum than
        `plan_uniform` at this budget.

    Raises:
        BudgetError: even the cheapest options have more parameters.
    """
    least = sum(options[0].cost for options in layers)
    if budget < least:
        raise BudgetError(f"the least that can be kept is {least} parameters, asked for {budget}")
    plans = [_improve(layers, _greedy(layers, budget), budget)]
    if (uniform := plan_uniform(layers, budget)) is not None:
        plans.append(_improve(layers, uniform, budget))
    return min(plans, key=lambda plan: (sum(o.error for o in plan), sum(o.cost for o in plan)))


def plan_groups(
    groups: Mapping[str, Mapping[str, Any]], *, step: int, remove: float, is_uniform: bool
) -> dict[str, dict[str, Any]]:
    """Choose a rank for each of some named matrices.

    Args:
        groups: by name: `outputs`, `inputs`, `errors` at ranks 0, step, 2 * step, ..., and the
            `weight` of these in the sum.
        step: ranks are multiples of it.
        remove: share of all parameters to remove.
        is_uniform: the same share of each.

    Returns:
        By name: the `rank`, None where the matrix stays whole, and the `error` there.

    Raises:
        BudgetError: so much cannot be removed.
    """
    layers = [list_weighted(facts, step=step) for facts in groups.values()]
    total = sum(options[-1].cost for options in layers)
    budget = int(total * (1 - remove))
    cheapest = [options[0] for options in layers]
    if is_uniform:  # the least share that every matrix can be kept at
        shares = [options[0].cost / options[-1].cost for options in layers if len(options) > 1]
        share = max(shares, default=1.0)
        cheapest = [_within(options, share) or options[0] for options in layers]
    least = sum(option.cost for option in cheapest)
    chosen = None
    if least <= budget:
        chosen = plan_uniform(layers, budget) if is_uniform else plan_ranks(layers, budget)
    if chosen is None:
        most = int(1e4 * (1 - least / total)) / 1e4
        raise BudgetError(
            f"must be at most {most} with ranks in steps of {step}, got {remove}: {least} of the "
            f"{total} parameters cannot go"
        )
    return {
        name: {"rank": option.rank, "error": option.error / (facts["weight"] or 1.0)}
        for (name, facts), option in zip(groups.items(), chosen, strict=True)
    }


def list_weighted(facts: Mapping[str, Any], *, step: int) -> tuple[Option, ...]:
    """List the ways to keep a matrix of which `plan_groups` is told."""
    errors = [error * facts["weight"] for error in facts["errors"]]
    return list_options(errors, facts["outputs"], facts["inputs"], step=step)


def plan_uniform(layers: Sequence[Sequence[Option]], budget: int) -> list[Option] | None:
    """Give every matrix the same share of its parameters, as far as ranks and budget allow.

    Returns:
        One option for each; None if no share meets the budget.
    """

    def plan(share: float) -> list[Option] | None:
        found = [_within(options, share) for options in layers]
        chosen = [option for option in found if option is not None]
        is_met = len(chosen) == len(found) and sum(option.cost for option in chosen) <= budget
        return chosen if is_met else None

    shares = {option.cost / options[-1].cost for options in layers for option in options}
    plans = (plan(share) for share in sorted(shares, reverse=True))
    return next((found for found in plans if found is not None), None)


def _within(options: Sequence[Option], share: float) -> Option | None:
    """Return the dearest option of no more than a share; a matrix without factors stays whole."""
    if len(options) == 1:
        return options[0]
    index = bisect_right([option.cost for option in options], share * options[-1].cost) - 1
    return None if index < 0 else options[index]


def lower_bound(layers: Sequence[Sequence[Option]], budget: int) -> float:
    """Return the least summed error if options could be mixed: that of the linear program."""
    chosen = [lower_hull(options)[0] for options in layers]
    error, rest = sum(o.error for o in chosen), budget - sum(o.cost for o in chosen)
    for slope, cost, _, _ in _hull_steps(layers):
        taken = min(cost, max(rest, 0))
        error += slope * taken
        rest -= taken
    return error


def _hull_steps(layers: Sequence[Sequence[Option]]) -> list[tuple[float, int, int, int]]:
    """Return the steps along all hulls, best first: slope, cost, matrix, number on its hull.

    Slopes of a hull rise, so those of one matrix come in order.
    """
    steps = []
    for i, options in enumerate(layers):
        hull = lower_hull(options)
        for number, (cheap, dear) in enumerate(pairwise(hull), start=1):
            steps.append((_slope(cheap, dear), dear.cost - cheap.cost, i, number))
    return sorted(steps, key=lambda step: (step[0], step[2], step[3]))


def _greedy(layers: Sequence[Sequence[Option]], budget: int) -> list[Option]:
    hulls = [lower_hull(options) for options in layers]
    at, rest = [0] * len(hulls), budget - sum(hull[0].cost for hull in hulls)
    for _, cost, i, number in _hull_steps(layers):
        if cost > rest or at[i] != number - 1:
            continue
        at[i], rest = number, rest - cost
    return [hull[k] for hull, k in zip(hulls, at, strict=True)]


def _improve(
    layers: Sequence[Sequence[Option]], plan: Sequence[Option], budget: int
) -> list[Option]:
    """Change the best one or two matrices as long as that lowers the sum within the budget."""
    plan = list(plan)
    while True:
        rest = budget - sum(option.cost for option in plan)
        cheaper, better = [], []
        for i, options in enumerate(layers):
            for option in options:
                cost, error = option.cost - plan[i].cost, option.error - plan[i].error
                if cost < 0 and error >= 0:
                    cheaper.append((cost, error, i, option))
                elif error < 0:
                    better.append((cost, error, i, option))
        found = _best_exchange(cheaper, better, rest)
        if found is None:
            return plan
        for i, option in found:
            plan[i] = option


_Move = tuple[int, float, int, Option]
_LEAST_GAIN = 1e-12


def _best_exchange(
    cheaper: list[_Move], better: list[_Move], rest: int
) -> list[tuple[int, Option]] | None:
    """Find the change that lowers the sum most: one matrix, or one for the sake of another."""
    cheaper.sort(key=lambda move: (move[0], move[1], move[2]))
    # Of the moves that free at least so much, the two of different matrices that lose least.
    firsts: list[tuple[_Move, _Move | None]] = []
    best: _Move | None = None
    second: _Move | None = None
    for move in cheaper:
        if best is None or move[1] < best[1]:
            if best is not None and best[2] != move[2]:
                second = best
            best = move
        elif move[2] != best[2] and (second is None or move[1] < second[1]):
            second = move
        firsts.append((best, second))
    costs = [move[0] for move in cheaper]
    gain, found = -_LEAST_GAIN, None
    for cost, error, i, option in better:
        if cost <= rest:
            if error < gain:
                gain, found = error, [(i, option)]
            continue
        count = bisect_right(costs, rest - cost)
        if not count:
            continue
        for other in firsts[count - 1]:
            if other is not None and other[2] != i:
                if error + other[1] < gain:
                    gain, found = error + other[1], [(i, option), (other[2], other[3])]
                break
    return found
