"""Figures of chat evaluations, by hand."""

from pathlib import Path
from typing import Any

import pytest

from evaluation.chat.plots import plot_categories
from evaluation.chat.questions import Question
from evaluation.chat.report import summarise_grades, summarise_pairs, to_markdown

QUESTIONS = [
    Question(question_id=n, category="math" if n < 5 else "writing", turns=("a", "b"))
    for n in range(10)
]


def grade(question: int, model: str, turn: int, score: float) -> dict[str, Any]:
    return {"question_id": question, "model": model, "turn": turn, "score": score}


def pair(question: int, first: str, second: str, g1: str, g2: str) -> dict[str, Any]:
    return {"question_id": question, "model_1": first, "model_2": second, "turn": 1,
            "g1_winner": g1, "g2_winner": g2}  # fmt: skip


def test_grades_are_means_over_questions(tmp_path: Path) -> None:
    judgments = [grade(n, "a", 1, 4 + (n >= 5)) for n in range(10)]
    judgments += [grade(n, "a", 2, 6 + (n >= 5)) for n in range(10)]
    judgments += [grade(n, "b", turn, 8) for n in range(9) for turn in (1, 2)]
    judgments += [grade(9, "b", 1, 8), grade(9, "b", 2, -1), grade(0, "other", 1, 10)]
    summary = summarise_grades(QUESTIONS, judgments, ["a", "b"])
    a, b = summary["models"]["a"], summary["models"]["b"]
    assert a["turns"]["first turn"]["value"] == pytest.approx(4.5)
    assert a["turns"]["second turn"]["value"] == pytest.approx(6.5)
    assert a["turns"]["both turns"]["value"] == pytest.approx(5.5)
    assert a["categories"]["math"]["value"] == 5
    assert a["categories"]["writing"]["value"] == 6
    assert (a["ungraded"], b["ungraded"]) == (0, 1)
    assert b["turns"]["both turns"] == {"value": 8, "low": 8, "high": 8}
    difference = summary["differences"]["b"]
    assert difference["value"] == pytest.approx(2.5)
    assert difference["low"] > 2
    page = to_markdown("MT-Bench", summary, None, "judge")
    assert "| `a` | 4.50 [4.20, 4.80] |" in page
    assert "| `b` | +2.50 [" in page
    plot_categories(summary, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_pairs_count_a_win_in_both_orders_only() -> None:
    judgments = [
        pair(0, "a", "b", "model_1", "model_1"),
        pair(1, "a", "b", "model_1", "model_1"),
        pair(2, "a", "b", "model_2", "model_2"),
        pair(3, "a", "b", "model_1", "model_2"),
        pair(4, "a", "b", "model_1", "tie"),
        pair(5, "a", "b", "tie", "tie"),
        pair(6, "a", "b", "error", "model_1"),
        pair(7, "a", "c", "model_1", "model_1"),
    ]
    summary = summarise_pairs(judgments, ["a", "b"])
    (entry,) = summary["pairs"]
    assert {n: entry[n] for n in ("wins", "losses", "ties", "contradictions", "errors")} == {
        "wins": 2, "losses": 1, "ties": 3, "contradictions": 1, "errors": 1,
    }  # fmt: skip
    assert entry["win_rate"]["value"] == pytest.approx(3.5 / 6)
    assert "strengths" not in summary
    page = to_markdown("MT-Bench", None, summary, "judge")
    assert "| `a` | `b` | 2 | 3 | 1 | 1 | 1 | 58.3 % [" in page


def test_three_models_have_strengths() -> None:
    judgments = []
    for n in range(20):
        judgments += [
            pair(n, "a", "b", *(["model_1"] * 2 if n % 4 else ["model_2"] * 2)),
            pair(n, "b", "c", *(["model_1"] * 2 if n % 4 else ["model_2"] * 2)),
            pair(n, "a", "c", *(["model_1"] * 2 if n % 8 else ["model_2"] * 2)),
        ]
    summary = summarise_pairs(judgments, ["a", "b", "c"])
    values = [summary["strengths"][model]["value"] for model in "abc"]
    assert values[0] == 0 > values[1] > values[2]
    assert "| `c` | -" in to_markdown("MT-Bench", None, summary, "judge")
