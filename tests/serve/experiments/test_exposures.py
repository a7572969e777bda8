"""The file of exposures and feedback."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.experiments import exposures as module
from serve.experiments.database import DatabaseError
from serve.experiments.exposures import Exposure, ExposureStore, Feedback, hash_unit
from serve.experiments.plan import Experiment, ExperimentArm
from serve.experiments.store import VoteStore
from serve.experiments.summary import summarise

ARMS = (ExperimentArm(label="a", model="m"), ExperimentArm(label="b", model="m@adapt"))
TRIAL = Experiment(name="trial", arms=ARMS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "experiments.sqlite3"


@pytest.fixture
def store(path: Path) -> Iterator[ExposureStore]:
    opened = ExposureStore(path, busy_timeout_s=0.01)
    yield opened
    opened.close()


def exposure(number: int, arm: str = "a", **fields: Any) -> Exposure:
    facts: dict[str, Any] = {
        "id": f"chatcmpl-{number}", "experiment": "trial", "arm": arm, "unit": f"user {number}",
        "created": 1000.0 + number, "first_token_s": 0.5, "seconds": 2.0, "prompt_tokens": 10,
        "completion_tokens": 20, "finish": "stop",
    }  # fmt: skip
    return Exposure(**{**facts, **fields})


def test_totals_are_of_each_arm(store: ExposureStore) -> None:
    store.record([exposure(1), exposure(2, unit="user 1", seconds=4.0, finish="length")])
    store.record([exposure(3, "b", first_token_s=None, finish="abort")])
    store.record([exposure(4, experiment="other")])
    totals = store.totals("trial")
    a, b = totals["a"], totals["b"]
    assert (a.exposures, a.units, a.first_token_s, a.seconds, a.failures) == (2, 1, 0.5, 3.0, 0)
    assert (b.exposures, b.first_token_s, b.failures) == (1, None, 1)
    assert store.totals("nothing") == {}


def test_feedback_is_kept_and_the_last_word_counts(store: ExposureStore) -> None:
    store.record([exposure(1), exposure(2, "b")])
    assert store.add_feedback("chatcmpl-1", Feedback(rating=0.2), created=1.0)
    assert store.add_feedback("chatcmpl-1", Feedback(rating=0.8), created=2.0)
    assert store.add_feedback("chatcmpl-1", Feedback(accepted=True), created=3.0)
    assert store.add_feedback("chatcmpl-2", Feedback(accepted=False), created=4.0)
    assert not store.add_feedback("chatcmpl-9", Feedback(rating=1.0), created=5.0)
    (rating,) = store.outcomes("trial", "rating")
    assert (rating.arm, rating.value, rating.unit) == ("a", 0.8, hash_unit("user 1"))
    assert [(o.arm, o.value) for o in store.outcomes("trial", "accepted")] == [
        ("a", 1.0), ("b", 0.0),
    ]  # fmt: skip
    assert store.find("chatcmpl-1") == ("trial", ["a"])
    assert store.find("chatcmpl-9") is None


def test_comparison_has_all_its_arms_and_one_outcome(store: ExposureStore) -> None:
    store.record([exposure(1, arm, id="cmp-1") for arm in "ab"])
    assert store.find("cmp-1") == ("trial", ["a", "b"])
    store.add_feedback("cmp-1", Feedback(preferred="b"), created=1.0)
    (outcome,) = store.outcomes("trial", "preferred")
    assert outcome.arm == "b"


def test_nobody_is_named_in_the_file(store: ExposureStore, path: Path) -> None:
    store.record([exposure(1, unit="alice@example.org")])
    store.close()
    content = b"".join(file.read_bytes() for file in path.parent.iterdir())
    assert b"alice" not in content
    assert b"chatcmpl-1" in content
    store.__init__(path)


def test_what_was_recorded_twice_is_there_once(store: ExposureStore) -> None:
    store.record([exposure(1)])
    store.record([exposure(1, seconds=9.0)])
    assert store.totals("trial")["a"].seconds == 2.0


def test_oldest_leave_first_with_their_feedback(
    store: ExposureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_EXPOSURES", 5)
    monkeypatch.setattr(module, "_PRUNE_EVERY", 1)
    for number in range(8):
        store.record([exposure(number)])
        store.add_feedback(f"chatcmpl-{number}", Feedback(rating=0.5), created=float(number))
    assert store.totals("trial")["a"].exposures == 5
    assert store.find("chatcmpl-2") is None
    assert len(store.outcomes("trial", "rating")) == 5


def test_threads_may_write_at_once(store: ExposureStore) -> None:
    def work(start: int) -> None:
        for number in range(start, start + 20):
            store.record([exposure(number)])
            store.add_feedback(f"chatcmpl-{number}", Feedback(rating=1.0), created=1.0)

    threads = [threading.Thread(target=work, args=(100 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.totals("trial")["a"].exposures == 80
    assert len(store.outcomes("trial", "rating")) == 80


def test_what_was_acknowledged_outlives_kill_9(path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from tests.serve.experiments.test_exposures import exposure
from serve.experiments.exposures import ExposureStore, Feedback
store = ExposureStore(Path({str(path)!r}))
number = 0
while True:
    store.record([exposure(number)])
    store.add_feedback(f"chatcmpl-{{number}}", Feedback(rating=1.0), created=1.0)
    print(number, flush=True)
    number += 1
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    acknowledged = [int(process.stdout.readline()) for _ in range(20)][-1]
    os.kill(process.pid, signal.SIGKILL)
    rest = process.stdout.read().split()
    process.wait()
    acknowledged = int(rest[-1]) if rest else acknowledged
    store = ExposureStore(path)
    assert store.totals("trial")["a"].exposures >= acknowledged + 1
    assert len(store.outcomes("trial", "rating")) >= acknowledged + 1
    store.close()


def test_file_of_votes_is_not_taken_for_one_of_experiments(path: Path) -> None:
    VoteStore(path).close()
    with pytest.raises(DatabaseError, match="is a database of another program"):
        ExposureStore(path)


def test_full_disk_is_an_error_and_nothing_is_lost(store: ExposureStore) -> None:
    store.record([exposure(1)])
    (pages,) = store._db._db.execute("PRAGMA page_count").fetchone()
    store._db._db.execute(f"PRAGMA max_page_count = {pages}")
    many = [exposure(number) for number in range(2, 2000)]
    with pytest.raises(DatabaseError, match="cannot use .* full"):
        store.record(many)
    assert store.totals("trial")["a"].exposures == 1
    assert store.find("chatcmpl-1") == ("trial", ["a"])
    store._db._db.execute("PRAGMA max_page_count = 100000")
    store.record([exposure(5000)])


def test_damaged_file_is_an_error(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"not a database, but long enough to be one" * 100)
    with pytest.raises(DatabaseError, match="cannot use"):
        ExposureStore(path)


def test_newer_file_is_refused(path: Path) -> None:
    ExposureStore(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 9")
    db.close()
    with pytest.raises(DatabaseError, match="schema version 9"):
        ExposureStore(path)


def test_summary_has_means_of_units_and_differences_over_time(store: ExposureStore) -> None:
    for number in range(200):
        arm = "ab"[number % 2]
        # Each user rates twice; b is better.
        store.record([exposure(number, arm, unit=f"{arm} {number // 4}")])
        value = 0.2 if arm == "a" else 0.9
        store.add_feedback(f"chatcmpl-{number}", Feedback(rating=value), created=float(number))
    report = summarise(TRIAL, store)
    outcome = report["outcomes"]["rating"]
    assert outcome["arms"]["a"] == {"count": 100, "units": 50, "mean": pytest.approx(0.2)}
    difference = outcome["differences"]["b"]
    assert difference["value"] == pytest.approx(0.7)
    assert difference["verdict"] == "better"
    series = outcome["series"]["b"]
    assert 10 < len(series) <= 60
    assert series[-1]["value"] == pytest.approx(0.7)
    assert series[0]["high"] - series[0]["low"] > series[-1]["high"] - series[-1]["low"]
    assert [arm["exposures"] for arm in report["arms"]] == [100, 100]


def test_summary_of_comparisons_counts_preferences(store: ExposureStore) -> None:
    for number in range(60):
        store.record([exposure(number, arm, id=f"cmp-{number}") for arm in "ab"])
        preferred = "b" if number % 3 else ("a" if number % 2 else "tie")
        store.add_feedback(f"cmp-{number}", Feedback(preferred=preferred), created=float(number))
    outcome = summarise(TRIAL, store)["outcomes"]["preferred"]
    assert {label: of["count"] for label, of in outcome["arms"].items()} == {
        "a": 10, "b": 40, "tie": 10,
    }  # fmt: skip
    assert outcome["differences"]["b"]["value"] == pytest.approx(0.5)
    assert outcome["differences"]["b"]["verdict"] == "better"


def test_summary_of_nothing_is_empty(store: ExposureStore) -> None:
    report = summarise(TRIAL, store)
    assert report["outcomes"] == {}
    assert [(arm["label"], arm["exposures"], arm["seconds"]) for arm in report["arms"]] == [
        ("a", 0, None), ("b", 0, None),
    ]  # fmt: skip
    store.record([exposure(1), exposure(2, "b")])
    store.add_feedback("chatcmpl-1", Feedback(rating=1.0), created=1.0)
    outcome = summarise(TRIAL, store)["outcomes"]["rating"]
    assert outcome["differences"] == {"b": None}
    assert outcome["arms"]["b"]["mean"] is None
