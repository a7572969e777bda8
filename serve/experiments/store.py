"""The file that keeps comparisons and the votes on them: SQLite, a commit for each."""

import json
import sqlite3
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
from serve.experiments.database import Database, DatabaseError

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
)
_PRUNE = """
    DELETE FROM comparisons WHERE rowid IN (
        SELECT rowid FROM comparisons WHERE is_voted = 0 ORDER BY rowid DESC LIMIT -1 OFFSET ?
    )
"""


class VoteStore:
    """Comparisons and votes in one SQLite file, for any thread and for several processes.

    What a method has written when it returns is there after a crash or a power failure.

    Args:
        path: the file; it and its folder are made if missing.
        busy_timeout_s: how long to wait for another process that is writing.

    Raises:
        DatabaseError: the file cannot be used, or does not take a vote; so does every method.
    """

    def __init__(self, path: Path, *, busy_timeout_s: float = 5.0) -> None:
        self._path = path
        self._pending: dict[str, Comparison] = {}
        self._db = Database(
            path, application_id=_APPLICATION_ID, version=SCHEMA_VERSION, schema=_SCHEMA,
            busy_timeout_s=busy_timeout_s,
        )  # fmt: skip

    def remember(self, comparison: Comparison) -> None:
        """Keep a comparison, so that it can be voted on; drop the oldest ones that nobody voted on.

        One that cannot be written is held in memory and written with what is written next.
        """
        size = len(_encode_arms(comparison))
        if size > MAX_ARMS_CHARS:
            raise DatabaseError(
                f"the arms of a comparison take {size} characters, more than {MAX_ARMS_CHARS}"
            )
        with self._db.lock:
            self._pending[comparison.id] = comparison
            while len(self._pending) > _MAX_PENDING:
                del self._pending[next(iter(self._pending))]
            with self._db.transaction() as db:
                self._write_pending(db)
                db.execute(_PRUNE, (MAX_UNVOTED,))
            self._pending.clear()

    def find(self, comparison_id: str) -> Comparison | None:
        """Return a comparison, or None if it is not or no longer known."""
        with self._db.reading() as db:
            if comparison_id in self._pending:
                return self._pending[comparison_id]
            found = db.execute(
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
        with self._db.lock:
            with self._db.transaction() as db:
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
        with self._db.reading() as db:
            rows = db.execute(
                "SELECT arms, vote, count(*) FROM votes JOIN comparisons ON id = comparison_id "
                "GROUP BY arms, vote"
            ).fetchall()
        return [Ballots(arms=self._parse_arms(row[0]), vote=row[1], count=row[2]) for row in rows]

    def close(self) -> None:
        """Close the file; nothing can be called afterwards."""
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
            raise DatabaseError(f"{self._path} is damaged: it has arms that are no JSON") from None
        return tuple(build_identity(arm.pop("label"), arm.pop("model"), fields=arm) for arm in arms)


def _encode_arms(comparison: Comparison) -> str:
    return encode_canonical([arm.describe() for arm in comparison.arms])
