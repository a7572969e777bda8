"""Arms and tallies as HTML."""

from typing import Any

from serve.ui.answers import Answer
from serve.ui.compare import render_arms, render_tally


def answers(*texts: str) -> list[Answer]:
    found = [Answer() for _ in texts]
    for answer, text in zip(found, texts, strict=True):
        answer.add(text)
    return found


def make_round(**fields: Any) -> dict[str, Any]:
    return {
        "id": "cmp-1", "order": [1, 0], "labels": ["first model", "second model"],
        "is_blind": False, "is_done": True, "vote": None, **fields,
    }  # fmt: skip


def make_row(**fields: Any) -> dict[str, Any]:
    return {
        "arms": [{"label": "m", "model": "m", "temperature": 0.5}, {"label": "n", "model": "n"}],
        "wins": [3, 1], "ties": 2, "both_bad": 4, "votes": 10, "win_rate": 2 / 3,
        "interval": [0.3, 0.9], "confidence": 0.95, **fields,
    }  # fmt: skip


def test_arms_stand_in_the_order_shown() -> None:
    html = render_arms(answers("one", "two"), make_round())
    assert html.index("two") < html.index("one")
    assert html.index("second model") < html.index("first model")


def test_blind_arms_have_no_names_and_no_speed() -> None:
    html = render_arms(answers("one", "two"), make_round(is_blind=True))
    assert "model</span>" not in html
    assert "tokens" not in html


def test_vote_gives_the_names_away_and_marks_the_better() -> None:
    html = render_arms(answers("one", "two"), make_round(is_blind=True, vote=1))
    assert "second model" in html
    assert html.index('class="arm best"') < html.index("two")
    assert html.count("best") == 1


def test_tie_marks_none() -> None:
    html = render_arms(answers("one", "two"), make_round(vote="tie"))
    assert "best" not in html


def test_markup_in_answers_and_names_is_text() -> None:
    html = render_arms(answers("<script>", "<b>"), make_round(labels=["<i>", "<u>"]))
    for tag in ("<script", "<b>", "<i>", "<u>"):
        assert tag not in html


def test_problem_is_announced_beside_what_came() -> None:
    html = render_arms(answers("one", "two"), make_round(), problem="it <broke>")
    assert '<div class="problem" role="alert">it &lt;broke&gt;</div>' in html
    assert "one" in html


def test_tally_has_counts_rate_and_interval() -> None:
    html = render_tally([make_row()])
    assert [f"<td>{n}</td>" in html for n in (3, 1, 2, 4)] == [True] * 4
    assert "67% (30% to 90%)" in html


def test_pair_without_a_decision_has_no_rate() -> None:
    assert "none yet" in render_tally([make_row(win_rate=None, interval=None)])


def test_tally_without_votes_says_so() -> None:
    assert "No votes yet" in render_tally([])
