"""The file of votes: what it keeps, through crashes and restarts, and what it refuses."""

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from serve.experiments import store as store_module
from serve.experiments.comparison import ArmIdentity, Ballots, Comparison
from serve.experiments.database import DatabaseError
from serve.experiments.store import MAX_ARMS_CHARS, SCHEMA_VERSION, VoteStore

ROOT = Path(__file__).parents[3]
ARMS = (
    ArmIdentity(label="A", model="m", fields='{"temperature":0.5}'),
    ArmIdentity(label="B", model="m:poet"),
)


def make_id(number: int) -> str:
    return f"cmp-{number:032x}"


def make_comparison(number: int, arms: tuple[ArmIdentity, ...] = ARMS) -> Comparison:
    return Comparison(id=make_id(number), created=1_700_000_000 + number, arms=arms)


OpenStore = Callable[..., VoteStore]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "votes.sqlite3"


@pytest.fixture
def open_store(path: Path) -> Iterator[OpenStore]:
    """Open the file, any number of times; a writer that is in the way is not waited for."""
    opened: list[VoteStore] = []

    def open_again() -> VoteStore:
        opened.append(VoteStore(path, busy_timeout_s=0.01))
        return opened[-1]

    yield open_again
    for store in opened:
        store.close()


def read_rows(path: Path, query: str) -> list[tuple[object, ...]]:
    db = sqlite3.connect(path)
    try:
        return db.execute(query).fetchall()
    finally:
        db.close()


def test_comparison_is_found_after_reopening(open_store: OpenStore) -> None:
    store = open_store()
    store.remember(make_comparison(1))
    store.close()
    assert open_store().find(make_id(1)) == make_comparison(1)


def test_unknown_comparison_is_not_found(open_store: OpenStore) -> None:
    assert open_store().find(make_id(1)) is None


def test_vote_on_an_unknown_comparison_is_not_kept(open_store: OpenStore) -> None:
    store = open_store()
    assert not store.vote(make_id(1), 0, created=1)
    assert store.ballots() == []


@pytest.mark.parametrize("vote", [0, 1, "tie", "both_bad"])
def test_vote_is_kept_as_it_was_given(open_store: OpenStore, vote: object) -> None:
    store = open_store()
    store.remember(make_comparison(1))
    assert store.vote(make_id(1), vote, created=1)  # type: ignore[arg-type]
    assert store.ballots() == [Ballots(arms=ARMS, vote=vote, count=1)]  # type: ignore[arg-type]


def test_second_vote_replaces_the_first(open_store: OpenStore, path: Path) -> None:
    store = open_store()
    store.remember(make_comparison(1))
    store.vote(make_id(1), 0, created=1)
    assert store.vote(make_id(1), "tie", created=2)
    assert read_rows(path, "SELECT * FROM votes") == [(make_id(1), "tie", 2)]


def test_equal_votes_on_equal_arms_are_together(open_store: OpenStore) -> None:
    store = open_store()
    for number, vote in enumerate([0, 1, 0]):
        store.remember(make_comparison(number))
        store.vote(make_id(number), vote, created=1)
    found = {item.vote: item.count for item in store.ballots()}
    assert found == {0: 2, 1: 1}


def test_votes_on_other_arms_are_apart(open_store: OpenStore) -> None:
    store = open_store()
    for number, arms in enumerate([ARMS, ARMS[::-1]]):
        store.remember(make_comparison(number, arms))
        store.vote(make_id(number), 0, created=1)
    assert {item.arms: item.count for item in store.ballots()} == {ARMS: 1, ARMS[::-1]: 1}


def test_only_the_newest_comparisons_without_a_vote_are_kept(
    open_store: OpenStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "MAX_UNVOTED", 3)
    store = open_store()
    for number in range(8):
        store.remember(make_comparison(number))
        if number in (0, 2):
            store.vote(make_id(number), 0, created=1)
    ids = [row[0] for row in read_rows(path, "SELECT id FROM comparisons ORDER BY id")]
    assert ids == [make_id(number) for number in (0, 2, 5, 6, 7)]


def test_ten_thousand_comparisons_without_a_vote_are_kept() -> None:
    assert store_module.MAX_UNVOTED == 10_000


def test_comparison_of_huge_arms_is_refused(open_store: OpenStore) -> None:
    arms = (ArmIdentity(label="A" * MAX_ARMS_CHARS, model="m"),)
    with pytest.raises(DatabaseError, match=r"take \d+ characters, more than 32768"):
        open_store().remember(make_comparison(1, arms))


def test_every_commit_waits_for_the_disk(open_store: OpenStore) -> None:
    store = open_store()
    (level,) = store._db._db.execute("PRAGMA synchronous").fetchone()
    assert level == 2  # FULL


def test_file_is_in_wal_mode(open_store: OpenStore, path: Path) -> None:
    open_store()
    assert read_rows(path, "PRAGMA journal_mode") == [("wal",)]


def test_threads_may_share_a_store(open_store: OpenStore) -> None:
    store = open_store()

    def vote(number: int) -> bool:
        store.remember(make_comparison(number))
        return store.vote(make_id(number), number % 2, created=1)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(vote, range(80)))
    assert sorted((item.vote, item.count) for item in store.ballots()) == [(0, 40), (1, 40)]


VOTER = """
import sys
from itertools import count, islice
from pathlib import Path
from serve.experiments.comparison import ArmIdentity, Comparison
from serve.experiments.store import VoteStore

path, first, most = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
arms = tuple(ArmIdentity(label=label, model="m") for label in "AB")
store = VoteStore(path)
for number in islice(count(first), most):
    store.remember(Comparison(id=f"cmp-{number:032x}", created=number, arms=arms))
    assert store.vote(f"cmp-{number:032x}", number % 2, created=number)
    print(number, flush=True)
"""


def start_voter(path: Path, first: int, most: int) -> subprocess.Popen[str]:
    """Start a process that votes on new comparisons and prints the number of each vote kept."""
    return subprocess.Popen(
        [sys.executable, "-c", VOTER, str(path), str(first), str(most)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_acknowledged_votes_survive_kills(open_store: OpenStore, path: Path) -> None:
    acknowledged: list[int] = []
    for round_, num_lines in enumerate((1, 20, 137)):
        voter = start_voter(path, 1_000_000 * round_, 1_000_000)
        assert voter.stdout is not None
        lines = [voter.stdout.readline() for _ in range(num_lines)]
        voter.send_signal(signal.SIGKILL)
        rest = voter.stdout.read()
        assert voter.wait() == -signal.SIGKILL
        # The last line may have been cut.
        acknowledged += [int(line) for line in ("".join(lines) + rest).split("\n")[:-1]]
    store = open_store()
    assert store._db._db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    votes = dict(read_rows(path, "SELECT comparison_id, vote FROM votes"))  # type: ignore[arg-type]
    assert len(acknowledged) >= 158
    assert {number: votes.get(make_id(number)) for number in acknowledged} == {
        number: number % 2 for number in acknowledged
    }


def test_several_processes_may_make_and_share_a_file(open_store: OpenStore, path: Path) -> None:
    voters = [start_voter(path, 1000 * number, 20) for number in range(4)]
    assert [len(voter.communicate()[0].splitlines()) for voter in voters] == [20] * 4
    assert [voter.returncode for voter in voters] == [0] * 4
    assert sum(item.count for item in open_store().ballots()) == 80


@pytest.fixture
def block(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection; a transaction that it begins keeps all others from writing."""
    db = sqlite3.connect(path, isolation_level=None)
    yield db
    db.close()


def test_write_that_fails_is_an_error_with_the_path(
    open_store: OpenStore, block: sqlite3.Connection, path: Path
) -> None:
    store = open_store()
    block.execute("BEGIN IMMEDIATE")
    with pytest.raises(DatabaseError, match=f"cannot use {path}: database is locked"):
        store.remember(make_comparison(1))


def test_vote_that_fails_changes_nothing(open_store: OpenStore, block: sqlite3.Connection) -> None:
    store = open_store()
    store.remember(make_comparison(1))
    store.vote(make_id(1), 0, created=1)
    block.execute("BEGIN IMMEDIATE")
    with pytest.raises(DatabaseError, match="database is locked"):
        store.vote(make_id(1), 1, created=2)
    block.execute("ROLLBACK")
    assert store.ballots() == [Ballots(arms=ARMS, vote=0, count=1)]


def test_comparison_that_could_not_be_written_can_be_voted_on_later(
    open_store: OpenStore, block: sqlite3.Connection
) -> None:
    store = open_store()
    block.execute("BEGIN IMMEDIATE")
    with pytest.raises(DatabaseError, match="database is locked"):
        store.remember(make_comparison(1))
    assert store.find(make_id(1)) == make_comparison(1)
    block.execute("ROLLBACK")
    assert store.vote(make_id(1), 0, created=1)


def test_comparison_that_could_not_be_written_is_written_with_the_next(
    open_store: OpenStore, block: sqlite3.Connection
) -> None:
    store = open_store()
    block.execute("BEGIN IMMEDIATE")
    with pytest.raises(DatabaseError, match="database is locked"):
        store.remember(make_comparison(1))
    block.execute("ROLLBACK")
    store.remember(make_comparison(2))
    assert open_store().find(make_id(1)) == make_comparison(1)


def test_comparisons_that_cannot_be_written_do_not_fill_the_memory(
    open_store: OpenStore, block: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_MAX_PENDING", 2)
    store = open_store()
    block.execute("BEGIN IMMEDIATE")
    for number in range(3):
        with pytest.raises(DatabaseError, match="database is locked"):
            store.remember(make_comparison(number))
    assert [store.find(make_id(number)) is None for number in range(3)] == [True, False, False]


def test_closed_store_is_an_error(open_store: OpenStore) -> None:
    store = open_store()
    store.close()
    with pytest.raises(DatabaseError, match="closed database"):
        store.find(make_id(1))


def test_folder_of_the_file_is_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "votes"
    VoteStore(path).close()
    assert path.is_file()


def test_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatabaseError, match=f"{tmp_path} is not a file"):
        VoteStore(tmp_path)


def test_pipe_is_refused(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(DatabaseError, match=f"{path} is not a file"):
        VoteStore(path)


def test_path_below_a_file_is_refused(path: Path) -> None:
    path.touch()
    with pytest.raises(DatabaseError, match=f"{path} is not a folder"):
        VoteStore(path / "votes")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder here that nobody can write")
@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("/proc/votes", "cannot use /proc/votes: unable to open database file"),
        ("/proc/none/votes", "cannot use /proc/none/votes: No such file or directory"),
    ],
    ids=["file", "folder"],
)
def test_path_that_cannot_be_made_is_refused(name: str, match: str) -> None:
    with pytest.raises(DatabaseError, match=match):
        VoteStore(Path(name))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
@pytest.mark.parametrize("mode", [0o000, 0o444], ids=["unreadable", "read-only"])
def test_file_without_permission_is_refused(open_store: OpenStore, path: Path, mode: int) -> None:
    open_store().close()
    path.chmod(mode)
    with pytest.raises(DatabaseError, match=f"cannot use {path}: "):
        VoteStore(path)


def test_file_that_is_no_database_is_refused_and_stays(path: Path) -> None:
    path.write_bytes(b"dear diary")
    with pytest.raises(DatabaseError, match=f"cannot use {path}: file is not a database"):
        VoteStore(path)
    assert path.read_bytes() == b"dear diary"


def test_database_of_another_program_is_refused_and_stays(path: Path) -> None:
    read_rows(path, "CREATE TABLE diary (day)")
    before = path.read_bytes()
    with pytest.raises(DatabaseError, match=f"{path} is a database of another program"):
        VoteStore(path)
    assert path.read_bytes() == before


def test_newer_schema_is_refused(open_store: OpenStore, path: Path) -> None:
    open_store().close()
    read_rows(path, f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    with pytest.raises(DatabaseError, match=f"{path} has schema version 2; .* reads 1 only"):
        VoteStore(path)


def test_empty_file_becomes_a_store(open_store: OpenStore, path: Path) -> None:
    path.touch()
    assert open_store().ballots() == []


@pytest.fixture
def filled(open_store: OpenStore, path: Path) -> Path:
    """A file of several pages."""
    store = open_store()
    for number in range(100):
        store.remember(make_comparison(number))
    store.close()
    return path


def test_cut_file_is_refused(filled: Path) -> None:
    data = filled.read_bytes()
    filled.write_bytes(data[: len(data) // 2])
    with pytest.raises(DatabaseError, match=f"{filled}: database disk image is malformed"):
        VoteStore(filled)


def test_overwritten_page_is_refused(filled: Path) -> None:
    data = filled.read_bytes()
    filled.write_bytes(data[:4096] + b"\xff" * 4096 + data[8192:])
    with pytest.raises(DatabaseError, match=f"{filled} is damaged: "):
        VoteStore(filled)


def test_arms_that_cannot_be_read_are_an_error(filled: Path) -> None:
    filled.write_bytes(filled.read_bytes().replace(b'[{"label"', b'[?"label"'))
    store = VoteStore(filled)
    try:
        with pytest.raises(DatabaseError, match=f"{filled} is damaged: it has arms that are no"):
            store.find(make_id(1))
    finally:
        store.close()
