"""From judgments to figures: grades by turn and category, win rates in pairs."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from evaluation.chat.judging import NO_GRADE
from evaluation.chat.questions import Question
from evaluation.records import Record
from evaluation.tables import describe_estimate, p_value, table
from stats.bootstrap import bootstrap_difference, bootstrap_mean
from stats.bradley_terry import fit_bradley_terry
from stats.proportions import wilson_interval

FIRST, SECOND, BOTH = "first turn", "second turn", "both turns"
_TURNS = {FIRST: (1,), SECOND: (2,), BOTH: (1, 2)}


def summarise_grades(
    questions: Sequence[Question], judgments: Sequence[Record], models: Sequence[str]
) -> dict[str, Any]:
    """Return the mean grades of models, with 95 % intervals over questions.

    Args:
        questions: that were judged.
        judgments: lines of `single.jsonl`; a grade of -1 counts as none.
        models: in the order of the report; differences are to the first.
    """
    category = {question.question_id: question.category for question in questions}
    grades: dict[str, dict[Any, dict[int, float]]] = {model: {} for model in models}
    ungraded = dict.fromkeys(models, 0)
    for line in judgments:
        if line["model"] not in grades:
            continue
        if line["score"] == NO_GRADE:
            ungraded[line["model"]] += 1
        else:
            grades[line["model"]].setdefault(line["question_id"], {})[line["turn"]] = line["score"]
    summary: dict[str, Any] = {"models": {}, "differences": {}}
    for model in models:
        entry: dict[str, Any] = {"ungraded": ungraded[model], "turns": {}, "categories": {}}
        for name, turns in _TURNS.items():
            if means := _means(grades[model], turns):
                entry["turns"][name] = describe_estimate(bootstrap_mean(list(means.values())))
        for kind in dict.fromkeys(category.values()):
            means = _means(grades[model], (1, 2))
            values = [grade for key, grade in means.items() if category.get(key) == kind]
            if values:
                entry["categories"][kind] = describe_estimate(bootstrap_mean(values))
        summary["models"][model] = entry
    for model in models[1:]:
        first, other = (_means(grades[name], (1, 2)) for name in (models[0], model))
        shared = [key for key in first if key in other]
        if shared:
            summary["differences"][model] = describe_estimate(
                bootstrap_difference([first[k] for k in shared], [other[k] for k in shared])
            )
    return summary


def _means(grades: Mapping[Any, Mapping[int, float]], turns: Sequence[int]) -> dict[Any, float]:
    """Return the mean grade of each question that has one in these turns."""
    found = {}
    for key, by_turn in grades.items():
        values = [by_turn[turn] for turn in turns if turn in by_turn]
        if values:
            found[key] = sum(values) / len(values)
    return found


def read_game(line: Record) -> float | None:
    """Return what the first model of a pair has of it: 1, 0 or, where orders disagree, 0.5.

    None: the judge gave no verdict.
    """
    winners = (line["g1_winner"], line["g2_winner"])
    if "error" in winners:
        return None
    if winners[0] != winners[1]:
        return 0.5
    return {"model_1": 1.0, "model_2": 0.0}.get(winners[0], 0.5)


def preferences(judgments: Sequence[Record]) -> dict[str, dict[str, list[float]]]:
    """Return, by model and question with turn, the mean of what it has of its pairs.

    Args:
        judgments: lines of `pair.jsonl`.
    """
    games: dict[str, dict[str, list[float]]] = {}
    for line in judgments:
        outcome = read_game(line)
        if outcome is not None:
            task = f"{line['question_id']}/{line['turn']}"
            for model, share in ((line["model_1"], outcome), (line["model_2"], 1 - outcome)):
                games.setdefault(model, {}).setdefault(task, []).append(share)
    return {
        model: {task: [fmean(shares)] for task, shares in of.items()} for model, of in games.items()
    }


def summarise_pairs(judgments: Sequence[Record], models: Sequence[str]) -> dict[str, Any]:
    """Return win rates of pairs of models, and their Bradley-Terry strengths.

    A win is one in both orders of the answers; verdicts that contradict each other are a tie.

    Args:
        judgments: lines of `pair.jsonl`.
        models: in the order of the report.
    """
    pairs: dict[tuple[str, str], dict[str, int]] = {}
    games: list[tuple[int, int, float]] = []
    for line in judgments:
        pair = (line["model_1"], line["model_2"])
        if not set(pair) <= set(models):
            continue
        counts = pairs.setdefault(
            pair, {"wins": 0, "losses": 0, "ties": 0, "contradictions": 0, "errors": 0}
        )
        outcome = read_game(line)
        if outcome is None:
            counts["errors"] += 1
            continue
        counts["contradictions"] += {line["g1_winner"], line["g2_winner"]} == {"model_1", "model_2"}
        counts[{1.0: "wins", 0.0: "losses", 0.5: "ties"}[outcome]] += 1
        games.append((models.index(pair[0]), models.index(pair[1]), outcome))
    summary: dict[str, Any] = {"pairs": []}
    for (first, second), counts in pairs.items():
        rated = counts["wins"] + counts["losses"] + counts["ties"]
        entry: dict[str, Any] = {"first": first, "second": second, **counts}
        if rated:
            successes = counts["wins"] + counts["ties"] / 2
            low, high = wilson_interval(successes, rated)
            entry |= {"win_rate": {"value": successes / rated, "low": low, "high": high}}
        summary["pairs"].append(entry)
    if games and len(models) > 2:
        strengths = fit_bradley_terry(games, len(models))
        summary["strengths"] = {
            model: describe_estimate(strength)
            for model, strength in zip(models, strengths, strict=True)
        }
    return summary


def to_markdown(
    title: str, grades: Mapping[str, Any] | None, pairs: Mapping[str, Any] | None, judge: str
) -> str:
    """Return the figures as a page."""
    lines = [f"# {title}", "", f"Judged by `{judge}`.", ""]
    if grades is not None:
        lines += ["## Grades, 1 to 10", "", *_grade_tables(grades)]
    if pairs is not None:
        lines += ["## Pairs", "", *pair_tables(pairs)]
    lines.append("Brackets: 95 % intervals, by bootstrap over questions; of win rates by Wilson.")
    return "\n".join(lines) + "\n"


def _grade_tables(grades: Mapping[str, Any]) -> list[str]:
    models = grades["models"]
    lines = table(
        ["", *_TURNS, "without a grade"],
        [
            [f"`{m}`", *(_grade(of["turns"].get(name)) for name in _TURNS), str(of["ungraded"])]
            for m, of in models.items()
        ],
    )
    kinds = list(dict.fromkeys(kind for of in models.values() for kind in of["categories"]))
    lines += [""] + table(
        ["", *kinds],
        [[f"`{m}`", *(_grade(of["categories"].get(k)) for k in kinds)] for m, of in models.items()],
    )
    lines.append("")
    if grades["differences"]:
        first = next(iter(models))
        lines += [f"Difference to `{first}`, questions in pairs:", ""]
        lines += table(
            ["", "points"],
            [
                [
                    f"`{m}`",
                    f"{d['value']:+.2f} [{d['low']:+.2f}, {d['high']:+.2f}], {p_value(d['p'])}",
                ]
                for m, d in grades["differences"].items()
            ],
        )
        lines.append("")
    return lines


def _grade(estimate: Mapping[str, float] | None) -> str:
    if estimate is None:
        return ""
    return f"{estimate['value']:.2f} [{estimate['low']:.2f}, {estimate['high']:.2f}]"


def pair_tables(pairs: Mapping[str, Any]) -> list[str]:
    """Return the tables of `summarise_pairs`."""
    names = ("wins", "ties", "losses", "contradictions", "errors")
    lines = table(
        ["", "against", *names, "win rate, a tie as half"],
        [
            [f"`{p['first']}`", f"`{p['second']}`", *(str(p[n]) for n in names), _rate(p)]
            for p in pairs["pairs"]
        ],
    )
    lines.append("")
    if "strengths" in pairs:
        lines += [
            "Bradley-Terry strength, of the first model 0, in units of natural logarithms:",
            "",
        ]
        lines += table(
            ["", "strength"], [[f"`{m}`", _grade(s)] for m, s in pairs["strengths"].items()]
        )
        lines.append("")
    return lines


def _rate(pair: Mapping[str, Any]) -> str:
    rate = pair.get("win_rate")
    if rate is None:
        return ""
    return f"{100 * rate['value']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"
