"""The file that keeps comparisons and the votes on them: SQLite, a commit for each."""

import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from serve.experiments.comparison import (
    ArmIdentity,
    Ballots,
    Comparison,
    Vote,
    build_identity,
    encode_canonical,
)

MAX_UNVOTED = 10_000
"""Comparisons without a vote that are kept, the newest."""

MAX_ARMS_CHARS = 32_768
"""Longest description of a comparison's arms."""

SCHEMA_VERSION = 1

_MAX_PENDING = 1000
_APPLICATION_ID = int.from_bytes(b"Proa")
_SCHEMA = (
    "CREATE TABLE comparisons (id TEXT PRIMARY KEY NOT NULL, created INTEGER NOT NULL, "
    "arms TEXT NOT NULL, is_voted INTEGER NOT NULL DEFAULT 0)",
    "CREATE INDEX unvoted ON comparisons (is_voted) WHERE is_voted = 0",
    "CREATE TABLE votes (comparison_id TEXT PRIMARY KEY NOT NULL REFERENCES comparisons (id), "
    "vote NOT NULL CHECK (typeof(vote) = 'integer' OR vote IN ('tie', 'both_bad')), "
    "created INTEGER NOT NULL)",
    f"PRAGMA application_id = {_APPLICATION_ID}",
)
_PRUNE = """
    DELETE FROM comparisons WHERE rowid IN (
        SELECT rowid FROM comparisons WHERE is_voted = 0 ORDER BY rowid DESC LIMIT -1 OFFSET ?
    )
"""


class VoteStoreError(ValueError):
    """The file cannot be used, or does not take a vote; the message names it and says why."""


class VoteStore:
    """Comparisons and votes in one SQLite file, for any thread and for several processes.

    What a method has written when it returns is there after a crash or a power failure.

    Args:
        path: the file; it and its folder are made if missing.
        busy_timeout_s: how long to wait for another process that is writing.

    Raises:
        VoteStoreError: the file cannot be used; so does every method.
    """

    def __init__(self, path: Path, *, busy_timeout_s: float = 5.0) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._pending: dict[str, Comparison] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            is_usable = not path.exists() or path.is_file()
        except FileExistsError:
            raise VoteStoreError(f"cannot use {path}: {path.parent} is not a folder") from None
        except OSError as error:
            raise VoteStoreError(f"cannot use {path}: {error.strerror}") from None
        if not is_usable:
            raise VoteStoreError(f"{path} is not a file")
        with self._named_errors():
            self._db = sqlite3.connect(
                path, timeout=busy_timeout_s, isolation_level=None, check_same_thread=False
            )
        try:
            with self._named_errors():
                self._prepare(busy_timeout_s=busy_timeout_s)
        except VoteStoreError:
            self._db.close()
            raise

    def _prepare(self, *, busy_timeout_s: float) -> None:
        """Check whose file it is before anything is written to it; make the tables in a new one."""
        self._db.execute("BEGIN")
        is_new = self._check_owner()
        self._db.execute("COMMIT")
        # SQLite does not wait for others to leave when it changes the mode, so this does.
        end_s = time.monotonic() + busy_timeout_s
        while True:
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                break
            except sqlite3.OperationalError as error:
                is_busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
                if not is_busy or time.monotonic() > end_s:
                    raise
                time.sleep(0.01)
        # In this mode a weaker setting would lose acknowledged votes with the power.
        self._db.execute("PRAGMA synchronous = FULL")
        with self._transaction() as db:
            # Another process may have been faster.
            if is_new and self._check_owner():
                for statement in _SCHEMA:
                    db.execute(statement)
            # Written each time, so that a file that cannot be written is found now.
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _check_owner(self) -> bool:
        """Return whether the file is empty, so that it becomes ours; call it in a transaction."""
        (application_id,) = self._db.execute("PRAGMA application_id").fetchone()
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        (num_tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if application_id == version == num_tables == 0:
            return True
        if application_id != _APPLICATION_ID:
            raise VoteStoreError(f"{self._path} is a database of another program")
        if version != SCHEMA_VERSION:
            raise VoteStoreError(
                f"{self._path} has schema version {version}; this version of Proa reads "
                f"{SCHEMA_VERSION} only"
            )
        (verdict,) = self._db.execute("PRAGMA integrity_check(1)").fetchone()
        if verdict != "ok":
            raise VoteStoreError(f"{self._path} is damaged: {' '.join(verdict.split())}")
        return False

    def remember(self, comparison: Comparison) -> None:
        """Keep a comparison, so that it can be voted on; drop the oldest ones that nobody voted on.

        One that cannot be written is held in memory and written with what is written next.
        """
        size = len(_encode_arms(comparison))
        if size > MAX_ARMS_CHARS:
            raise VoteStoreError(
                f"the arms of a comparison take {size} characters, more than {MAX_ARMS_CHARS}"
            )
        with self._lock:
            self._pending[comparison.id] = comparison
            while len(self._pending) > _MAX_PENDING:
                del self._pending[next(iter(self._pending))]
            with self._transaction() as db:
                self._write_pending(db)
                db.execute(_PRUNE, (MAX_UNVOTED,))
            self._pending.clear()

    def find(self, comparison_id: str) -> Comparison | None:
        """Return a comparison, or None if it is not or no longer known."""
        with self._lock, self._named_errors():
            if comparison_id in self._pending:
                return self._pending[comparison_id]
            found = self._db.execute(
                "SELECT created, arms FROM comparisons WHERE id = ?", (comparison_id,)
            ).fetchone()
        if found is None:
            return None
        return Comparison(id=comparison_id, created=found[0], arms=self._parse_arms(found[1]))

    def vote(self, comparison_id: str, vote: Vote, *, created: int) -> bool:
        """Keep a vote on a comparison; a second one replaces the first.

        Args:
            comparison_id: which comparison.
            vote: an index that it has an arm for, or a word.
            created: Unix time, in seconds.

        Returns:
            Whether the comparison is known.
        """
        with self._lock:
            with self._transaction() as db:
                self._write_pending(db)
                written = db.execute(
                    "INSERT INTO votes SELECT id, ?, ? FROM comparisons WHERE id = ? "
                    "ON CONFLICT (comparison_id) DO UPDATE "
                    "SET vote = excluded.vote, created = excluded.created",
                    (vote, created, comparison_id),
                )
                db.execute("UPDATE comparisons SET is_voted = 1 WHERE id = ?", (comparison_id,))
            self._pending.clear()
        return written.rowcount > 0

    def ballots(self) -> list[Ballots]:
        """Return all votes, equal ones together."""
        with self._lock, self._named_errors():
            rows = self._db.execute(
                "SELECT arms, vote, count(*) FROM votes JOIN comparisons ON id = comparison_id "
                "GROUP BY arms, vote"
            ).fetchall()
        return [Ballots(arms=self._parse_arms(row[0]), vote=row[1], count=row[2]) for row in rows]

    def close(self) -> None:
        """Close the file; nothing can be called afterwards."""
        with self._lock, self._named_errors():
            self._db.close()

    def _write_pending(self, db: sqlite3.Connection) -> None:
        db.executemany(
            "INSERT INTO comparisons (id, created, arms) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
            [(item.id, item.created, _encode_arms(item)) for item in self._pending.values()],
        )

    def _parse_arms(self, text: str) -> tuple[ArmIdentity, ...]:
        try:
            arms: list[dict[str, Any]] = json.loads(text)
        except ValueError:
            raise VoteStoreError(f"{self._path} is damaged: it has arms that are no JSON") from None
        return tuple(build_identity(arm.pop("label"), arm.pop("model"), fields=arm) for arm in arms)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._named_errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise VoteStoreError(f"cannot use {self._path}: {error}") from None


def _encode_arms(comparison: Comparison) -> str:
    return encode_canonical([arm.describe() for arm in comparison.arms])
