"""Prediction difficulty: where tokens stand, ranks, and the figures by hand."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from evaluation.errors import RunError
from evaluation.language.difficulty import (
    BLANK,
    BLOCK,
    COLUMN0,
    INSIDE,
    LINE,
    PLACES,
    Sample,
    measure_difficulty,
    place_of,
    ranks,
    read_prose,
    summarise,
    to_markdown,
)
from evaluation.language.difficulty_plot import plot_difficulty
from evaluation.records import RecordLog
from evaluation.server import Arm
from tests.evaluation.conftest import Body, FakeServer

Make = Callable[..., FakeServer]


@pytest.mark.parametrize(
    ("before", "token", "place"),
    [
        ("def f(x):\n    ", "if", BLOCK),
        ("def f(x):\n", "    if", BLOCK),
        ("def f(x):", "\n    if", BLOCK),
        ("def f(x):\n    x = 1\n    ", "return", LINE),
        ("def f(x):\n    x = 1\n\n", "    return", LINE),
        ("x = [\n    ", "1", BLOCK),
        ("import os\n", "x", COLUMN0),
        ("", "def", COLUMN0),
        ("def", " f", INSIDE),
        ("    return", " x", INSIDE),
        ("def f(x):", "\n    ", BLANK),
        ("def f(x):\n", "    ", BLANK),
        ("x = 1", "\n", BLANK),
    ],
)
def test_place_of_a_token(before: str, token: str, place: str) -> None:
    assert place_of(before, token) == place


def test_ranks_run_from_0_to_1_and_equal_values_share_theirs() -> None:
    assert ranks([3.0, 1.0, 2.0]) == [1.0, 0.0, 0.5]
    assert ranks([1.0, 1.0, 2.0, 0.0, 1.0]) == [0.5, 0.5, 1.0, 0.0, 0.5]
    assert ranks([5.0]) == [0.0]
    assert ranks([]) == []


def record(places: list[str], losses: list[float], kind: str = "code") -> dict:
    return {"name": "x", "kind": kind, "losses": losses,
            "places": [PLACES.index(place) for place in places]}  # fmt: skip


def test_summary_by_hand(tmp_path: Path) -> None:
    text = record([BLOCK, INSIDE, INSIDE, LINE, INSIDE], [4.0, 0.0, 1.0, 3.0, 2.0])
    other = record([BLOCK, INSIDE, INSIDE], [0.0, 1.0, 2.0])
    prose = record([COLUMN0, INSIDE], [2.0, 4.0], "prose")
    summary = summarise([text, other, prose])
    assert summary["kinds"]["prose"]["mean"] == 3
    assert summary["kinds"]["code"]["tokens"] == 8
    assert summary["kinds"]["code"]["share_sure"] == 2 / 8
    assert summary["places"][BLOCK]["mean_rank"] == 0.5
    assert summary["places"][LINE] == {
        "tokens": 1, "mean_rank": 0.75, "median_rank": 0.75, "mean_loss": 3.0,
        "share_of_hardest": 0.0,
    }  # fmt: skip
    assert summary["places"][INSIDE]["share_of_hardest"] == 0.5
    # (1 + 0.75) / 2 - (0 + 0.25 + 0.5) / 3, and 0 - 0.75.
    assert summary["gap"]["value"] == pytest.approx((0.875 - 0.25 - 0.75) / 2)
    assert summary["gap"]["texts"] == 2
    page = to_markdown(summary, "Difficulty")
    assert "| prose | 2 | 3.000 | 3.000 |" in page
    assert "| line-initial | 12.5 | 0.750 |" in page
    plot_difficulty(summary, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_shape_of_losses() -> None:
    shape = summarise([record([INSIDE] * 4, [0.0, 0.0, 0.0, 4.0])])["kinds"]["code"]
    assert shape["mean"] == 1
    # Of a value that is 4 once in 4 times: skewness 2 / sqrt 3, excess kurtosis -2 / 3.
    assert shape["skewness"] == pytest.approx(2 / 3**0.5)
    assert shape["excess_kurtosis"] == pytest.approx(-2 / 3)
    assert sum(shape["histogram"]["counts"]) == 4
    even = summarise([record([INSIDE] * 3, [1.0] * 3)])["kinds"]["code"]
    assert (even["skewness"], even["excess_kurtosis"]) == (0, 0)


def echo(body: Body) -> Body:
    """One token for each character but that words stay whole."""
    tokens = body["prompt"].replace(" ", "| ").replace("\n", "|\n|").split("|")
    tokens = [token for token in tokens if token]
    offsets = [sum(map(len, tokens[:n])) for n in range(len(tokens) + 1)]
    values = [None, *(-float(n) for n in range(1, len(tokens))), -99.0]
    return {"choices": [{"logprobs": {"token_logprobs": values, "text_offset": offsets}}]}


def measure(folder: Path, server: FakeServer) -> list[dict]:
    samples = [
        Sample(name="a", kind="code", context="def f(x):\n", text="    return x"),
        Sample(name="b", kind="prose", context="", text="one two three"),
    ]
    with RecordLog(folder / "losses.jsonl") as log:
        return asyncio.run(
            measure_difficulty(
                samples, Arm(label="a", model="base"), log, server.servers(patience_s=0.02),
                concurrency=2, progress=lambda *_: None,
            )
        )  # fmt: skip


def test_tokens_after_the_context_count(tmp_path: Path, make_server: Make) -> None:
    records = {r["name"]: r for r in measure(tmp_path, make_server(echo))}
    # "def", " f(x):", "\n", " ", " ", " ", " return", " x": the context has three.
    assert records["a"]["losses"] == [3.0, 4.0, 5.0, 6.0, 7.0]
    assert [PLACES[p] for p in records["a"]["places"]] == [BLANK, BLANK, BLANK, BLOCK, INSIDE]
    # Nothing is before the first token of a text without a context.
    assert records["b"]["losses"] == [1.0, 2.0]
    server = make_server(echo)
    assert len(measure(tmp_path, server)) == 2
    assert server.bodies == []


def test_server_that_does_not_echo_is_named(tmp_path: Path, make_server: Make) -> None:
    with pytest.raises(RunError, match="echoes no log probabilities"):
        measure(tmp_path, make_server(lambda _: {"choices": [{"logprobs": None}]}))


def test_paragraphs_are_spread_over_the_text() -> None:
    text = "\n".join(["short line", *(f"{n} " + "word " * 40 for n in range(10)), ""])
    samples = read_prose(Path("a.txt"), text, 5)
    assert [sample.text.split()[0] for sample in samples] == ["0", "2", "4", "6", "8"]
    assert samples[0].kind == "prose"
