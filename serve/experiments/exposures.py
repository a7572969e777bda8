"""The file that keeps who was shown what, and what came of it: no prompts, answers or names."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.experiments.database import Database

MAX_EXPOSURES = 1_000_000
"""Kept in a file; the oldest leave first, with their feedback."""

SCHEMA_VERSION = 1
TIE = "tie"
OUTCOMES = ("rating", "accepted", "preferred")

_APPLICATION_ID = int.from_bytes(b"ProE")
_PRUNE_EVERY = 1000
_SCHEMA = (
    "CREATE TABLE exposures (id TEXT NOT NULL, experiment TEXT NOT NULL, arm TEXT NOT NULL, "
    "unit BLOB NOT NULL, created REAL NOT NULL, first_token_s REAL, seconds REAL NOT NULL, "
    "prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, finish TEXT NOT NULL, "
    "PRIMARY KEY (id, arm)) WITHOUT ROWID",
    "CREATE INDEX by_experiment ON exposures (experiment, arm, unit)",
    "CREATE INDEX by_age ON exposures (created)",
    "CREATE TABLE feedback (id TEXT PRIMARY KEY NOT NULL, created REAL NOT NULL, rating REAL, "
    "accepted INTEGER, preferred TEXT) WITHOUT ROWID",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Exposure:
    """An answer that an arm gave.

    Attributes:
        id: of the answer; of a comparison it is that of all its arms.
        experiment, arm: whose.
        unit: what told the client from others; only its hash is kept.
        created: Unix time, in seconds.
        first_token_s, seconds: until the first token and until the end; None: there was no token.
        prompt_tokens, completion_tokens: of the answer.
        finish: why it ended: stop, length, abort or error.
    """

    id: str
    experiment: str
    arm: str
    unit: str
    created: float
    first_token_s: float | None
    seconds: float
    prompt_tokens: int
    completion_tokens: int
    finish: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Feedback:
    """What a client says of an answer; what is None is not said.

    Attributes:
        rating: 0, useless, to 1, could not be better.
        accepted: whether a completion was taken over.
        preferred: label of the better arm of a comparison, or `tie`.
    """

    rating: float | None = None
    accepted: bool | None = None
    preferred: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmTotals:
    """What an arm was asked.

    Attributes:
        exposures, units: answers, and different units that got them.
        first_token_s, seconds: means, None without an answer.
        completion_tokens: mean.
        failures: answers that ended by an abort or an error.
    """

    exposures: int
    units: int
    first_token_s: float | None
    seconds: float | None
    completion_tokens: float | None
    failures: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What was said of one answer, in the order of time.

    Attributes:
        arm: whose answer it was, or the preferred one.
        unit: hash of the unit.
        created: Unix time of the feedback.
        value: rating, or 1 for accepted and 0 for not.
    """

    arm: str
    unit: bytes
    created: float
    value: float


class ExposureStore:
    """Exposures and feedback in one SQLite file, for any thread and for several processes.

    Args:
        path: the file; it and its folder are made if missing.
        busy_timeout_s: how long to wait for another process that is writing.

    Raises:
        DatabaseError: the file cannot be used; so does every method.
    """

    def __init__(self, path: Path, *, busy_timeout_s: float = 5.0) -> None:
        self._db = Database(
            path, application_id=_APPLICATION_ID, version=SCHEMA_VERSION, schema=_SCHEMA,
            busy_timeout_s=busy_timeout_s,
        )  # fmt: skip
        self._until_pruning = 0

    def record(self, exposures: Sequence[Exposure]) -> None:
        """Keep what was shown; one that is there already stays."""
        rows = [
            (
                item.id, item.experiment, item.arm, hash_unit(item.unit), item.created,
                item.first_token_s, item.seconds, item.prompt_tokens, item.completion_tokens,
                item.finish,
            )
            for item in exposures
        ]  # fmt: skip
        with self._db.lock, self._db.transaction() as db:
            db.executemany(
                f"INSERT INTO exposures VALUES ({', '.join('?' * 10)}) ON CONFLICT DO NOTHING", rows
            )
            self._until_pruning -= len(rows)
            if self._until_pruning <= 0:
                self._until_pruning = _PRUNE_EVERY
                self._prune(db)

    def _prune(self, db: Any) -> None:
        (count,) = db.execute("SELECT count(*) FROM exposures").fetchone()
        if count > MAX_EXPOSURES:
            db.execute(
                "DELETE FROM exposures WHERE (id, arm) IN "
                "(SELECT id, arm FROM exposures ORDER BY created LIMIT ?)",
                (count - MAX_EXPOSURES,),
            )
            db.execute("DELETE FROM feedback WHERE id NOT IN (SELECT id FROM exposures)")

    def find(self, exposure_id: str) -> tuple[str, list[str]] | None:
        """Return the experiment of an answer and the arms that it was shown with, or None."""
        with self._db.reading() as db:
            rows = db.execute(
                "SELECT experiment, arm FROM exposures WHERE id = ? ORDER BY arm", (exposure_id,)
            ).fetchall()
        return (rows[0][0], [row[1] for row in rows]) if rows else None

    def add_feedback(self, exposure_id: str, feedback: Feedback, *, created: float) -> bool:
        """Keep what a client says; of what it says twice, the last counts.

        Returns:
            Whether the answer is known.
        """
        with self._db.lock, self._db.transaction() as db:
            written = db.execute(
                "INSERT INTO feedback SELECT id, ?, ?, ?, ? FROM exposures WHERE id = ? LIMIT 1 "
                "ON CONFLICT (id) DO UPDATE SET created = excluded.created, "
                "rating = coalesce(excluded.rating, rating), "
                "accepted = coalesce(excluded.accepted, accepted), "
                "preferred = coalesce(excluded.preferred, preferred)",
                (created, feedback.rating, feedback.accepted, feedback.preferred, exposure_id),
            )
        return written.rowcount > 0

    def totals(self, experiment: str) -> dict[str, ArmTotals]:
        """Return what each arm was asked, by its label."""
        with self._db.reading() as db:
            rows = db.execute(
                "SELECT arm, count(*), count(DISTINCT unit), avg(first_token_s), avg(seconds), "
                "avg(completion_tokens), sum(finish NOT IN ('stop', 'length')) FROM exposures "
                "WHERE experiment = ? GROUP BY arm",
                (experiment,),
            ).fetchall()
        return {
            row[0]: ArmTotals(
                exposures=row[1], units=row[2], first_token_s=row[3], seconds=row[4],
                completion_tokens=row[5], failures=row[6],
            )
            for row in rows
        }  # fmt: skip

    def outcomes(self, experiment: str, name: str) -> list[Outcome]:
        """Return what was said of its answers, oldest first.

        Args:
            experiment: whose.
            name: one of `OUTCOMES`; with `preferred` the arm is the preferred one, or `tie`.
        """
        assert name in OUTCOMES
        what = "preferred, unit, f.created, 1.0" if name == "preferred" else (
            f"arm, unit, f.created, {name}"
        )  # fmt: skip
        group = " GROUP BY f.id" if name == "preferred" else ""
        with self._db.reading() as db:
            rows = db.execute(
                f"SELECT {what} FROM feedback f JOIN exposures e ON e.id = f.id "
                f"WHERE experiment = ? AND f.{name} IS NOT NULL{group} ORDER BY f.created, f.id",
                (experiment,),
            ).fetchall()
        return [
            Outcome(arm=row[0], unit=row[1], created=row[2], value=float(row[3])) for row in rows
        ]

    def close(self) -> None:
        """Close the file; nothing can be called afterwards."""
        self._db.close()


def hash_unit(unit: str) -> bytes:
    """Return what is kept of a unit."""
    return hashlib.sha256(unit.encode(errors="surrogatepass")).digest()[:8]
